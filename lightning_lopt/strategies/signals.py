"""SIGTERM and SLURM's requeue signal: all workers act on them after the same batch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch.distributed import DistNetworkError

from lightning_lopt.strategies import host
from lightning_lopt.strategies.errors import WorkerLostError


class Signals:
    """SIGTERM and SLURM's requeue signal act at the end of a batch, the same one on all workers.

    Lightning acts inside its handlers, with collectives; another worker may wait in a sync for this one meanwhile.
    The handlers here only note the signal. A worker that has noted one, or finds in the store, every few seconds, that
    another has, publishes its step at the end of each batch and trains on until all are at the same step.

    Args:
        trainer: Trainer whose handlers are replaced until its fit ends.
        name: Name of this fit in the store, the same on all workers.
        interval: Seconds between looks into the store.
        patience: Seconds for which a worker waits for the others at a step.
    """

    def __init__(self, trainer: pl.Trainer, name: str, interval: float = 5.0, patience: float = 600.0) -> None:
        self._trainer, self._interval, self._patience = trainer, interval, patience
        self._noted: list[Callable[[], None]] = []
        self._informed = False  # that some worker has noted a signal
        self._store: host.Store | None = None
        if trainer.world_size > 1:
            self._store = host.shared_store(f"lightning_lopt/signals/{name}")
        self._last_look = time.monotonic()
        host.replace_signal_handlers(trainer, self._note_sigterm, self._note_requeue)
        host.skip_signal_broadcast(trainer)

    def _note_sigterm(self, number: int, frame: Any) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None and not self._noted:
            launcher.kill(number)
        self._noted.append(self._stop)

    def _note_requeue(self, number: int, frame: Any) -> None:
        self._noted.append(lambda: host.requeue_job(self._trainer, number, frame))

    def _stop(self) -> None:
        host.stop_after_batch(self._trainer)

    def pause(self) -> None:
        """Tell the others not to wait for this worker at the end of a batch, while it waits for them elsewhere."""
        if self._store is not None:
            self._store.set(str(self._trainer.global_rank), f"{sys.maxsize} going")

    def act(self, step: int | None) -> None:
        """Run the actions that were noted, once all workers are here.

        Args:
            step: Number of this step that all workers come to, None where they cannot wait for each other.
        """
        ready = bool(self._noted)
        if self._store is not None:
            try:
                ready = self._is_someone_signalled(self._store) and self._have_all_come(self._store, step)
            except DistNetworkError:  # its worker has finished; if it is lost instead, the next sync says so
                self._store = None
        if ready:
            self.run_noted_actions()

    @property
    def noted(self) -> bool:
        """Whether this worker has a signal to act on."""
        return bool(self._noted)

    def run_noted_actions(self) -> None:
        """Run the actions that were noted, stop if another worker noted the signal; all workers must be here."""
        noted, self._noted, self._informed = self._noted or [self._stop], [], False
        for action in noted:
            action()

    def _is_someone_signalled(self, store: host.Store) -> bool:
        now = time.monotonic()
        if self._noted:
            store.set("any", "1")
            self._informed = True
        elif not self._informed and now - self._last_look >= self._interval:
            self._last_look = now
            self._informed = store.check(["any"])
        return self._informed

    def _have_all_come(self, store: host.Store, step: int | None) -> bool:
        """Whether all workers wait at this step; if not, train on: the others are ahead or not yet informed."""
        if step is None:
            return False
        rank = self._trainer.global_rank
        keys = [str(r) for r in range(self._trainer.world_size)]
        store.set(str(rank), f"{step} going")
        if not store.check(keys):
            store.set(str(rank), f"{step + 1} going")  # a worker that comes to this step must not wait here
            return False
        end = time.monotonic() + self._patience
        while time.monotonic() < end:
            found = [store.get(key).decode().split() for key in keys]
            if max(int(at) for at, _ in found) > step:
                store.set(str(rank), f"{step + 1} going")
                return False
            store.set(str(rank), f"{step} waiting")
            if all(entry == [str(step), "waiting"] for entry in found):
                return True
            time.sleep(0.01)
        raise WorkerLostError(f"A worker did not come to step {step}, where all were to stop after a signal.")
