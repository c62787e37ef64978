"""LocalSGD: DDP's launching and process groups, with rounds of local steps instead of gradient syncs."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import DeepSpeedPrecision, FSDPPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_lopt.comm import Communicator, DisagreementError, Membership, check_timeout, count_workers, digest
from lightning_lopt.compression import Codec, LinearCodec
from lightning_lopt.functional.merge import MergeRule
from lightning_lopt.islands import FULLY_SHARD, has_dtensors, local_shard, reshard
from lightning_lopt.rounds import Rounds, check_combination, check_elastic
from lightning_lopt.schedules import RoundInfo, as_schedule
from lightning_lopt.selection import Selection
from lightning_lopt.strategies import host
from lightning_lopt.strategies.averaging import refuse_callbacks, sync_weight_averages
from lightning_lopt.strategies.callbacks import place_callbacks
from lightning_lopt.strategies.checkpoint.atomic import AtomicCheckpointIO
from lightning_lopt.strategies.checkpoint.entry import given_settings
from lightning_lopt.strategies.checkpoint.resume import Resume
from lightning_lopt.strategies.checkpoint.writing import CheckpointWriter
from lightning_lopt.strategies.describe import describe
from lightning_lopt.strategies.elastic import ElasticWorker
from lightning_lopt.strategies.errors import CheckpointError, explain_lost_worker
from lightning_lopt.strategies.global_weights import GlobalWeights
from lightning_lopt.strategies.islands import (
    NOT_AFTER_EXCEPTION,
    WorkerMesh,
    check_islands,
    explain_shards,
    full_state_dict,
    load_full_state_dict,
)
from lightning_lopt.strategies.joint import JointOptimizer
from lightning_lopt.strategies.loaders import ResumableLoaders
from lightning_lopt.strategies.modes import OptimizerModes
from lightning_lopt.strategies.signals import Signals
from lightning_lopt.strategies.uneven import UnevenInputs
from lightning_lopt.strategies.virtual import ProcessRounds, workers_of_process
from lightning_lopt.sync.options import LocalState, SyncOptions
from lightning_lopt.sync.rules import Rule
from lightning_lopt.sync.status import CALL, SyncPoint
from lightning_lopt.sync.sync import EvalWeights
from lightning_lopt.worker_speeds import Speeds, check_speeds


class LocalSGD(DDPStrategy):
    r"""Local SGD: every worker takes H local steps, then all continue from the average of their parameters.

    .. math:: a \leftarrow \mathrm{Outer}\big(a,\; a - \tfrac1K \sum_i y_i\big), \qquad y_i \leftarrow a

    a is the anchor (the global parameters), y_i worker i's parameters; without an outer optimizer a becomes the mean
    itself. The mean of K equal values is the value up to rounding: what no worker moves may change by K units in its
    last place, once, and not in every round. In the steps between syncs nothing at all is communicated. With manual
    optimization a local step is a batch in which any optimizer stepped, so that a GAN's two optimizers share their
    rounds.

    A worker that does what the others do not (saves, validates, stops, logs a reduced metric) is a `DisagreementError`
    on all that says what it did: before whatever else is sent, a message of fixed length names it. After a resume,
    settings of the strategy that the script has changed take effect; those of local optimizers and their schedules are
    the checkpoint's, as always in Lightning. A warning names each.

    Args:
        local_steps: H >= 1 in optimizer steps, or a schedule (`QSR`, or a callable from `RoundInfo` to an integer; with
            a memory, a `StatefulSchedule`); begin with 16, or the least H with which a sync costs a tenth of the time,
            which `python -m lightning_lopt.costs` prints.
        outer_optimizer: Function that makes a torch optimizer from parameter groups, e.g.
            `partial(torch.optim.AdamW, lr=1e-3)`; the gradient of its parameters is the averaged pseudo-gradient. None
            averages.
        density: Share of the coordinates that a sync sends, in (0, 1]; they are drawn anew in every round.
        selection: `Fragments(...)` or any `Selection`, in place of a density.
        compression: `"bf16"`, `"int8"`, `TopK(...)`, `PowerSGD(...)`, or any `Codec` or `LinearCodec`, with error
            feedback; None for float32.
        overlap_steps: Number Q of the H local steps that are taken while the sync is in flight, 0 <= Q < H.
        merge: Rule that makes a worker's new parameters from the anchor a, its y at the launch and z at the finish:
            `"delay_corrected"` a + (z - y), `"overwrite"` a, or a number α in [0, 1] for α z + (1 - α) a. Without
            overlap y = z.
        worker_speeds: One positive number per worker, or `"measured"`: the fastest takes H steps in a round, the others
            in proportion, so that nobody waits; they meet at the ends of epochs. None is H for all.
        local_state: Treatment of the local optimizer's state of the tensors that were sent: `"keep"`, `"reset"`, or
            `"average"` over the workers, which costs traffic.
        sharded: Whether each worker does the outer step of some of the tensors, holds the outer state of these alone,
            and sends the result to all. The traffic is that of an all-reduce, also where every worker's values are
            needed (LAgg-A).
        sync_rules: Rules for tensors by glob pattern of their full names (`"*queue"`), in place of the defaults of
            *State* in `LocalSGD`: `"mean"`, `"unit_mean"` (scaled to norm 1), `"max"`, `"min"`, `"sum_of_changes"`
            (for counts), `"first"` (rank 0's) or `"local"` (each worker keeps its own); the first pattern that fits
            holds. Parameters in training are `"mean"` or `"local"`.
        ranks_per_worker: Number of consecutive processes that are one worker, or `"node"` for all on a node: their
            gradients are averaged in every step, on the fast link between them; rounds are between workers. Within a
            worker the limits of DDP hold: each parameter that trains must take part in every backward pass. Where
            `configure_model` shards the module over `self.device_mesh` (FSDP2, as for `ModelParallelStrategy`), they
            share one model, which may be larger than a device.
        tensor_parallel_size: Number of the ranks of a worker that share the matrices of each layer; the others of
            them share the rows of a batch. It divides `ranks_per_worker`; for models that `configure_model` shards.
        virtual_workers: Number of workers that take turns in one process on one device, each on a batch of its own in
            every step.
        elastic: Workers that come and go between rounds (`Elastic`), each a process with a Trainer of its own: see
            *Workers that come and go* in `LocalSGD`. None for a fixed group.
        eval_weights: Weights that validation and checkpoints see within a round: `"anchor"`, the last synced ones,
            without communication, or `"mean"`, the workers' present average; None means the mean for plain averaging
            and where a sync sends only a part, else the anchor. After an exception it is always the anchor. See below
            for the hooks that see them.
        accelerator: Usually left to the Trainer, as are the next four.
        parallel_devices: Devices of the processes on this node.
        cluster_environment: Environment that says which process this is.
        checkpoint_io: Reader and writer of checkpoints; by default one that replaces files as a whole.
        precision_plugin: Plugin for the precision of training.
        process_group_backend: `"gloo"`, `"nccl"`, ...; by default the one that fits the device.
        timeout: Time for which a collective waits for all workers before it fails.
        start_method: Way in which the Trainer starts worker processes: `"popen"`, `"spawn"`, `"fork"` or
            `"forkserver"`. A notebook needs `"fork"`, and a process that has run an operation on several OpenMP
            threads cannot be forked: start its kernel with OMP_NUM_THREADS=1.

    Attributes:
        rounds: The `Rounds` of the present fit (`VirtualRounds` with virtual workers), None before.
        signals: Handling of signals in the present fit, None before.
        elastic: The argument.
        given: Settings of the local optimizers and learning rate schedules, as the script gave them.
        timeout: Time for which a collective waits for all workers before it fails.

    Raises:
        ValueError: An argument out of its range, arguments that exclude each other, nothing to train, or lazy
            parameters without a shape.
        TypeError: `outer_optimizer` cannot be called with parameters.
        DisagreementError: In training, where the workers do different things.
        MisconfigurationException: A plugin of FSDP or DeepSpeed, or several processes with virtual workers or with one
            of those that come and go.

    Weights that hooks see: from `on_validation_model_eval` to `on_validation_model_train`, and in `on_save_checkpoint`,
    the module shows the global weights. Elsewhere it has this worker's own; `global_weights()` shows the global ones.

    * Hooks may put weights of their own into the module, an EMA for example, and take them out again: both between
      those two hooks, or both outside of them. Otherwise an error at the end of the validation names the weights.
    * All workers may call `eval()` and `train()` of an optimizer that has them, as schedule-free ones do, in any hook.
      Each worker's own weights move. In the mode for evaluation the global weights are always the workers' mean, and
      each call between those two hooks computes it anew. At the end of training the states of such an optimizer are
      averaged, so that all workers have the same weights in both modes.
    * An average that a callback of your own keeps is that of one worker, rank 0 in a checkpoint. `WeightAveraging` and
      `EMAWeightAveraging` average the workers' mean.

    Memory: 4 bytes per parameter for the anchor, the outer optimizer's state, 4 more during a sync, 8 with overlap, 8
    in a validation within a round; 4 for error feedback, and 4 more in its syncs. Sends 2(K-1)/K × 4 bytes per
    parameter and round, or what `density`, `selection` and `compression` leave of it. Fails when H is so large that
    workers drift into different basins: watch `RoundMonitor`'s drift.

    **State.** A sync makes all tensors of the module the same on all workers, those included that no optimizer steps.
    `sync_rules` changes the rule, also from `"mean"` to itself to silence a warning; `rounds.rules()` lists the rules:

    | tensor                                                        | rule                                             |
    |---------------------------------------------------------------|--------------------------------------------------|
    | parameter in training: held by an optimizer, `requires_grad`  | outer step on the workers' mean; or `"local"`    |
    | parameter that was trained and is frozen                      | `"mean"`, without an outer step                  |
    | parameter of an EMA teacher                                   | `"mean"`, from its first change on               |
    | parameter that never changes                                  | not sent, no memory                              |
    | floating-point or complex buffer                              | `"mean"`                                         |
    | integer or boolean buffer                                     | `"max"`                                          |
    | u and v of spectral normalisation                             | `"unit_mean"`, then a power iteration            |
    | `min_val` and `max_val` of observers of `torch.ao`            | `"min"`, `"max"`                                 |
    | histograms, scales and zero points of `torch.ao`              | `"first"`                                        |
    | names in `_ddp_params_and_buffers_to_ignore`                  | `"local"`                                        |

    Counts need `"sum_of_changes"`, masks `"min"` or `"max"`, queues and memories of samples `"local"` or `"first"`;
    where values look like these and have no rule of their own, a warning says so once. Buffers and teachers may be
    reassigned, resized and registered late, on all workers in the same round. Changes that hooks make after a sync are
    combined where somebody looks, and at the end of the fit; values that they write into buffers during a validation
    stay. In the round in which a teacher first changes, its last synced values are not known: evaluation of the anchor
    and a resume with another number of workers see a worker's own. Checkpoints hold `"local"` tensors of every worker;
    their `state_dict` has rank 0's.

    Weights that are loaded, re-initialised or pruned before the fit's first step (`on_fit_start`) or before the first
    step after a sync become the global ones; all workers must write the same. Within a round, and where a sync sends
    only a part or overlaps, call `adopt_weights()`: otherwise the change counts as progress of the local steps. Where
    weights are clipped to a box, an outer step may leave it: clip in `on_train_batch_end`. Optimizers can be given
    groups, and not be replaced, within a fit.

    **Workers that come and go.** With ``elastic=Elastic("http://10.0.0.1:29510", worker_id=0, max_workers=3)`` the
    script is started once per worker, with `Trainer(devices=1)` and another `worker_id`, and started again when it has
    died, by one ``torchrun --standalone --nproc-per-node 1 --max-restarts 100 script.py`` per worker for example.
    `Elastic` says what is kept, what is lost, and what listens where. Rounds are the clock: a worker joins at the end
    of a batch with which a round ends, and goes to the others' step, epoch and learning rates, and to the batches of
    its own share of the data that belong there; its share rests while it is away. Each worker prints who comes and
    goes.

    * `max_steps` or `max_epochs` tell all workers where the run ends. A Trainer that stops elsewhere (early stopping,
      `max_time`, data of unknown length) leaves the others, and ends with the last synced weights. After SIGTERM, of
      itself or its torchrun, or SLURM's requeue signal it first ends its round, which must be shorter than the time
      until SIGKILL, with torchrun 30 s. After SIGKILL of its torchrun a worker lives on: end it before another takes
      its `worker_id`.
    * Each worker has its own loggers, callbacks and checkpoints: give it a `default_root_dir` of its own, and the same
      `seed_everything` as the others. `fit(ckpt_path="last")` matters where all have died or ended: without it, a
      worker that is started after the others' end trains a whole new run alone, and `ModelCheckpoint(save_last=True)`
      writes last-v1.ckpt beside the last.ckpt of an earlier life, unless `enable_version_counter=False`.
    * Validation sees the last synced weights (`eval_weights="anchor"`) and all of the data, the same on all workers.
    * Refused are `sharded`, `overlap_steps`, `density` and selections, a number as `merge`, `worker_speeds`,
      `virtual_workers`, `ranks_per_worker`, networks for a fixed number of workers (LAgg-A), `sync_dist=True` in
      training, callbacks that average weights, and schedule-free optimizers: they need a fixed group, or all workers
      between the syncs.

    **Workers whose ranks share a model** (FSDP2, see `ranks_per_worker`) have checkpoints that resume with any numbers
    of workers and ranks. A sync in flight goes on with other ranks, unless it sends random coordinates, is divided
    (`sharded=True`) or LAgg-A's; with another number of workers none does. Its round then ends with a sync of its own,
    and a warning says so. The checkpoint's weights are whole tensors under plain names, as `load_from_checkpoint`,
    `ModelParallelStrategy` (in an evaluation) and `torch.load` read them. In bytes per parameter of float32, the host
    of rank 0 needs 4 to save, which gathers tensor by tensor, and every rank 4 and its part to resume, with other ranks
    a worker's whole state. With tensor parallelism torch neither clips by norm nor steps plain and distributed
    parameters together: leave out the Trainer's `gradient_clip_val`, and give the local optimizer `foreach=False`.
    Before torch 2.11 clipping by norm adds its 1e-6 to the norm of each rank's shards (pytorch#149768). In
    `configure_model` wrap blocks for activation checkpointing first, then compile them, then shard them; tied
    parameters belong to one call of `fully_shard`. BatchNorm takes the statistics of a rank's own samples, unless it is
    converted before (`SyncBatchNorm.convert_sync_batchnorm` with the group of the mesh): `sync_batchnorm=True` and
    callbacks that average weights are refused.

    Source: McMahan et al. 1602.05629; Stich 1805.09767.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(accelerator="cpu", devices=2, strategy=LocalSGD(local_steps=16), logger=False)
        >>> trainer.strategy.strategy_name
        'local_sgd'
    """

    strategy_name = "local_sgd"

    def __init__(
        self,
        local_steps: int | Callable[[RoundInfo], int] = 16,
        outer_optimizer: Callable[[Iterable], Optimizer] | None = None,
        density: float = 1.0,
        selection: Selection | None = None,
        compression: str | Codec | LinearCodec | None = None,
        overlap_steps: int = 0,
        merge: MergeRule = "delay_corrected",
        worker_speeds: list[float] | Literal["measured"] | None = None,
        local_state: LocalState = "keep",
        sharded: bool = False,
        sync_rules: dict[str, Rule] | None = None,
        ranks_per_worker: int | Literal["node"] = 1,
        tensor_parallel_size: int = 1,
        virtual_workers: int = 1,
        elastic: Membership | None = None,
        eval_weights: EvalWeights | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self._workers = workers_of_process(virtual_workers)
        check_timeout(timeout)
        if eval_weights not in (None, "anchor", "mean"):
            raise ValueError(f"eval_weights must be 'anchor', 'mean' or None, not {eval_weights!r}.")
        self._schedule = as_schedule(local_steps)
        self._outer_optimizer = outer_optimizer
        self._options = SyncOptions(
            density=density,
            selection=selection,
            compression=compression,
            overlap_steps=overlap_steps,
            merge=merge,
            local_state=local_state,
            sharded=sharded,
            sync_rules=sync_rules or {},
        )
        check_combination(self._schedule, outer_optimizer, self._options)
        if elastic is not None:
            reasons = {
                "ranks_per_worker: a worker is one process": ranks_per_worker != 1,
                "virtual_workers, who are all in one process": virtual_workers > 1,
                'eval_weights="mean", for which all would have to come together between syncs': eval_weights == "mean",
            }
            check_elastic(elastic, self._options, worker_speeds, reasons)
            self._workers = ElasticWorker(elastic)
        self.elastic = elastic
        averages = outer_optimizer is None or self._options.effective_selection.partial
        mean = averages and elastic is None
        self._modes = OptimizerModes(self._workers)
        self._global_weights = GlobalWeights(self, self._modes, eval_weights or ("mean" if mean else "anchor"))
        if ranks_per_worker != "node" and (not isinstance(ranks_per_worker, int) or ranks_per_worker < 1):
            raise ValueError(f"ranks_per_worker must be an integer >= 1 or 'node', not {ranks_per_worker!r}.")
        if virtual_workers > 1 and ranks_per_worker != 1:
            raise ValueError(
                "virtual_workers share one process, ranks_per_worker share one worker: give one of the two."
            )
        if virtual_workers > 1 and worker_speeds is not None:
            raise ValueError(
                "virtual_workers take turns, a step each, so that none is faster than another: leave worker_speeds out."
            )
        self._ranks_per_worker: int | Literal["node"] = ranks_per_worker
        if not isinstance(tensor_parallel_size, int) or tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size must be an integer >= 1, not {tensor_parallel_size!r}.")
        self._tensor_parallel_size = tensor_parallel_size
        self._mesh: WorkerMesh | None = None  # of workers whose ranks may share a model
        self._worker_speeds: Speeds = worker_speeds
        check_speeds(worker_speeds)
        self.timeout = timeout
        self.rounds: ProcessRounds | None = None
        self.signals: Signals | None = None
        self.given: dict[str, str] = {}
        self._comm: Communicator | None = None
        self._is_set_up = False
        self._uneven: UnevenInputs | None = None
        self._stepped = False  # an optimizer did, in this batch
        self._step_hook: RemovableHandle | None = None
        self._loaders = ResumableLoaders()
        self._writer = CheckpointWriter(self, self._workers, self._loaders)
        self._resume = Resume(self, self._workers, self._loaders)

    def __repr__(self) -> str:
        known = self.parallel_devices is not None  # K is known as soon as the Trainer has chosen the devices
        num_workers = self.num_workers if known and self.cluster_environment is not None else 0
        return describe(type(self).__name__, num_workers, self._schedule, self._outer_optimizer, self._options)

    # -- processes and workers ------------------------------------------------------------------------------------

    @property
    def num_workers(self) -> int:
        """K: workers of all processes; a worker may be several processes, a process several virtual workers.

        Where workers come and go, the number that there can be: `rounds.comm.num_workers` are there.
        """
        if self.elastic is not None:
            return self.elastic.max_workers
        return self.world_size // self._ranks_of_worker * self._workers.number

    @property
    def num_parts(self) -> int:
        """Number of workers' states in a checkpoint: one of each process, or of each virtual worker."""
        return self.world_size * self._workers.number

    @property
    def own_parts(self) -> range:
        """Numbers of the states that belong to this process."""
        return range(self.global_rank * self._workers.number, (self.global_rank + 1) * self._workers.number)

    @property
    def _ranks_of_worker(self) -> int:
        return max(1, self.num_processes) if self._ranks_per_worker == "node" else self._ranks_per_worker

    @override
    def set_world_ranks(self) -> None:  # called by the Trainer's constructor, before any process is started
        num_processes = self.num_nodes * self.num_processes
        self._workers.check_processes(num_processes)
        count_workers(num_processes, self._ranks_of_worker)
        super().set_world_ranks()

    @override
    def setup_environment(self) -> None:
        if isinstance(self.precision_plugin, FSDPPrecision | DeepSpeedPrecision):
            raise MisconfigurationException(
                f"{type(self).__name__} cannot use {type(self.precision_plugin).__name__}: use Trainer(precision=...) "
                f"instead of that plugin. {FULLY_SHARD}"
            )
        self._is_set_up, self._uneven = False, None
        super().setup_environment()
        if self._is_fitting:
            self._comm = Communicator(self.timeout, self._ranks_of_worker)
        module = self.lightning_module
        if module is not None and self._ranks_per_worker != 1 and is_overridden("configure_model", module):
            self._mesh = WorkerMesh(
                self.root_device, self.num_workers, self._ranks_of_worker, self._tensor_parallel_size
            )
            host.set_device_mesh(module, self._mesh.of_worker)
            trainer = self._trainer
            if self._is_fitting and any(map(host.averages_weights, host.callbacks_of(trainer))):
                host.configure_model(trainer)  # they copy it, and would be the first to find it sharded
                check_islands(trainer, self._workers.number, self._tensor_parallel_size)

    @override
    def setup_distributed(self) -> None:
        host.connect_restarted(self)
        super().setup_distributed()

    @override
    def configure_ddp(self) -> None:
        """Workers of one rank need no wrapper, and no gradient all-reduce; `Rounds` gives all the weights of rank 0."""
        if self.has_islands:
            self._comm = Communicator(self.timeout, self._ranks_of_worker, by_column=True)
        elif self._ranks_of_worker > 1:
            assert self._comm is not None
            host.set_gradient_group(self, self._comm.new_group_inside())
            super().configure_ddp()

    @property
    def has_islands(self) -> bool:
        """Whether the ranks of a worker share one model, by DTensors."""
        return self.lightning_module is not None and has_dtensors(self.lightning_module)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        with self._agreed(f"reduce {reduce_op}", tensor, group):
            return super().reduce(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        with self._agreed(f"all_gather {sync_grads}", tensor, group):
            return super().all_gather(tensor, group, sync_grads)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        with self._agreed(f"broadcast {src}"):
            return super().broadcast(obj, src)

    @override
    def barrier(self, name: str | None = None) -> None:
        if name == "train_dataloader()":  # Lightning has asked for new ones
            self._loaders.unwrap()
        trainer = host.trainer_of(self.lightning_module)
        if trainer is None or not trainer.interrupted:
            with self._agreed(f"barrier {name}"):
                super().barrier(name)  # else the other workers may never come

    @contextmanager
    def _agreed(self, call: str, tensor: Tensor | None = None, group: Any = None) -> Iterator[None]:
        """Make sure that all workers call the same collective of the default process group, before it is called.

        Args:
            call: Text that says which it is.
            tensor: Tensor that is sent, if any.
            group: Process group; a group of some of the workers is not for all to agree on.
        """
        if group in (None, dist.group.WORLD):
            described = "" if tensor is None else f" {tuple(tensor.shape)} {tensor.dtype}"
            self.join(SyncPoint.COLLECTIVE, call + described)
        with explain_lost_worker(self.timeout):
            yield

    # -- start and end of a fit -----------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self._loaders.forget()
        check_islands(trainer, self._workers.number, self._tensor_parallel_size)
        host.materialize(trainer.lightning_module, self.root_device)
        if trainer.state.fn != TrainerFn.FITTING and self.has_islands:
            self._set_up_evaluation(trainer)
            return
        if self._mesh is not None and self.has_islands:
            self._mesh.check_gradients(trainer.lightning_module)
        super().setup(trainer)  # configure_optimizers may set up the data
        if trainer.state.fn != TrainerFn.FITTING:
            return
        schedules = [config.scheduler for config in self.lr_scheduler_configs]
        self.given = given_settings(self.optimizers, schedules)
        self.rounds = self._make_rounds(trainer)
        if not trainer.lightning_module.automatic_optimization:  # torch's own and wrapped optimizers step, too
            self._step_hook = register_optimizer_step_post_hook(self._note_step_of)
        wrappers = trainer.lightning_module.optimizers()
        wrappers = wrappers if isinstance(wrappers, list) else [wrappers]
        self._modes.attach(self.optimizers, wrappers, self._global_weights.moving)
        if self.elastic is not None and self._modes.exist:
            raise MisconfigurationException(
                "An optimizer with a mode for evaluation, such as a schedule-free one, needs the workers' mean when it "
                "changes its mode, and workers that come and go do not come together for that: use another one."
            )
        host.validate_without_inference_mode(trainer)
        host.surround_validation(trainer, self._begin_validation, self._global_weights.end_validation)
        host.enter_while_checkpointing(trainer, self._checkpointing)  # hooks `on_save_checkpoint` see them, too
        place_callbacks(self, host.callbacks_of(trainer))
        self._is_set_up = True

    def _set_up_evaluation(self, trainer: pl.Trainer) -> None:
        """Set up an evaluation without a fit as DDP does, which cannot send DTensors."""
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        comm = Communicator(self.timeout, self._ranks_of_worker, by_column=True)
        comm.broadcast_([local_shard(t) for t in (*self.model.parameters(), *self.model.buffers())])
        self.setup_precision_plugin()

    def _make_rounds(self, trainer: pl.Trainer) -> ProcessRounds:
        if lazy := [name for name, p in trainer.lightning_module.named_parameters() if is_lazy(p)]:
            raise ValueError(
                f"Lazy parameters have no shape yet: {', '.join(lazy)}. Run a batch through the module in "
                "configure_model, so that all workers begin with the same weights."
            )
        refuse_callbacks(trainer, self.num_workers, self._workers.number, elastic=self.elastic is not None)
        make = partial(
            Rounds,
            local_steps=self._schedule,
            outer_optimizer=self._outer_optimizer,
            options=self._options,
            worker_speeds=self._worker_speeds,
        )
        local = self.optimizers[0] if len(self.optimizers) == 1 else JointOptimizer(self.optimizers)
        assert self._comm is not None
        return self._workers.make_rounds(make, trainer, local, self._comm, self.timeout)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        trainer, rounds = self._trainer, self._present_rounds
        self._resume.start(trainer)
        if not self._resume.goes_on:
            rounds.step_idx = _steps_so_far(trainer)
        if not (self._resume.goes_on and self._modes.exist):  # which may have been saved in the mode for evaluation
            rounds.adopt_replaced(at_start=True)
        self.signals = Signals(trainer, self.broadcast(uuid.uuid4().hex))
        self._uneven = UnevenInputs(trainer, rounds, self.signals)
        rounds.total_steps = self._uneven.total_steps()
        self._workers.meet(self._resume)
        if self.num_workers == 1:
            rank_zero_info(
                "There is one worker (K = 1): nothing is communicated, and a round ends with the outer step alone."
            )

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        several = self._present_rounds.comm.num_workers > 1
        if several and not self._trainer.interrupted:  # after the hooks of all callbacks and the module
            with explain_lost_worker(self.timeout):
                self._present_rounds.sync_unstepped()

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self.rounds is not None:
            self.rounds.abandon_round()
        if self.elastic is not None:
            self.elastic.close()

    @override
    def teardown(self) -> None:
        self._resume.clear()
        self._modes.detach()
        if self._step_hook is not None:
            self._step_hook.remove()
        self._loaders.unwrap()
        self._loaders.forget()
        trainer = host.trainer_of(self.lightning_module)
        host.destroy_process_group_at_exit(trainer is not None and not trainer.interrupted)
        if self._mesh is None or self.model is None or self.model is not self.lightning_module:
            super().teardown()
            return
        # As in `ModelParallelStrategy` a sharded model stays on its mesh; parts of it may still be gathered.
        reshard(self.model)
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        for part in (self.cluster_environment, self.precision_plugin, self.accelerator, self.checkpoint_io):
            part.teardown()

    @property
    def optimizers(self) -> list[Optimizer]:
        """Optimizers of the fit; they can be given groups, and not be replaced."""
        return super().optimizers

    @optimizers.setter
    @override
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        if self._is_set_up and self._is_training and [*map(id, optimizers)] != [*map(id, self.optimizers)]:
            raise MisconfigurationException(
                "The optimizers of a fit cannot be replaced, as rounds and outer steps follow the present ones. Change "
                "their groups (lr, optimizer.add_param_group) and states, or fit again with others."
            )
        DDPStrategy.optimizers.fset(self, optimizers)  # pyright: ignore[reportOptionalCall]

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @property
    def _present_rounds(self) -> ProcessRounds:
        assert self.rounds is not None
        return self.rounds

    @property
    def _is_fitting(self) -> bool:
        trainer = host.trainer_of(self.lightning_module)
        return trainer is not None and trainer.state.fn == TrainerFn.FITTING

    @property
    def _is_training(self) -> bool:  # and does not validate within a fit
        return self._is_fitting and self._trainer.training

    # -- data -----------------------------------------------------------------------------------------------------

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        own = super().distributed_sampler_kwargs
        if self._mesh is not None and self.has_islands:
            return self._mesh.sampler_kwargs()
        return self._workers.sampler_kwargs(own) if self._is_training else own

    @override
    def process_dataloader(self, dataloader: object) -> object:
        if not self._is_training:
            return super().process_dataloader(dataloader)
        self._workers.interleave(dataloader)
        loader = super().process_dataloader(dataloader)
        self._loaders.wrap(loader, host.epochs_done(self._trainer), self._workers.number)
        return self._workers.loader_of_first(loader)

    # -- steps ----------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._resume.begin_batch(self._trainer)
        if self._uneven is not None:
            self._uneven.begin_batch()
        if not self._modes.evaluating:
            with explain_lost_worker(self.timeout):
                self._present_rounds.adopt_replaced()
        self._workers.begin_batch(self._trainer, batch, batch_idx)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._stepped = False
        with explain_shards():
            output = self._workers.training_step(partial(super().training_step, **kwargs), self._trainer, args)
        if self._stepped and not self._trainer.lightning_module.automatic_optimization:
            self._end_step()  # once per batch, however many optimizers stepped
        return output

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with explain_shards():
            return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with explain_shards():
            return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with explain_shards():
            return super().predict_step(*args, **kwargs)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self._comm is not None and self._comm.inside_size > 1:
            # Parts without gradients are still gathered: `parameters()` would not be those that an optimizer has.
            assert self.model is not None
            reshard(self.model)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        step = partial(super().optimizer_step, optimizer, closure, model, **kwargs)
        output = self._workers.optimizer_step(step, self._trainer)
        self._note_step()
        if self._trainer.lightning_module.automatic_optimization:
            self._end_step()
        return output

    def _note_step(self) -> None:
        self._stepped = True

    def _note_step_of(self, optimizer: Optimizer, *_: Any) -> None:
        """Note the step of an optimizer of this fit, or of one inside of it, which some call themselves (SAM)."""
        if optimizer in self.optimizers or _parameters(optimizer) & set().union(*map(_parameters, self.optimizers)):
            self._note_step()

    def _end_step(self) -> None:
        with explain_lost_worker(self.timeout):
            self._present_rounds.step()  # attempts count: all ranks make as many

    def call_batch_end_hooks(self, batch_idx: int) -> None:
        """Call the module's hook of a batch's end for all workers of this process but the first.

        Args:
            batch_idx: Index of the batch in its epoch.
        """
        self._workers.end_batch(self._trainer, batch_idx)

    def end_batch(self) -> None:
        """Act on signals, and meet workers that come and go, after the hooks of all callbacks."""
        assert self.signals is not None
        assert self._uneven is not None
        self._workers.act(self.signals, self._uneven.common_step())

    # -- global weights -------------------------------------------------------------------------------------------

    def join(self, point: SyncPoint, call: str = "") -> None:
        """Come together with the other workers, or learn that they are elsewhere.

        Args:
            point: Point that this worker has come to.
            call: Text that says what comes next, the same on all workers.
        """
        if self._comm is None or not self._is_fitting or self._trainer.interrupted:
            return
        moved = self._modes.evaluating and self._uneven is not None and self._uneven.may_sync(point)
        with explain_lost_worker(self.timeout, f"the {point.value}"):
            try:
                with self._modes.in_training() if moved else nullcontext():
                    self._join(point, call)
            except DisagreementError as error:
                raise DisagreementError(f"{error} Here it is: {call}." if call else str(error)) from None

    def _join(self, point: SyncPoint, call: str) -> None:
        assert self._comm is not None
        if self._uneven is not None:
            self._uneven.join(point, call)
        elif self._is_set_up and self.world_size > 1:  # before the first batch all are together
            validates = point is SyncPoint.COLLECTIVE and self._trainer.sanity_checking
            place = SyncPoint.COLLECTIVE_IN_VALIDATION if validates else point
            self._present_rounds.check(place, call=digest(call))
        elif not self._is_set_up:  # there are no rounds yet
            self._comm.agree(self.root_device, {CALL: digest(call)})

    def _begin_validation(self) -> None:
        self.join(SyncPoint.VALIDATION)
        sync_weight_averages(self._trainer, self.rounds, self.timeout, self.join)
        self._global_weights.begin_validation()

    def abandon_validation(self) -> None:
        """Give the module this worker's own weights back after an exception."""
        self._global_weights.abandon()

    def check_steps(self) -> None:
        """Say that nothing was synced in a fit.

        Raises:
            MisconfigurationException: Although weights have changed.
        """
        rounds = self._present_rounds
        if rounds.last_report is not None:
            return
        if self.num_workers > 1 and not self._modes.exist and rounds.sync.replaced(thorough=True):
            raise MisconfigurationException(
                "Weights changed in this fit, but no optimizer of configure_optimizers took a step: nothing was "
                "synced, and each worker has its own. Step them by self.optimizers()."
            )
        rank_zero_info("Nothing was synced in this fit: no optimizer took a step.")

    def average_modes(self) -> None:
        """Let all workers end with the same weights in both modes of an optimizer that has modes."""
        if self._modes.exist and not self._trainer.interrupted:
            with explain_lost_worker(self.timeout):
                self._present_rounds.average_workers()

    def adopt_weights(self) -> None:
        """Take the weights in the module as the global ones; all workers must call it, with the same weights.

        It is called for you at the start of a fit and before the first step of each round, where a change is noticed.
        Call it yourself after you replaced weights at any other time of a fit: see `Rounds.adopt`.

        Raises:
            DisagreementError: The workers' weights differ, or some worker does not call it.
        """
        if self.rounds is not None:
            with explain_lost_worker(self.timeout):
                self.rounds.adopt()

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self._is_fitting:
            self._workers.zero_gradients(self._trainer)

    @contextmanager
    def global_weights(self) -> Iterator[None]:
        """Show the global weights in the module for a while, for an export in a hook for example.

        With `eval_weights="mean"`, and in an optimizer's mode for evaluation, all workers must enter it, since their
        mean is computed. Outside of a fit, and where the global weights are shown already, nothing happens.

        Example:
            >>> strategy = LocalSGD(local_steps=16)
            >>> with strategy.global_weights():
            ...     pass  # torch.save(module.state_dict(), "export.pt")
        """
        with self._global_weights.shown():
            yield

    @contextmanager
    def _checkpointing(self, weights_only: bool) -> Iterator[None]:
        """Show the global weights while a checkpoint is put together, to hooks `on_save_checkpoint`, too."""
        self.join(SyncPoint.CHECKPOINT, f"weights_only={weights_only}")
        with self.global_weights():
            yield

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        with self.global_weights():
            if self.has_islands:
                if self._trainer.interrupted:
                    raise CheckpointError(NOT_AFTER_EXCEPTION)
                return full_state_dict(self._trainer.lightning_module)
            return super().lightning_module_state_dict()

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self.has_islands:
            host.materialize(self._trainer.lightning_module, self.root_device)
            load_full_state_dict(self._trainer.lightning_module, checkpoint["state_dict"], strict=strict)
        else:
            super().load_model_state_dict(checkpoint, strict=strict)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        return host.checkpoint_io_of(self, AtomicCheckpointIO)

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        host.set_checkpoint_io(self, io)

    @property
    def part_io(self) -> CheckpointIO:
        """Reader and writer of parts in files of their own: the user's `CheckpointIO`, without its wrappers."""
        return host.innermost_checkpoint_io(self.checkpoint_io)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        write = partial(super().save_checkpoint, checkpoint, filepath, storage_options=storage_options)
        if self.rounds is None or "optimizer_states" not in checkpoint:  # weights alone
            write()
            return
        assert self._comm is not None
        automatic = self._trainer.lightning_module.automatic_optimization
        accumulating = host.accumulates_gradients(self._trainer) if automatic else not self._stepped
        self._writer.write(
            self._trainer, self.rounds, self._comm, checkpoint, filepath, write, accumulating=accumulating
        )

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        self._writer.remove_files(filepath)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint_path = self.broadcast(checkpoint_path)  # "best" may be another name where steps are unequal
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if self._is_fitting:
            self._resume.read(checkpoint, checkpoint_path, weights_only)
        return checkpoint

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        checkpoint = dict(checkpoint)
        self._resume.prepare(self._trainer, self._present_rounds, checkpoint)
        super().load_optimizer_state_dict(checkpoint)
        self._resume.restore(self._trainer, self._present_rounds, checkpoint)

    # -- registry -------------------------------------------------------------------------------------------------

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork")):
            strategy_registry.register(
                f"{cls.strategy_name}{suffix}",
                cls,
                description=f"{cls.__name__} with `start_method` '{start_method}'",
                start_method=start_method,
            )


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _steps_so_far(trainer: pl.Trainer) -> int:
    """The local steps before this fit: with manual optimization `global_step` counts every optimizer."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return host.batches_begun(trainer, in_run=True)
