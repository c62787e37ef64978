"""The workers of one process: a single one, or K that take turns in the module, each on its own batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from typing_extensions import override

from lightning_lopt.comm import Communicator
from lightning_lopt.rounds import Rounds
from lightning_lopt.strategies import host
from lightning_lopt.strategies.signals import Signals
from lightning_lopt.sync.replica import OptimizerLike
from lightning_lopt.sync.report import RoundReport
from lightning_lopt.sync.rules import Rule
from lightning_lopt.sync.status import SyncPoint
from lightning_lopt.sync.sync import EvalWeights, Sync
from lightning_lopt.virtual.rounds import VirtualRounds
from lightning_lopt.virtual.shared_module import SharedModule
from lightning_lopt.virtual.worker_batches import FirstWorkerLoader, interleave
from lightning_lopt.worker_speeds import WorkerSpeeds

if TYPE_CHECKING:
    from lightning_lopt.strategies.checkpoint.resume import Resume


class ProcessRounds(Protocol):
    """The rounds of the workers of one process: `Rounds` of one, `VirtualRounds` of several.

    Methods are for all of these workers, attributes are those of the first. See `Rounds` for their meaning.
    """

    @property
    def step_idx(self) -> int: ...
    @step_idx.setter
    def step_idx(self, value: int, /) -> None: ...
    @property
    def total_steps(self) -> int | None: ...
    @total_steps.setter
    def total_steps(self, value: int | None, /) -> None: ...
    @property
    def equal_steps(self) -> bool: ...
    @equal_steps.setter
    def equal_steps(self, value: bool, /) -> None: ...
    @property
    def round_idx(self) -> int: ...
    @property
    def local_step(self) -> int: ...
    @property
    def last_report(self) -> RoundReport | None: ...
    @property
    def listeners(self) -> list[Callable[[RoundReport], object]]: ...
    @property
    def comm(self) -> Communicator: ...
    @property
    def sync(self) -> Sync: ...
    @property
    def speeds(self) -> WorkerSpeeds: ...

    def step(self) -> bool: ...
    def check(
        self,
        point: SyncPoint,
        *,
        batches: int | None = ...,
        call: int | None = ...,
        stops: bool = ...,
        uneven: bool = ...,
    ) -> None: ...
    def join(self, point: SyncPoint = ..., *, last: bool = ..., stops: bool = ...) -> None: ...
    def finish_round(self) -> None: ...
    def swap_in(self, weights: EvalWeights, *, moved: bool = ...) -> None: ...
    def swap_out(self) -> None: ...
    def undo_rounding(self) -> None: ...
    def sync_unstepped(self) -> None: ...
    def average_workers(self) -> None: ...
    def rules(self) -> dict[str, Rule]: ...
    def adopt(self) -> None: ...
    def adopt_replaced(self, *, at_start: bool = ...) -> bool: ...
    def abandon_round(self) -> None: ...
    def state_dict(self, *, alone: bool = ...) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def local_state(self) -> dict[str, Any]: ...
    def load_local_state(self, state: dict[str, Any]) -> None: ...


class ProcessWorkers:
    """The work of a strategy for each worker of its process, where Lightning does it once: here for a single worker.

    Attributes:
        number: Number of workers of this process.
    """

    number: int = 1

    def check_processes(self, number: int) -> None:
        """Refuse a number of processes that cannot be.

        Raises:
            MisconfigurationException: Several processes with several workers each.
        """

    def make_rounds(
        self,
        make: Callable[..., Rounds],
        trainer: pl.Trainer,
        optimizer: OptimizerLike,
        comm: Communicator,
        timeout: timedelta | None,
    ) -> ProcessRounds:
        """Make the rounds of these workers.

        Args:
            make: Function that makes one worker's rounds from a model, an optimizer, and a communicator.
            trainer: Trainer whose module and optimizers are ready.
            optimizer: The local optimizer, or several as one.
            comm: Collectives of the processes.
            timeout: Time limit for workers that wait for each other.
        """
        return make(trainer.lightning_module, optimizer, comm=comm)

    def sampler_kwargs(self, own: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the training loaders' `DistributedSampler`.

        Args:
            own: Arguments for a process that is one worker.
        """
        return own

    def interleave(self, loader: Any) -> None:
        """Let a training loader go through the batches of all these workers."""

    def loader_of_first(self, loader: Any) -> Any:
        """Return a training loader as the first worker sees it."""
        return loader

    def begin_batch(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        """Take the other workers' batches, and call `on_train_batch_start` of the module for them."""

    def optimizer_step(self, step: Callable[[], Any], trainer: pl.Trainer) -> Any:
        """Take a step of the optimizer for each worker; return the first worker's output."""
        return step()

    def training_step(self, step: Callable[..., Any], trainer: pl.Trainer, args: Sequence[Any]) -> Any:
        """Call `training_step` for the worker whose turn it is, or, with manual optimization, for each.

        Args:
            step: Function that calls the module's hook.
            trainer: Trainer in a fit.
            args: Arguments of the hook; the first of them is the first worker's batch.
        """
        return step(*args)

    def end_batch(self, trainer: pl.Trainer, batch_idx: int) -> None:
        """Call `on_train_batch_end` of the module for all workers but the first, for whom Lightning calls it."""

    def turns(self) -> Iterator[int]:
        """Give every worker of this process a turn in the module; within a worker's turn, that one alone."""
        yield 0

    def zero_gradients(self, trainer: pl.Trainer) -> None:
        """Delete the other workers' gradients before a validation, where Lightning deletes the first worker's."""

    def parts(self, trainer: pl.Trainer, first: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the part of a checkpoint of each worker.

        Args:
            trainer: Trainer in a fit.
            first: Part of the first worker.
        """
        return [first]

    def check_parts(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Refuse parts of a checkpoint that these workers cannot go on from.

        Raises:
            ValueError: Workers that take turns had taken unequal numbers of steps.
        """

    def load_parts(
        self, trainer: pl.Trainer, parts: Sequence[Mapping[str, Any]], checkpoint: Mapping[str, Any]
    ) -> None:
        """Restore all workers but the first, whom Lightning and `Rounds.load_local_state` restore.

        Args:
            trainer: Trainer in a fit.
            parts: Part of each worker; none to give the others the first one's state.
            checkpoint: Checkpoint with the first worker's states.
        """

    def load_gradients(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Restore the gradients that all workers but the first were accumulating."""

    def meet(self, resume: Resume) -> None:
        """Come to the workers of other processes at the start of a fit, when all is ready for its first batch.

        Args:
            resume: Checkpoint that the fit goes on from, if any.
        """

    def act(self, signals: Signals, step: int | None) -> None:
        """Act on signals at the end of a batch, when its step is over on this worker.

        Args:
            signals: Signals of the fit.
            step: Number of this step that all workers come to, None where they cannot wait for each other.
        """
        signals.act(step)


class VirtualWorkers(ProcessWorkers):
    """K workers in one process, on one device.

    The Trainer counts steps, logs and calls callbacks as rank 0 of K processes would; the module's hooks of one batch,
    from its transfer to `on_train_batch_end`, are called for each worker, with its weights in the module.

    Args:
        number: K >= 2.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._module_and_rounds: tuple[SharedModule, VirtualRounds] | None = None  # of the present fit
        self._batches: list[Any] = []  # of each worker, in the present step
        self._outputs: dict[int, Any] = {}

    @override
    def check_processes(self, number: int) -> None:
        if number > 1:
            raise MisconfigurationException(
                f"virtual_workers={self.number} live in one process, and this Trainer has {number}. Use "
                "Trainer(devices=1, num_nodes=1), or leave virtual_workers out: each process is a worker then."
            )

    @override
    def make_rounds(
        self,
        make: Callable[..., Rounds],
        trainer: pl.Trainer,
        optimizer: OptimizerLike,
        comm: Communicator,
        timeout: timedelta | None,
    ) -> ProcessRounds:
        module, precision = trainer.lightning_module, trainer.precision_plugin
        if any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
            raise ValueError("SyncBatchNorm needs real processes, not virtual_workers: use BatchNorm.")
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise ValueError("virtual_workers cannot share a dataloader_iter: let training_step take a batch.")
        shared = SharedModule(
            module,
            trainer.optimizers,
            self.number,
            gradients=not module.automatic_optimization,
            others=[(precision, "scaler")] if getattr(precision, "scaler", None) else [],
        )
        self._module_and_rounds = shared, VirtualRounds(make, shared, optimizer, timeout)
        return self._rounds

    @property
    def _shared_module(self) -> SharedModule:
        assert self._module_and_rounds is not None
        return self._module_and_rounds[0]

    @property
    def _rounds(self) -> VirtualRounds:
        assert self._module_and_rounds is not None
        return self._module_and_rounds[1]

    # -- data -----------------------------------------------------------------------------------------------------

    @override
    def sampler_kwargs(self, own: dict[str, Any]) -> dict[str, Any]:
        return {"num_replicas": self.number, "rank": 0}

    @override
    def interleave(self, loader: Any) -> None:
        interleave(loader, self.number)

    @override
    def loader_of_first(self, loader: Any) -> Any:
        return FirstWorkerLoader(loader, self.number)

    # -- steps ----------------------------------------------------------------------------------------------------

    @override
    def begin_batch(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        module = trainer.lightning_module
        if module.automatic_optimization and trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "virtual_workers take a step with every batch: set accumulate_grad_batches=1 and a larger batch_size, "
                "or accumulate with manual optimization."
            )
        loaders = host.train_loaders(trainer) or []
        others = [d.others.popleft() if d.others else [None] * (self.number - 1) for d in loaders]
        self._batches = [batch, *(host.transfer_batch(trainer, leaves) for leaves in zip(*others, strict=True))]
        if is_overridden("on_train_batch_start", module):
            for rank in self._shared_module.others():
                host.call_module_hook(trainer, "on_train_batch_start", self._batches[rank], batch_idx)

    @override
    def optimizer_step(self, step: Callable[[], Any], trainer: pl.Trainer) -> Any:
        if not trainer.lightning_module.automatic_optimization:
            return step()  # within the turn of a training_step
        output = None
        for _ in self._shared_module.turns():  # each calls the closure, and that training_step
            output = step()
        return output

    @override
    def training_step(self, step: Callable[..., Any], trainer: pl.Trainer, args: Sequence[Any]) -> Any:
        if trainer.lightning_module.automatic_optimization:
            return self._training_step(step, *args)
        output, before = None, _manual_progress(trainer)
        for _ in self._shared_module.turns():
            _set_manual_progress(trainer, before)
            output = self._training_step(step, *args)
        return output

    def _training_step(self, step: Callable[..., Any], batch: Any, *args: Any) -> Any:
        rank = self._shared_module.active
        self._outputs[rank] = step(self._batches[rank] if rank else batch, *args)
        return self._outputs[rank]

    @override
    def end_batch(self, trainer: pl.Trainer, batch_idx: int) -> None:
        module = trainer.lightning_module
        if is_overridden("on_train_batch_end", module):
            for rank in self._shared_module.others():
                outputs = self._outputs[rank]
                if module.automatic_optimization:
                    outputs = host.as_hook_outputs(outputs)
                host.call_module_hook(trainer, "on_train_batch_end", outputs, self._batches[rank], batch_idx)
        self._batches, self._outputs = [], {}

    @override
    def turns(self) -> Iterator[int]:
        active = self._shared_module.active
        yield from [active] if active else self._shared_module.turns()

    @override
    def zero_gradients(self, trainer: pl.Trainer) -> None:
        if trainer.lightning_module.automatic_optimization:  # there is one gradient for all
            return
        if trainer.validating and not host.accumulates_gradients(trainer):
            for _ in self._shared_module.others():
                host.call_module_hook(trainer, "on_validation_model_zero_grad")

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @override
    def parts(self, trainer: pl.Trainer, first: dict[str, Any]) -> list[dict[str, Any]]:
        parts, precision = [first], trainer.precision_plugin
        plugin = type(precision).__qualname__
        for rank in self._shared_module.others():
            own = {**first["checkpoint"], "optimizer_states": [o.state_dict() for o in trainer.optimizers]}
            if plugin in own:
                own[plugin] = precision.state_dict()
            gradients = self._shared_module.gradients(rank) if first["gradients"] else {}
            local = self._rounds.workers[rank].local_state()
            parts.append({**first, "checkpoint": own, "local": local, "gradients": gradients})
        return parts

    @override
    def check_parts(self, parts: Sequence[Mapping[str, Any]]) -> None:
        steps = {part["local"]["step_idx"] for part in parts}
        if len(steps) > 1:
            raise ValueError(
                f"The checkpoint's workers have taken between {min(steps)} and {max(steps)} steps, and virtual_workers "
                "take turns, a step each. Resume with processes (Trainer(devices=K) without virtual_workers), or begin "
                "anew from its weights: load_from_checkpoint."
            )

    @override
    def load_parts(
        self, trainer: pl.Trainer, parts: Sequence[Mapping[str, Any]], checkpoint: Mapping[str, Any]
    ) -> None:
        precision = trainer.precision_plugin
        plugin = type(precision).__qualname__
        for rank in self._shared_module.others():
            saved = parts[rank]["checkpoint"] if parts else checkpoint
            for optimizer, state in zip(trainer.optimizers, saved["optimizer_states"], strict=True):
                optimizer.load_state_dict(copy.deepcopy(state))
                host.optimizer_to_device(optimizer, trainer.strategy.root_device)
            if plugin in saved:
                precision.load_state_dict(saved[plugin])
            if parts:
                self._rounds.workers[rank].load_local_state(parts[rank]["local"])
                self._shared_module.show()

    @override
    def load_gradients(self, parts: Sequence[Mapping[str, Any]]) -> None:
        for rank, part in enumerate(parts):
            if rank > 0 and part.get("gradients"):
                self._shared_module.set_gradients(rank, part["gradients"])


def workers_of_process(virtual_workers: int) -> ProcessWorkers:
    """Return the workers of this process.

    Args:
        virtual_workers: Number of workers.

    Raises:
        ValueError: The number is not an integer >= 1.
    """
    if isinstance(virtual_workers, bool) or not isinstance(virtual_workers, int) or virtual_workers < 1:
        raise ValueError(f"virtual_workers must be an integer >= 1, not {virtual_workers!r}.")
    return ProcessWorkers() if virtual_workers == 1 else VirtualWorkers(virtual_workers)


def _manual_progress(trainer: pl.Trainer) -> tuple[list[Any], dict[str, Any]]:
    """Return what a `training_step` with manual optimization moves on and all workers share."""
    schedulers = [config.scheduler.state_dict() for config in trainer.strategy.lr_scheduler_configs]
    return copy.deepcopy(schedulers), host.manual_progress(trainer)


def _set_manual_progress(trainer: pl.Trainer, before: tuple[list[Any], dict[str, Any]]) -> None:
    """Restore what `_manual_progress` returned."""
    schedulers, steps = before
    for config, state in zip(trainer.strategy.lr_scheduler_configs, copy.deepcopy(schedulers), strict=True):
        config.scheduler.load_state_dict(state)
    host.set_manual_progress(trainer, steps)
