"""K workers in one process, on one device: in every step they take turns in the module, each on its own batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_unflatten
from typing_extensions import override

from lightning_lopt.comm import Communicator
from lightning_lopt.rounds import Rounds
from lightning_lopt.strategies.checkpoint.strategy import CheckpointingStrategy
from lightning_lopt.virtual.rounds import VirtualRounds
from lightning_lopt.virtual.shared_module import SharedModule
from lightning_lopt.virtual.worker_batches import Dealt, interleave


class VirtualWorkersStrategy(CheckpointingStrategy):
    """A strategy whose process holds several workers.

    The Trainer counts steps, logs and calls callbacks as rank 0 of K processes would; the hooks of one batch, from its
    transfer to `on_train_batch_end`, are called for each worker, with its weights in the module.

    Args:
        virtual_workers: K >= 1; with one, everything is left as it is.
        **kwargs: those of `DDPStrategy`.

    Raises:
        ValueError: K < 1, or a training loop that has no turns: accumulated batches, `dataloader_iter`,
            `SyncBatchNorm`.
        MisconfigurationException: more than one process.
    """

    def __init__(self, virtual_workers: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(virtual_workers, bool) or not isinstance(virtual_workers, int) or virtual_workers < 1:
            raise ValueError(f"virtual_workers must be an integer >= 1, not {virtual_workers!r}.")
        self._at_once = virtual_workers
        self._shared_module: SharedModule | None = None
        self._batches: list[Any] = []  # of each worker, in the present step
        self._outputs: dict[int, Any] = {}

    @property
    @override
    def num_workers(self) -> int:
        return self._at_once if self._at_once > 1 else super().num_workers

    @property
    @override
    def _own_ranks(self) -> list[int]:
        return list(range(self._at_once)) if self._at_once > 1 else super()._own_ranks

    # -- setup ----------------------------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:  # called by the Trainer's constructor, before any process is started
        if self._at_once > 1 and self.num_nodes * self.num_processes > 1:
            raise MisconfigurationException(
                f"virtual_workers={self._at_once} live in one process, and this Trainer has "
                f"{self.num_nodes * self.num_processes}. Use Trainer(devices=1, num_nodes=1), or leave virtual_workers "
                "out: each process is a worker then."
            )
        super()._configure_launcher()

    def _make_rounds(
        self, make: Callable[..., Rounds], module: pl.LightningModule, optimizer: Optimizer, comm: Communicator
    ) -> Rounds:
        """One worker's rounds, or those of all virtual ones."""
        self._shared_module = None
        if self._at_once == 1:
            return make(module, optimizer, comm=comm)
        if any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
            raise ValueError("SyncBatchNorm needs real processes, not virtual_workers: use BatchNorm.")
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise ValueError("virtual_workers cannot share a dataloader_iter: let training_step take a batch.")
        scaler = [(self.precision_plugin, "scaler")] if getattr(self.precision_plugin, "scaler", None) else []
        self._shared_module = SharedModule(
            module,
            self.optimizers,
            self._at_once,
            gradients=not module.automatic_optimization,
            others=scaler,
        )
        return cast(Rounds, VirtualRounds(make, self._shared_module, optimizer, self._timeout))

    # -- data -----------------------------------------------------------------------------------------------------

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self._at_once > 1 and self._trains:
            return {"num_replicas": self._at_once, "rank": 0}
        return super().distributed_sampler_kwargs

    @override
    def process_dataloader(self, dataloader: object) -> object:
        if self._at_once == 1 or not self._trains:
            return super().process_dataloader(dataloader)
        interleave(dataloader, self._at_once)
        return Dealt(super().process_dataloader(dataloader), self._at_once)

    @property
    def _trains(self) -> bool:
        return self._trainer.training and self._trainer.state.fn == TrainerFn.FITTING

    def _deal(self, first: Any) -> list[Any]:
        """Every worker's batch of this step, on the device."""
        trainer, module = self._trainer, self.lightning_module
        assert module is not None
        loader = trainer.fit_loop._combined_loader
        dealt = [d.others.popleft() if d.others else [None] * (self._at_once - 1) for d in loader.flattened]
        batches = [first]
        for leaves in zip(*dealt, strict=True):
            batch = trainer.precision_plugin.convert_input(tree_unflatten(list(leaves), loader._spec))
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            batches.append(self.batch_to_device(batch, dataloader_idx=0))
        return batches

    # -- steps ----------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self._shared_module is None:
            return
        module = self._trainer.lightning_module
        if module.automatic_optimization and self._trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "virtual_workers take a step with every batch: set accumulate_grad_batches=1 and a larger batch_size, "
                "or accumulate with manual optimization."
            )
        self._batches = self._deal(batch)
        if is_overridden("on_train_batch_start", module):
            for rank in self._shared_module.others():
                args = self._batches[rank], batch_idx
                call._call_lightning_module_hook(self._trainer, "on_train_batch_start", *args)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        if self._shared_module is None or not self._trainer.lightning_module.automatic_optimization:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        output = None
        for _ in self._shared_module.turns():  # each calls the closure, and that training_step
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        return output

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._shared_module is None:
            return super().training_step(*args, **kwargs)
        if self._trainer.lightning_module.automatic_optimization:
            return self._training_step(*args, **kwargs)
        output, before = None, self._manual_progress()
        for _ in self._shared_module.turns():
            self._set_manual_progress(before)
            output = self._training_step(*args, **kwargs)
        return output

    def _training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The active worker's."""
        assert self._shared_module is not None
        rank = self._shared_module.active
        self._outputs[rank] = super().training_step(self._batches[rank] if rank else batch, *args, **kwargs)
        return self._outputs[rank]

    def _manual_progress(self) -> tuple[list[Any], dict[str, Any]]:
        """What a `training_step` with manual optimization moves on, that all workers share."""
        steps = self._trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        schedulers = [config.scheduler.state_dict() for config in self.lr_scheduler_configs]
        return copy.deepcopy((schedulers, steps.state_dict()))

    def _set_manual_progress(self, before: tuple[list[Any], dict[str, Any]]) -> None:
        schedulers, steps = copy.deepcopy(before)
        for config, state in zip(self.lr_scheduler_configs, schedulers, strict=True):
            config.scheduler.load_state_dict(state)
        self._trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.load_state_dict(steps)

    def end_batch(self, batch_idx: int) -> None:
        """Call `on_train_batch_end` of the module for all workers but the first, for whom Lightning calls it."""
        module = self._trainer.lightning_module
        if self._shared_module is not None and is_overridden("on_train_batch_end", module):
            for rank in self._shared_module.others():
                outputs = self._outputs[rank]
                if module.automatic_optimization:
                    outputs = ClosureResult.from_training_step_output(outputs).asdict()
                args = outputs, self._batches[rank], batch_idx
                call._call_lightning_module_hook(self._trainer, "on_train_batch_end", *args)
        self._batches, self._outputs = [], {}

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        loop = self._trainer.fit_loop
        if self._shared_module is None or self._trainer.lightning_module.automatic_optimization:
            return
        if self._trainer.validating and self._trainer.state.fn == TrainerFn.FITTING and not loop._should_accumulate():
            for _ in self._shared_module.others():  # the first worker's gradients are zero by now
                call._call_lightning_module_hook(self._trainer, "on_validation_model_zero_grad")

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @override
    def _gather_workers(self, checkpoint: dict[str, Any]) -> list[dict[str, Any]] | None:
        parts = super()._gather_workers(checkpoint) if self._shared_module is None else [self._worker_state(checkpoint)]
        if self._shared_module is None or parts is None:
            return parts
        plugin = type(self.precision_plugin).__qualname__
        for rank in self._shared_module.others():
            own = {**parts[0]["checkpoint"], "optimizer_states": [o.state_dict() for o in self.optimizers]}
            if plugin in own:
                own[plugin] = self.precision_plugin.state_dict()
            gradients = self._shared_module.gradients(rank) if parts[0]["gradients"] else {}
            local = self._virtual_rounds[rank].local_state()
            parts.append({**parts[0], "checkpoint": own, "local": local, "gradients": gradients})
        return parts

    @property
    def _virtual_rounds(self) -> list[Rounds]:
        return cast(VirtualRounds, self.rounds).workers

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        steps = {part["local"]["step_idx"] for part in self._own or []}
        if len(steps) > 1:
            raise ValueError(
                f"The checkpoint's workers have taken between {min(steps)} and {max(steps)} steps, and virtual_workers "
                "take turns, a step each. Resume with processes (Trainer(devices=K) without virtual_workers), or begin "
                "anew from its weights: load_from_checkpoint."
            )
        super().load_optimizer_state_dict(checkpoint)
        if self._shared_module is None:
            return
        for rank in self._shared_module.others():
            saved = checkpoint if self._own is None else self._own[rank]["checkpoint"]
            for optimizer, state in zip(self.optimizers, saved["optimizer_states"], strict=True):
                optimizer.load_state_dict(copy.deepcopy(state))
                _optimizer_to_device(optimizer, self.root_device)
            if (plugin := type(self.precision_plugin).__qualname__) in saved:
                self.precision_plugin.load_state_dict(saved[plugin])
            if self._own is not None:
                self._virtual_rounds[rank].load_local_state(self._own[rank]["local"])

    @override
    def on_train_start(self) -> None:
        parts = self._own or []
        super().on_train_start()
        for rank, part in enumerate(parts):
            if rank > 0 and part["gradients"] and self._shared_module is not None:
                self._shared_module.set_gradients(rank, part["gradients"])
