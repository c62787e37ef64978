"""What the workers tell one another before anything is sent: what must be equal, and how far everyone is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from lightning_lopt.comm import Communicator, DisagreementError
from lightning_lopt.functional.outliers import from_integer, to_integer

SyncPoint = Literal[
    "sync",
    "launch",
    "validation",
    "epoch end",
    "training end",
    "validation within an epoch",
    "collective within a batch",
    "checkpoint",
]
SYNCS = ("sync", "launch")
ANSWERING = ("validation", "epoch end", "training end")  # where a worker takes part in the syncs of others
PLACES: tuple[SyncPoint, ...] = get_args(SyncPoint)
EQUAL: tuple[str, ...] = (  # what workers at a sync agree on
    "round",
    "local steps",
    "whether everything is sent",
    "parameters in training",
    "coordinates to send (as a checksum)",
    "elements of the local optimizer's state",
    "the global weights (as a checksum; machines that round differently need sharded=True)",
)
NUM_ROWS = 5  # integers per worker


@dataclass(frozen=True)
class WorkerStatus:
    """How far a worker is.

    Attributes:
        local_steps: of this round, those to come in flight included.
        place: `"sync"`, or `"launch"` if steps come in flight; elsewhere it waits for all others, and meanwhile
            answers their syncs, if it is there for long.
        share: of the fastest worker's steps that it takes in a round, in (0, 1].
        seconds: per local step, 0 if unknown.
        norm: of its pseudo-gradient.
    """

    local_steps: int
    place: SyncPoint = "sync"
    share: float = 1.0
    seconds: float = 0.0
    norm: float = 0.0

    @property
    def needs_sync(self) -> bool:
        """Whether it is at a sync."""
        return self.place in SYNCS


@dataclass(frozen=True)
class GroupStatus:
    """What all workers told.

    Attributes:
        workers: where they stand.
        changed: the buffers that somebody changed, by position.
        settings: of the local optimizers' parameter groups, of each the largest.
    """

    workers: list[WorkerStatus] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    settings: list[float] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether all workers wait at the same place, and nobody needs a sync."""
        return not any(worker.needs_sync for worker in self.workers)

    @property
    def norms(self) -> list[float]:
        """The workers' norms, as if they had taken as many steps."""
        return [worker.norm / worker.share for worker in self.workers]

    def state_dict(self) -> list[list[Any]]:
        """As types that `torch.load(weights_only=True)` accepts."""
        return [[[*vars(worker).values()] for worker in self.workers], self.changed, self.settings]

    @classmethod
    def of(cls, state: Sequence[Any]) -> GroupStatus:
        """Restore what `state_dict` returned."""
        workers, changed, settings = state
        return cls([WorkerStatus(*values) for values in workers], changed, settings)


def gather_status(
    comm: Communicator,
    device: torch.device,
    equal: Mapping[str, int | None],
    own: WorkerStatus,
    changed: Sequence[bool] = (),
    settings: Sequence[float] = (),
) -> GroupStatus:
    """One small integer all-reduce: check what must be equal, and learn where everyone is.

    Args:
        comm: the collectives.
        device: where the process group communicates.
        equal: named integers, the same on all workers; None is equal to any.
        own: where this worker stands.
        changed: which buffers it changed; as many on all workers, as the settings.
        settings: of its local optimizer's parameter groups.

    Raises:
        DisagreementError: one of the integers differs, or workers wait at different places.

    Example:
        >>> told = gather_status(
        ...     Communicator(), torch.device("cpu"), {"round": 0}, WorkerStatus(16), [False, True], [0.1]
        ... )
        >>> told.workers, told.changed, told.settings
        ([WorkerStatus(local_steps=16, place='sync', share=1.0, seconds=0.0, norm=0.0)], [1], [0.1])
    """
    num = comm.num_workers
    rows = [0] * (NUM_ROWS * num)
    rates = [own.share, own.seconds, own.norm]
    rows[comm.rank :: num] = [own.local_steps, PLACES.index(own.place), *map(to_integer, rates)]
    largest = comm.agree(device, equal, [*rows, *map(int, changed), *map(to_integer, settings)])
    workers = []
    for k in range(num):
        steps, place, *rest = largest[k : NUM_ROWS * num : num]
        workers.append(WorkerStatus(steps, PLACES[place], *map(from_integer, rest)))
    _check_places(workers)
    flags, rest = largest[NUM_ROWS * num :][: len(changed)], largest[NUM_ROWS * num + len(changed) :]
    decoded = [from_integer(value) for value in rest]
    return GroupStatus(
        workers,
        [i for i, flag in enumerate(flags) if flag],
        [math.nan if math.isinf(value) else value for value in decoded],  # an optimizer without one
    )


def _check_places(workers: Sequence[WorkerStatus]) -> None:
    """All that wait do so at the same place; while others are at a sync, only where workers answer those."""
    waiting = {worker.place: k for k, worker in enumerate(workers) if not worker.needs_sync}
    syncing = {worker.place: k for k, worker in enumerate(workers) if worker.needs_sync}
    if not waiting or (len(waiting) == 1 and (not syncing or set(waiting) <= set(ANSWERING))):
        return
    places = [f"worker {k} at the {place}" for place, k in {**waiting, **syncing}.items()]
    raise DisagreementError(
        f"The workers wait for one another at different places: {', '.join(places)}. With unequal data or speeds they "
        "meet at the ends of their epochs and the validation there, and each must have a batch in every epoch. "
        "Validate, save and reduce only there, not after a number of steps (max_steps, an int val_check_interval, "
        "every_n_train_steps) nor in every batch (sync_dist=True without on_step=False, max_time); or give all workers "
        "as many batches: limit_train_batches."
    )
