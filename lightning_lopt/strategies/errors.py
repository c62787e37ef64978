"""Errors of the strategies: a worker that is lost, a checkpoint that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from torch.distributed import DistError

from lightning_lopt.comm import DisagreementError

if TYPE_CHECKING:
    from lightning_lopt.strategies.local_sgd import LocalSGD

T = TypeVar("T")


class WorkerLostError(RuntimeError):
    """Another worker died or hangs, so that a collective failed."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or of a release whose checkpoints this one does not read."""


@contextmanager
def explain_lost_worker(timeout: timedelta | None, place: str = "this sync") -> Iterator[None]:
    """Turn the error of a collective that fails inside into one that says what to do.

    Args:
        timeout: Time limit of the collectives, None for that of the process group.
        place: Place at which this worker waits.

    Raises:
        WorkerLostError: Instead of the error of gloo or NCCL.
    """
    try:
        yield
    except (DisagreementError, WorkerLostError):  # they say so already
        raise
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, DistError) and not any(name in text for name in ("gloo", "NCCL")):
            raise
        limit = "the default time limit" if timeout is None else timeout
        raise WorkerLostError(
            f"Another worker died, or did not come to {place} within {limit}: {text.splitlines()[0]}. Look for the "
            "first error in the other workers' logs. The last checkpoint is intact: resume with "
            "trainer.fit(..., ckpt_path='last'), by itself under torchrun --max-restarts. If a worker is only slow, "
            "raise the strategy's timeout; if it reduces something in every batch while others are out of data, do so "
            "once per epoch: self.log(..., sync_dist=True, on_step=False). All workers must call the collectives of "
            "torch.distributed, and log the metrics of torchmetrics, which call them."
        ) from error


def run_on_all(strategy: LocalSGD, work: Callable[[], T], elsewhere: Exception) -> T:
    """Do work on every process, and let none go on, or wait for the others, where it failed on any.

    Args:
        strategy: Strategy of the processes; all of them must call this.
        work: Work of this process.
        elsewhere: Error to raise where the work succeeded, but not on another process.

    Returns:
        The result of this process's work.

    Raises:
        WorkerLostError: Another process did not come.
    """
    results: list[T] = []
    problem = None
    try:
        results.append(work())
    except Exception as error:
        problem = error
    with explain_lost_worker(strategy.timeout):
        fine = strategy.reduce_boolean_decision(problem is None)
    if not fine:
        raise problem or elsewhere
    return results[0]
