"""The places of a fit to which workers come together, with equal numbers of batches and speeds or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import has_iterable_dataset
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.utilities import rank_zero_info

from lightning_lopt.comm import digest
from lightning_lopt.strategies import host
from lightning_lopt.strategies.signals import Signals
from lightning_lopt.strategies.virtual import ProcessRounds
from lightning_lopt.sync.status import SyncPoint


class UnevenInputs:
    """The places of one fit at which workers wait for one another; creating this is collective.

    Workers whose loaders have the same known number of batches are to be at every place together; a message of fixed
    length makes sure of it before anything else is sent. Those with unequal speeds or numbers of batches wait for one
    another, and so do those with an `IterableDataset`, whose length is unknown. Workers in one process are never apart.

    Args:
        trainer: Trainer whose loaders are set up.
        rounds: Rounds of its strategy.
        signals: Signals of this fit.

    Attributes:
        unequal: Whether the workers will have taken unequal numbers of steps.

    Raises:
        MisconfigurationException: The numbers of steps are unequal, and the Trainer is to do something after a number
            of steps.
    """

    def __init__(self, trainer: pl.Trainer, rounds: ProcessRounds, signals: Signals) -> None:
        self._trainer, self._rounds, self._signals = trainer, rounds, signals
        self._device = trainer.strategy.root_device
        self.unequal = self._needed = False
        self._together = True  # since the last place at which all have waited
        self._several_processes = trainer.world_size > 1
        if trainer.world_size == 1:
            return
        batches = _num_batches(trainer)
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
        if self.unequal and (wrong := list(_counts_steps(trainer))):
            raise MisconfigurationException(
                f"Between their meetings the workers take unequal numbers of steps ({'; '.join(why)}). So a number of "
                f"steps says nothing, and what happens at one would find only some of them: {'; '.join(wrong)}. They "
                "meet at the ends of epochs and the validation there: use max_epochs, check_val_every_n_epoch and "
                "ModelCheckpoint(every_n_epochs=...)."
            )

    def total_steps(self) -> int | None:
        """Return the number of local steps of the whole run, None if it is unknown."""
        trainer = self._trainer
        if self.unequal or (not trainer.lightning_module.automatic_optimization and trainer.max_steps != -1):
            return None  # max_steps counts every optimizer
        try:
            total = trainer.estimated_stepping_batches
        except MisconfigurationException:  # accumulate_grad_batches varies over epochs
            total = trainer.max_steps
        return None if total in (-1, float("inf")) else int(total)

    def may_sync(self, point: SyncPoint) -> bool:
        """Whether a sync can happen while this worker waits at a point."""
        at_end = point in (SyncPoint.VALIDATION, SyncPoint.EPOCH_END)
        return point == SyncPoint.TRAINING_END or (self._needed and at_end)

    def begin_batch(self) -> None:
        """Note that this worker may now be ahead of others."""
        self._together = False

    def join(self, point: SyncPoint, call: str = "") -> None:
        """Wait for all workers at a place to which all of them must come.

        At the end of training, sync what is not synced.

        Args:
            point: Point that this worker has come to; `SyncPoint.COLLECTIVE` for one that Lightning or the user calls.
            call: Text that says what comes next, the same on all workers.

        Raises:
            DisagreementError: Another worker waits at a place where this one will not come.
        """
        if point is SyncPoint.COLLECTIVE:
            self._join_collective(call)
        elif not self._needed:
            self._check(point, call)
            if point is SyncPoint.TRAINING_END:
                self._rounds.finish_round()
        elif point is SyncPoint.CHECKPOINT:
            self._check(point, call)
        elif point is SyncPoint.VALIDATION and not self.unequal and not host.is_out_of_data(self._trainer):
            self._check(SyncPoint.VALIDATION_WITHIN_EPOCH)
            self._together = True
        else:
            self._wait(point)

    def _wait(self, point: SyncPoint) -> None:
        """Answer the syncs of the others until they are here, too."""
        self._signals.pause()
        self._rounds.join(point, last=self._is_last(point), stops=self._trainer.should_stop)
        self._together = True
        if point is SyncPoint.EPOCH_END:
            own = [self._signals.noted, self._trainer.should_stop]
            noted, stops = self._rounds.comm.agree(self._device, {}, own)
            self._trainer.should_stop = bool(stops)
            if noted:
                self._signals.run_noted_actions()

    def _join_collective(self, call: str) -> None:
        """Make sure that all workers call the same collective."""
        within_batch = host.is_within_batch(self._trainer)
        if self._trainer.validating:
            if self._needed and not self._together:  # Lightning asks for the loaders before any hook
                self.join(SyncPoint.VALIDATION)
            self._check(SyncPoint.COLLECTIVE_IN_VALIDATION, call)
        elif not within_batch:
            self._check(SyncPoint.COLLECTIVE, call)
        elif self.unequal or not self._rounds.sync.in_flight:  # else the sync is to stay in flight
            self._check(SyncPoint.COLLECTIVE_WITHIN_BATCH, call)

    def _check(self, point: SyncPoint, call: str = "") -> None:
        """Make sure that all workers are here, in a message of the same length at every point."""
        if self._several_processes:
            self._rounds.check(
                point,
                batches=None if self._needed else host.batches_begun(self._trainer, in_run=True),
                call=digest(call),
                stops=self._trainer.should_stop,
                uneven=self._needed,
            )

    def common_step(self) -> int | None:
        """Return a number of this step that all workers come to, None where some may not."""
        if self._rounds.equal_steps:
            return host.batches_begun(self._trainer, in_run=True)
        return self._rounds.round_idx if self._rounds.local_step == 0 else None

    def _is_last(self, point: SyncPoint) -> bool:
        """Whether training ends here, as far as can be foreseen."""
        max_epochs = self._trainer.max_epochs
        if point == SyncPoint.VALIDATION and not host.is_out_of_data(self._trainer):
            return False
        epochs = host.epochs_done(self._trainer) + (point == SyncPoint.VALIDATION)
        return point == SyncPoint.TRAINING_END or (max_epochs is not None and 0 <= max_epochs <= epochs)


def _num_batches(trainer: Any) -> int | None:
    """The batches of this worker's epochs, None if their number is unknown."""
    batches, loaders = trainer.num_training_batches, host.train_loaders(trainer) or []
    vague = any(has_iterable_dataset(loader) for loader in loaders) or trainer.reload_dataloaders_every_n_epochs
    return None if vague or batches == float("inf") else int(batches)


def _counts_steps(trainer: Any) -> Iterator[str]:
    """The options that act after a number of steps, or ask the other workers in every batch."""
    if trainer.max_steps != -1 and not trainer.fast_dev_run:
        yield f"max_steps={trainer.max_steps}"
    if trainer.min_steps:
        yield f"min_steps={trainer.min_steps}"
    if not isinstance(trainer.val_check_interval, float):
        yield f"val_check_interval={trainer.val_check_interval!r}"
    for callback in host.callbacks_of(trainer):
        if isinstance(callback, Timer):
            yield "max_time (Timer)"
        if isinstance(callback, ModelCheckpoint) and (steps := host.steps_between_saves(callback)):
            yield f"ModelCheckpoint(every_n_train_steps={steps})"
        if isinstance(callback, ModelCheckpoint) and host.saves_by_time(callback):
            yield "ModelCheckpoint(train_time_interval=...)"
    if host.has_synced_batch_norm(trainer):
        yield "sync_batchnorm=True"
