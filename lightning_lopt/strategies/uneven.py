"""Where workers that may be unequally far wait for one another: validation, the ends of epochs and of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import has_iterable_dataset
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_lopt.rounds import Rounds
from lightning_lopt.strategies.averaging import sync_weight_averages
from lightning_lopt.sync.status import SyncPoint


class RoundCallback(Callback):
    """The first callback: what must happen before anybody else's hook.

    Args:
        strategy: whose rounds these are.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._strategy.join(SyncPoint.VALIDATION)
        sync_weight_averages(trainer, self._strategy.rounds)
        self._strategy.swap_in_global_weights()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        sync_weight_averages(trainer, self._strategy.rounds)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._strategy.join(SyncPoint.EPOCH_END)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._strategy.rounds is not None:
            self._strategy.join(SyncPoint.TRAINING_END)  # nobody may have foreseen it: early stopping, max_time
            sync_weight_averages(trainer, self._strategy.rounds)
            if self._strategy.rounds.last_report is None:
                rank_zero_info("Nothing was synced in this fit: no optimizer took a step.")


class UnevenInputs:
    """The meetings of one fit; creating one is collective.

    Workers whose loaders have the same known number of batches are at every place together, and need not meet. Those
    with unequal speeds or numbers of batches do, and so do those with an `IterableDataset`, of which nobody knows.
    Workers in one process are never apart.

    Args:
        trainer: whose loaders are set up.
        rounds: of its strategy.

    Attributes:
        unequal: whether the workers will be unequally far.

    Raises:
        MisconfigurationException: they will, and the trainer is to do something after a number of steps.
    """

    def __init__(self, trainer: Any, rounds: Rounds) -> None:
        self._trainer, self._rounds = trainer, rounds
        self.unequal = self._needed = False
        if trainer.world_size == 1:
            return
        batches, self._device = _num_batches(trainer), trainer.strategy.root_device
        own = [batches is None, batches or 0, -(batches or 0), rounds.step_idx, -rounds.step_idx]
        unknown, most, least, ahead, behind = rounds.comm.agree(self._device, {}, own)
        reasons = {
            "worker_speeds": rounds.speeds.unequal,
            f"they have between {-least} and {most} batches": not unknown and most != -least,
            f"they have taken between {-behind} and {ahead} before": ahead != -behind,
        }
        if rounds.speeds.unequal and most == -least != 0:
            rank_zero_info(
                f"With worker_speeds all workers have {most} batches in an epoch, so the fast ones wait at its end: "
                "give each data in proportion to its speed, by an IterableDataset that knows its rank, or a sampler of "
                "your own (use_distributed_sampler=False)."
            )
        several, why = rounds.comm.num_workers > 1, [reason for reason, holds in reasons.items() if holds]
        self.unequal = several and bool(why)
        self._needed = several and bool(why or unknown)
        rounds.equal_steps = rounds.equal_steps and not why
        if self.unequal and (wrong := list(_meaningless(trainer))):
            raise MisconfigurationException(
                f"Between their meetings the workers take unequal numbers of steps ({'; '.join(why)}). So a number of "
                f"steps says nothing, and what happens at one would find only some of them: {'; '.join(wrong)}. They "
                "meet at the ends of epochs and the validation there: use max_epochs, check_val_every_n_epoch and "
                "ModelCheckpoint(every_n_epochs=...)."
            )

    def total_steps(self) -> int | None:
        """Local steps of the whole run, None if unknown."""
        trainer = self._trainer
        if self.unequal or (not trainer.lightning_module.automatic_optimization and trainer.max_steps != -1):
            return None  # max_steps counts every optimizer
        try:
            total = trainer.estimated_stepping_batches
        except MisconfigurationException:  # accumulate_grad_batches varies over epochs
            total = trainer.max_steps
        return None if total in (-1, float("inf")) else int(total)

    def join(self, point: SyncPoint) -> None:
        """Wait for all workers, if they may be unequally far; at the end of training, all are synced."""
        if not self._needed:
            if point == SyncPoint.TRAINING_END:
                self._rounds.finish_round()
        elif point == SyncPoint.CHECKPOINT:
            self._rounds.sync.check(point)
        elif point == SyncPoint.COLLECTIVE_WITHIN_BATCH:
            together_in_flight = self._rounds.sync.in_flight and not self.unequal  # it shall stay there
            if self._in_batch and not together_in_flight:
                self._rounds.sync.check(point)
        elif point == SyncPoint.VALIDATION and not self.unequal and not self._out_of_data:
            self._rounds.sync.check(SyncPoint.VALIDATION_WITHIN_EPOCH)
        else:
            signals = self._trainer.strategy.signals
            signals.pause()
            self._rounds.join(point, last=self._is_last(point))
            if point == SyncPoint.EPOCH_END and self._rounds.comm.agree(self._device, {}, [signals.noted])[0]:
                signals.obey()

    def clock(self) -> int | None:
        """A number that all workers come to; None where some may not."""
        if self._rounds.equal_steps:
            return self._trainer.fit_loop.epoch_loop.total_batch_idx
        return self._rounds.round_idx if self._rounds.local_step == 0 else None

    @property
    def _in_batch(self) -> bool:
        done = self._trainer.fit_loop.epoch_loop.batch_progress.current
        return self._trainer.training and done.ready > done.completed

    @property
    def _out_of_data(self) -> bool:
        return self._trainer.fit_loop.epoch_loop._num_ready_batches_reached()

    def _is_last(self, point: SyncPoint) -> bool:
        """Whether training ends here, as far as can be foreseen."""
        loop = self._trainer.fit_loop
        if point == SyncPoint.VALIDATION and not self._out_of_data:
            return False
        epochs = loop.epoch_progress.current.processed + (point == SyncPoint.VALIDATION)
        return point == SyncPoint.TRAINING_END or 0 <= loop.max_epochs <= epochs


def _num_batches(trainer: Any) -> int | None:
    """Of this worker's epochs; None if unknown."""
    batches, loader = trainer.num_training_batches, trainer.fit_loop._combined_loader
    vague = any(has_iterable_dataset(one) for one in loader.flattened) or trainer.reload_dataloaders_every_n_epochs
    return None if vague or batches == float("inf") else int(batches)


def _meaningless(trainer: Any) -> Iterator[str]:
    """What happens after a number of steps, or asks the other workers in every batch."""
    if trainer.max_steps != -1 and not trainer.fast_dev_run:
        yield f"max_steps={trainer.max_steps}"
    if trainer.fit_loop.min_steps:
        yield f"min_steps={trainer.fit_loop.min_steps}"
    if not isinstance(trainer.val_check_interval, float):
        yield f"val_check_interval={trainer.val_check_interval!r}"
    for callback in trainer.callbacks:
        if isinstance(callback, Timer):
            yield "max_time (Timer)"
        if isinstance(callback, ModelCheckpoint) and callback._every_n_train_steps:
            yield f"ModelCheckpoint(every_n_train_steps={callback._every_n_train_steps})"
        if isinstance(callback, ModelCheckpoint) and callback._train_time_interval:
            yield "ModelCheckpoint(train_time_interval=...)"
    if trainer.strategy._layer_sync is not None:
        yield "sync_batchnorm=True"
