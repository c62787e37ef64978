"""What happens when a worker is lost or told to stop."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistError, DistNetworkError
from torch.distributed.distributed_c10d import _get_default_store
from typing_extensions import override

from lightning_lopt.comm import DisagreementError


class WorkerLostError(RuntimeError):
    """Another worker died or hangs, and so a collective failed."""


@contextmanager
def explained(timeout: timedelta | None) -> Iterator[None]:
    """Say what the backend's error means, if a collective fails inside.

    Args:
        timeout: of the collectives.

    Raises:
        WorkerLostError: instead of the error of gloo or NCCL.
    """
    try:
        yield
    except DisagreementError:
        raise
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, DistError) and not any(name in text for name in ("gloo", "NCCL")):
            raise
        raise WorkerLostError(
            f"Another worker died, or did not come to this sync within {timeout}: {text.splitlines()[0]}. Look for the "
            "first error in the other workers' logs. The last checkpoint is intact: resume with "
            "trainer.fit(..., ckpt_path='last'), by itself under torchrun --max-restarts. If a worker is only slow, "
            "raise the strategy's timeout; if it reduces something in every batch while others are out of data, do so "
            "once per epoch: self.log(..., sync_dist=True, on_step=False)."
        ) from error


class Signals:
    """SIGTERM and SLURM's requeue signal act at the end of a batch, the same one on all workers.

    Lightning acts inside the handlers, with collectives that wait for a worker which waits in a sync for this one.
    Here handlers only take a note. Workers that have one, or see in the store every few seconds that another has,
    publish their step at the end of each batch and train on until all are at the same one.

    Args:
        trainer: whose handlers are replaced until its fit ends.
        name: of this fit, the same on all workers.
        clock: a number that all workers come to, None where they cannot wait for each other.
        interval: seconds between looks into the store.
        patience: seconds for which a worker waits for the others.
    """

    def __init__(
        self, trainer: Any, name: str, clock: Callable[[], int | None], interval: float = 5.0, patience: float = 600.0
    ) -> None:
        self._trainer, self._clock, self._interval, self._patience = trainer, clock, interval, patience
        self._noted: list[Callable[[], None]] = []
        self._informed = False  # that some worker has noted a signal
        self._store: Store | None = None
        if trainer.world_size > 1:
            self._store = PrefixStore(f"lightning_lopt/signals/{name}", _get_default_store())
        self._last_look = time.monotonic()
        connector = trainer._signal_connector
        self._replace(connector._sigterm_notifier_fn, self._note_sigterm)
        self._replace(connector._slurm_sigusr_handler_fn, self._note_requeue)
        epoch_loop = trainer.fit_loop.epoch_loop
        if hasattr(epoch_loop, "_broadcast_sigterm_tensor"):  # in Lightning >= 2.6, once per batch
            epoch_loop._broadcast_sigterm_tensor = lambda: None

    @staticmethod
    def _replace(old: Any, new: Callable[[int, Any], None]) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            handlers = getattr(signal.getsignal(number), "signal_handlers", [])
            handlers[:] = [new if handler == old else handler for handler in handlers]

    def _note_sigterm(self, number: int, frame: Any) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None and not self._noted:
            launcher.kill(number)
        self._noted.append(self._stop)

    def _note_requeue(self, number: int, frame: Any) -> None:
        self._noted.append(lambda: self._trainer._signal_connector._slurm_sigusr_handler_fn(number, frame))

    def _stop(self) -> None:
        self._trainer._signal_connector.received_sigterm = True  # Lightning raises at the end of this batch

    def pause(self) -> None:
        """While this worker waits for others elsewhere: they are not to wait for it at the end of a batch."""
        if self._store is not None:
            self._store.set(str(self._trainer.global_rank), f"{sys.maxsize} going")

    def act(self) -> None:
        """At the end of a batch: do what was noted, once all workers are here."""
        ready = bool(self._noted)
        if self._store is not None:
            try:
                ready = self._is_someone_signalled(self._store) and self._have_all_come(self._store)
            except DistNetworkError:  # its worker has finished; if it is lost instead, the next sync says so
                self._store = None
        if ready:
            self.obey()

    @property
    def noted(self) -> bool:
        """Whether this worker has a signal to act on."""
        return bool(self._noted)

    def obey(self) -> None:
        """Do what was noted, here or on another worker; all workers must be here."""
        noted, self._noted, self._informed = self._noted or [self._stop], [], False
        for action in noted:
            action()

    def _is_someone_signalled(self, store: Store) -> bool:
        now = time.monotonic()
        if self._noted:
            store.set("any", "1")
            self._informed = True
        elif not self._informed and now - self._last_look >= self._interval:
            self._last_look = now
            self._informed = store.check(["any"])
        return self._informed

    def _have_all_come(self, store: Store) -> bool:
        """Whether all workers wait at this step; False means: train on, the others are ahead or not yet informed."""
        step, rank = self._clock(), self._trainer.global_rank
        if step is None:
            return False
        keys = [str(r) for r in range(self._trainer.world_size)]
        store.set(str(rank), f"{step} going")
        if not store.check(keys):
            store.set(str(rank), f"{step + 1} going")  # who comes to this step must not wait here
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


class SignalCallback(Callback):
    """The last callback: what must happen when everybody else's hooks have run."""

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy: Any = trainer.strategy
        strategy.end_batch(batch_idx)
        strategy.signals.act()
