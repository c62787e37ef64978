"""The strategies' own callbacks, the first and the last of the Trainer's.

A strategy's hook runs after that of all callbacks, and some moments have no strategy hook at all. The first callback
does what must happen before anybody else's hook, the last one what must happen after all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_lopt.strategies.averaging import sync_weight_averages
from lightning_lopt.sync.status import SyncPoint

if TYPE_CHECKING:
    from lightning_lopt.strategies.local_sgd import LocalSGD


class FirstCallback(Callback):
    """The first callback: workers come together before others look at their weights.

    Args:
        strategy: Strategy of the Trainer.
    """

    def __init__(self, strategy: LocalSGD) -> None:
        self._strategy = strategy

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
        if self._strategy.rounds.last_report is None:
            rank_zero_info("Nothing was synced in this fit: no optimizer took a step.")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._strategy.abandon_validation()

    def _sync_weight_averages(self, trainer: pl.Trainer) -> None:
        sync_weight_averages(trainer, self._strategy.rounds, self._strategy.timeout, self._strategy.join)


class LastCallback(Callback):
    """The last callback: a batch is over when everybody else's hooks have run.

    Args:
        strategy: Strategy of the Trainer.
    """

    def __init__(self, strategy: LocalSGD) -> None:
        self._strategy = strategy

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._strategy.end_batch(batch_idx)
