"""Numbers of local steps in proportion to the workers' speeds."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from numbers import Real
from typing import Literal

import torch

Speeds = Sequence[float] | Literal["measured"] | None


class WorkerSpeeds:
    r"""Steps in proportion to speed, so that fast workers do not wait for slow ones.

    .. math:: s_i = v_i / \max_k v_k, \qquad H_i = \max(1, \mathrm{round}(s_i H)), \qquad
        Q_i = \min(\lceil s_i Q \rceil, H_i - 1)

    With speeds of 3 and 1 and H = 48, the workers take 48 and 16 steps in a round and come to its sync at about the
    same time. `"measured"` begins with H for all, and takes the seconds per local step, data loading included, from
    earlier rounds; they are sent with the syncs and saved in checkpoints. Every step of every worker moves the mean by
    1/K of itself. With one slow worker of four on links of 20 Mbit/s, unequal steps and overlap reached the loss of
    Local SGD 2.5 ± 0.1 times sooner, and 2.0 ± 0.4 times with measured speeds
    (examples/records/2026-11-21_slow_worker).

    **Data.** Lightning's sampler deals equal shares, so that the fast workers wait at the end of each epoch after all.
    Give each worker data in proportion to its speed, by an `IterableDataset` that knows its rank, or by a sampler of
    your own (`use_distributed_sampler=False`). A schedule like `QSR` sees each worker's own step and learning rate:
    change the learning rate per epoch, not per step, so that it is the same for all.

    **Unequal numbers of batches**, as from an `IterableDataset` or a sampler of your own, need no `worker_speeds`. A
    worker that is out of data waits at the end of its epoch; it takes part in the others' syncs with its present
    parameters and no further steps.

    **Where workers wait.** With unequal speeds or data, all workers wait for one another at validation, at the ends of
    epochs and at the checkpoints there. If they are unequally far within a round, it ends for all. Whatever counts
    steps (`max_steps`, `min_steps`, an integer `val_check_interval`, `every_n_train_steps`) or asks the other workers
    in every batch (`max_time`, `sync_dist` with `on_step`) is refused with the reason. Outer optimizers see the largest
    of the workers' learning rates and numbers of steps; a checkpoint has the name that it has on rank 0.

    Loaders of known and equal length need no waiting. With an `IterableDataset`, whose length is unknown, steps may be
    counted as long as the streams are equally long; when they are not, all workers stop with an error that says where
    each of them is. Waiting costs a small message and a pass over the parameters.

    Args:
        speeds: Speeds v, one positive number per worker, or `"measured"`: the inverse of the seconds per local step,
            the mean of those of the round before and those known before it. None is the same for all.
        num_workers: K >= 1.
        rank: Rank of this worker among them.
        device: Device whose queue of work is waited for when time is measured.

    Attributes:
        unequal: Whether workers may take unequal numbers of steps in a round.
        seconds: Seconds per local step of each worker at the last status exchange; 0 is unknown.

    Raises:
        ValueError: There is not one positive number per worker.

    Source: H in proportion to speed: dynamic local updates of Liu et al. 2401.09135.

    Example:
        >>> [WorkerSpeeds([3, 1], 2, rank, torch.device("cpu")).steps(48) for rank in range(2)]
        [48, 16]
    """

    def __init__(self, speeds: Speeds, num_workers: int, rank: int, device: torch.device) -> None:
        check_speeds(speeds, num_workers)
        self.unequal = speeds is not None
        self._measures = speeds == "measured"
        self._speeds = [1.0] * num_workers if speeds is None or speeds == "measured" else [float(v) for v in speeds]
        self._rank, self._device = rank, device
        self.seconds = [0.0] * num_workers
        self._start: tuple[float, int] | None = None

    @property
    def share(self) -> float:
        """Share s_i of the fastest worker's steps that this worker takes."""
        return self._speeds[self._rank] / max(self._speeds)

    def steps(self, local_steps: int) -> int:
        """Local steps H_i of this worker while the fastest takes H."""
        return max(1, round(local_steps * self.share))

    def overlap(self, overlap_steps: int, local_steps: int) -> int:
        """Local steps Q_i that this worker takes while a sync is in flight.

        Args:
            overlap_steps: Q of the fastest worker.
            local_steps: H_i of this worker.
        """
        return min(math.ceil(overlap_steps * self.share), local_steps - 1)

    def start(self, local_step: int) -> None:
        """Measure from here, unless it began earlier in this round."""
        if self._measures and self._start is None:
            self._start = self._now(), local_step

    def forget(self) -> None:
        """End the measurement without a result."""
        self._start = None

    def measure(self, local_step: int) -> float:
        """End the measurement, and return this worker's seconds per local step, averaged with those known before."""
        begun, self._start = self._start, None
        if not self._measures:
            return 0.0  # unknown
        known = self.seconds[self._rank]
        if begun is None or begun[1] >= local_step:
            return known
        start, step = begun
        seconds = (self._now() - start) / (local_step - step)
        return (known + seconds) / 2 if known else seconds

    def update(self, seconds: Sequence[float]) -> None:
        """Take up the seconds per local step of every worker."""
        self.seconds = [*seconds]
        if self._measures and all(seconds):
            self._speeds = [1 / s for s in seconds]

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def check_speeds(speeds: Speeds, num_workers: int | None = None) -> None:
    """Refuse an argument that cannot be speeds.

    Args:
        speeds: Argument to check.
        num_workers: Number of workers, None if it is not known yet.

    Raises:
        ValueError: The argument is neither a list of positive numbers, one per worker, nor `"measured"` nor None.
    """
    if speeds is None or isinstance(speeds, str):
        fine = speeds in (None, "measured")
    else:
        fine = isinstance(speeds, Sequence) and all(isinstance(v, Real) and 0 < v < math.inf for v in speeds)
        fine = fine and len(speeds) > 0 and min(speeds) / max(speeds) > 0
    if not fine:
        raise ValueError(
            f"worker_speeds must be a list of positive numbers, one per worker, 'measured' or None, not {speeds!r}."
        )
    given = None if speeds is None or isinstance(speeds, str) else len(speeds)
    if given is not None and num_workers not in (None, given):
        raise ValueError(f"worker_speeds has {given} numbers, but there are {num_workers} workers.")
