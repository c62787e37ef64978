"""The strategies' own callbacks, among those of the Trainer.

A strategy's hook runs after that of all callbacks, and some moments have no strategy hook at all. The first callback
does what must happen before anybody else's hook, the last one what must happen after all of them, and one in between
what must happen before a checkpoint is saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_lopt.strategies import host
from lightning_lopt.strategies.averaging import sync_weight_averages
from lightning_lopt.sync.status import SyncPoint

if TYPE_CHECKING:
    from lightning_lopt.strategies.local_sgd import LocalSGD


class StrategyCallback(Callback):
    """A strategy's own callback.

    Args:
        strategy: Strategy of the Trainer.
    """

    def __init__(self, strategy: LocalSGD) -> None:
        self._strategy = strategy


class FirstCallback(StrategyCallback):
    """The first callback: workers come together before others look at their weights."""

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._sync_weight_averages(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._strategy.join(SyncPoint.EPOCH_END)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._strategy.rounds is None:
            return
        self._strategy.join(SyncPoint.TRAINING_END)  # nobody may have foreseen it: early stopping, max_time
        self._strategy.average_modes()
        self._sync_weight_averages(trainer)
        self._strategy.check_steps()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._strategy.abandon_validation()

    def _sync_weight_averages(self, trainer: pl.Trainer) -> None:
        sync_weight_averages(trainer, self._strategy.rounds, self._strategy.timeout, self._strategy.join)


class BeforeCheckpoints(StrategyCallback):
    """The callback before those that save checkpoints: what the module does at a batch's end is then in them.

    Lightning calls the module's hook after all callbacks. A checkpoint would lack what it does, the step of an EMA
    teacher for example, and a resumed run, in which it is not called again, would go on without.
    """

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._strategy.call_batch_end_hooks(batch_idx)
        if is_overridden("on_train_batch_end", pl_module):
            host.call_module_hook_now(trainer, "on_train_batch_end", outputs, batch, batch_idx)


class LastCallback(StrategyCallback):
    """The last callback: a batch is over when everybody else's hooks have run."""

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._strategy.end_batch()


def place_callbacks(strategy: LocalSGD, callbacks: list[Callback]) -> None:
    """Put the strategy's callbacks among those of the Trainer, in place of those of an earlier fit.

    Args:
        strategy: Strategy of the Trainer.
        callbacks: The Trainer's callbacks, in which those that save checkpoints are the last.
    """
    others = [c for c in callbacks if not isinstance(c, StrategyCallback)]
    saving = [c for c in others if isinstance(c, Checkpoint)]
    rest = [c for c in others if not isinstance(c, Checkpoint)]
    callbacks[:] = [FirstCallback(strategy), *rest, BeforeCheckpoints(strategy), *saving, LastCallback(strategy)]
