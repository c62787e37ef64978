"""LocalSGD: DDP's launching and process groups, with rounds of local steps instead of gradient syncs."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import DeepSpeedPrecision, FSDPPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.constants import default_pg_timeout
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lopt.agreement import Place
from lightning_lopt.comm import Communicator
from lightning_lopt.compression import Codec
from lightning_lopt.functional.merge import MergeRule
from lightning_lopt.pace import WorkerSpeeds, check_speeds
from lightning_lopt.rounds import Rounds, check_combination
from lightning_lopt.schedules import RoundInfo, as_schedule
from lightning_lopt.selection import Selection
from lightning_lopt.strategies.averaging import refuse_averaging
from lightning_lopt.strategies.faults import SignalCallback, Signals, explained
from lightning_lopt.strategies.joint import JointOptimizer
from lightning_lopt.strategies.loaders import ResumableLoaders
from lightning_lopt.strategies.rendezvous import Rendezvous, RoundCallback
from lightning_lopt.strategies.virtual import VirtualWorkersStrategy
from lightning_lopt.sync import EvalWeights
from lightning_lopt.travel import LocalState, Travel


class LocalSGD(VirtualWorkersStrategy):
    r"""Local SGD: every worker takes H local steps, then all continue from the average of their parameters.

    .. math:: a \leftarrow \mathrm{Outer}\big(a,\; a - \tfrac1K \sum_i y_i\big), \qquad y_i \leftarrow a

    a is the anchor (the global parameters), y_i worker i's parameters; without an outer optimizer a becomes the
    mean itself. Between syncs nothing at all is communicated. With manual optimization a local step is a batch in
    which any optimizer stepped, so that a GAN's two optimizers share their rounds.

    Args:
        local_steps: H >= 1 in optimizer steps, or a schedule (`QSR`, or a callable from `RoundInfo` to an integer);
            begin with 16, or the least with which a sync costs a tenth of the time.
        outer_optimizer: makes a torch optimizer from parameter groups, whose `.grad` is the averaged
            pseudo-gradient, e.g. `partial(torch.optim.AdamW, lr=1e-3)`; None averages.
        density: share of the coordinates that a sync sends, in (0, 1], drawn anew in every round.
        selection: instead of a density: `Fragments(...)`, or any `Selection`.
        compression: `"bf16"`, `"int8"`, `TopK(...)` or any `Codec`, with error feedback; None for float32.
        overlap_steps: Q >= 0 of the H local steps are taken while the sync is in flight, at most H - 1.
        merge: how a sync lands that was in flight: `"delay_corrected"`, `"overwrite"`, or a number α in [0, 1], the
            weight of the worker's own parameters in a blend, also without overlap.
        worker_speeds: one positive number per worker, or `"measured"`: the fastest takes H steps in a round, the others
            in proportion, so that nobody waits; they meet at the ends of epochs. None is H for all.
        local_state: what becomes of the local optimizer's state at a sync: `"keep"`, `"reset"` or `"average"`.
        sharded: each worker does the outer step of some tensors and holds their outer state alone; LAgg-A then costs
            the bytes of an all-reduce.
        ranks_per_worker: consecutive processes that are one worker, or `"node"` for all on a node: their gradients are
            averaged in every step, on the fast link between them; rounds are between workers.
        virtual_workers: K workers take turns in one process on one device, each on a batch of its own in every step.
        eval_weights: what validation and checkpoints see in mid-round: `"anchor"`, the last synced weights, without
            communication, or `"mean"`, the workers' present average; None means the mean for plain averaging and
            where a sync sends only a part, else the anchor. After an exception it is always the anchor.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin: usually left to the
            Trainer.
        process_group_backend: `"gloo"`, `"nccl"`, ...; by default what fits the device.
        timeout: after which a collective fails that some worker does not join.
        start_method: how the Trainer starts worker processes: `"popen"`, `"spawn"`, `"fork"` or `"forkserver"`.

    Attributes:
        rounds: the `Rounds` of the present fit, None before.

    Raises:
        ValueError: an argument out of its range, arguments that exclude each other, nothing to train, or lazy
            parameters without a shape.
        TypeError: `outer_optimizer` cannot be called with parameters.
        MisconfigurationException: a plugin of FSDP or DeepSpeed.

    Memory: 4 bytes per parameter for the anchor and what the outer optimizer has, 4 more during a sync, 8 with overlap;
    4 for error feedback, and 4 more in its syncs. Sends 2(K-1)/K × 4 bytes per parameter and round, or what `density`,
    `selection` and `compression` leave of it. Fails when H is so large that workers drift into different basins: watch
    `RoundMonitor`'s drift.

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
        compression: str | Codec | None = None,
        overlap_steps: int = 0,
        merge: MergeRule = "delay_corrected",
        worker_speeds: list[float] | Literal["measured"] | None = None,
        local_state: LocalState = "keep",
        sharded: bool = False,
        ranks_per_worker: int | Literal["node"] = 1,
        virtual_workers: int = 1,
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
            virtual_workers,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        if outer_optimizer is not None and (not callable(outer_optimizer) or isinstance(outer_optimizer, Optimizer)):
            raise TypeError(
                "outer_optimizer must make an optimizer from parameters, as partial(torch.optim.SGD, lr=0.7) does, not "
                f"{outer_optimizer!r}."
            )
        if eval_weights not in (None, "anchor", "mean"):
            raise ValueError(f"eval_weights must be 'anchor', 'mean' or None, not {eval_weights!r}.")
        self._schedule = as_schedule(local_steps)
        self._outer_optimizer = outer_optimizer
        self._travel = Travel(density, selection, compression, overlap_steps, merge, local_state, sharded)
        check_combination(self._schedule, outer_optimizer, self._travel)
        mean = outer_optimizer is None or self._travel.picks.partial
        self._eval_weights: EvalWeights = eval_weights or ("mean" if mean else "anchor")
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
        self._worker_speeds: WorkerSpeeds = worker_speeds
        check_speeds(worker_speeds)
        self.signals: Signals | None = None
        self._rendezvous: Rendezvous | None = None

    # -- setup ----------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        if isinstance(self.precision_plugin, FSDPPrecision | DeepSpeedPrecision):
            raise MisconfigurationException(
                f"{type(self).__name__} keeps whole models on its workers and cannot use "
                f"{type(self.precision_plugin).__name__}. Use Trainer(precision=...) instead of that plugin."
            )
        super().setup_environment()

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self._loaders = ResumableLoaders()  # configure_optimizers may set up the data
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        module = trainer.lightning_module
        optimizers = self.optimizers
        if lazy := [name for name, p in module.named_parameters() if is_lazy(p)]:
            raise ValueError(
                f"Lazy parameters have no shape yet: {', '.join(lazy)}. Run a batch through the module in "
                "configure_model, so that all workers begin with the same weights."
            )
        local = optimizers[0] if len(optimizers) == 1 else cast(Optimizer, JointOptimizer(optimizers))
        refuse_averaging(trainer, self._comm.num_workers, self._at_once)
        make = partial(
            Rounds,
            local_steps=self._schedule,
            outer_optimizer=self._outer_optimizer,
            travel=self._travel,
            worker_speeds=self._worker_speeds,
        )
        self.rounds = self._make_rounds(make, module, local, self._comm)
        self._rendezvous = None
        if not module.automatic_optimization:
            for optimizer in optimizers:  # sees those who step torch's own optimizer, too
                optimizer.register_step_post_hook(self._note_step)
        self._resumed = False
        callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        others = [c for c in callbacks if not isinstance(c, RoundCallback | SignalCallback)]
        callbacks[:] = [RoundCallback(self), *others, SignalCallback()]

    @override
    def configure_ddp(self) -> None:
        """Workers of one rank need no wrapper, and no gradient all-reduce; `Rounds` gives all the weights of rank 0."""
        self._comm = Communicator(self._timeout, self._ranks_inside)
        if self._ranks_inside > 1:
            self._ddp_kwargs["process_group"] = self._comm.new_group_inside()
            super().configure_ddp()

    @property
    def _ranks_inside(self) -> int:
        return self.num_processes if self._ranks_per_worker == "node" else self._ranks_per_worker

    @property
    @override
    def _num_sending(self) -> int:
        return self.num_workers // self._ranks_inside

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        trainer = self._trainer
        assert self.rounds is not None
        if not self._resumed:
            self.rounds.step_idx = self._steps_so_far(trainer)
        self._rendezvous = Rendezvous(trainer, self.rounds)
        self.rounds.total_steps = self._rendezvous.total_steps()
        if self.rounds.comm.num_workers == 1:
            rank_zero_info(
                "There is one worker (K = 1): nothing is communicated, and a round ends with the outer step alone."
            )
        self.signals = Signals(trainer, self.broadcast(uuid.uuid4().hex), self._rendezvous.clock)

    # -- steps ----------------------------------------------------------------------------------------------------

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._note_step()
        if self._trainer.lightning_module.automatic_optimization:
            self._tick()
        return output

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._stepped = False
        output = super().training_step(*args, **kwargs)
        if self._stepped and not self._trainer.lightning_module.automatic_optimization:
            self._tick()  # once per batch, however many optimizers stepped
        return output

    def _note_step(self, *_: Any) -> None:
        self._stepped = True

    def _tick(self) -> None:
        assert self.rounds is not None
        with explained(self._timeout):
            self.rounds.step()  # attempts count: all ranks make as many

    @staticmethod
    def _steps_so_far(trainer: pl.Trainer) -> int:
        """Local steps before this fit: with manual optimization `global_step` counts every optimizer."""
        if trainer.lightning_module.automatic_optimization:
            return trainer.global_step
        return trainer.fit_loop.total_batch_idx + 1

    # -- global weights -------------------------------------------------------------------------------------------

    def meet(self, place: Place) -> None:
        """Wait for the other workers, if they may be unequally far."""
        if self._rendezvous is None:
            return
        if self._trainer.state.fn == TrainerFn.FITTING and not self._trainer.interrupted:
            with explained(self._timeout):
                self._rendezvous.meet(place)

    def swap_in_global_weights(self) -> None:
        """Show the global weights to whoever evaluates or saves, until `on_validation_end`."""
        if self.rounds is not None and self._trainer.state.fn == TrainerFn.FITTING:
            with explained(self._timeout):
                self.rounds.swap_in("anchor" if self._trainer.interrupted else self._eval_weights)

    @override
    def on_validation_end(self) -> None:
        if self.rounds is not None:
            self.rounds.swap_out()
        super().on_validation_end()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self.rounds is None or self.rounds.sync.swap.active:
            return super().lightning_module_state_dict()
        self.meet("checkpoint")
        self.swap_in_global_weights()
        try:
            return super().lightning_module_state_dict()
        finally:
            self.rounds.swap_out()

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self.rounds is not None:
            self.rounds.abandon_round()

    # -- processes ------------------------------------------------------------------------------------------------

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        self.meet("collective within a batch")
        return super().reduce(tensor, group, reduce_op)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        self.meet("collective within a batch")
        return super().broadcast(obj, src)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        module = self.lightning_module
        if module is None or module._trainer is None or not module.trainer.interrupted:
            super().barrier(*args, **kwargs)  # else the other workers may never come

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
