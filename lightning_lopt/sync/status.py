"""The small message that precedes each exchange: integers that must be equal, and the progress of every worker."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import torch

from lightning_lopt.comm import CommonInteger, Communicator, DisagreementError

NUM_ROWS = 5  # integers per worker

_SAME_STEPS = (
    "All workers must take the same number of steps in a round: check for unequal data per worker, a learning rate "
    "that depends on the worker, or branches on the rank."
)
ROUND = CommonInteger("the round", _SAME_STEPS, shown=True)
LOCAL_STEPS = CommonInteger("the local steps of the round", _SAME_STEPS, shown=True)
EVERYTHING = CommonInteger(
    "whether everything is sent",
    "All workers must end their training at the same step: check for unequal data per worker, or numbers of steps that "
    "depend on the worker.",
)
IN_TRAINING = CommonInteger(
    "the parameters in training", "Freeze, unfreeze and add the same parameters on all workers, in the same round."
)
COORDINATES = CommonInteger(
    "the coordinates to send",
    "A selection must choose the same ones on all workers: check for a seed of the worker's own.",
)
LOCAL_STATE = CommonInteger(
    "the number of elements of the local optimizer's state",
    "Averages need the same state on all workers: check for parameters that only some workers have stepped.",
    shown=True,
)
GLOBAL_WEIGHTS = CommonInteger(
    "the global weights",
    "Something wrote to those of one worker, or the machines round differently, which needs sharded=True.",
)
UNSTEPPED = CommonInteger(
    "the tensors that no optimizer steps",
    "Register, resize and change the same buffers and parameters on all workers, in the same round; one that may "
    "differ in shape can stay each worker's own: sync_rules={name: 'local'}.",
    listed=True,
)
NEW_WEIGHTS = CommonInteger(
    "the weights that were put in place of the global ones",
    "Whoever replaces weights must give all workers the same: load the same file on each, and draw new values from the "
    "same seed.",
)
COMMON = (
    ROUND,
    LOCAL_STEPS,
    EVERYTHING,
    IN_TRAINING,
    COORDINATES,
    LOCAL_STATE,
    GLOBAL_WEIGHTS,
    UNSTEPPED,
    NEW_WEIGHTS,
)


class SyncPoint(Enum):
    """Places in a run at which the workers talk to one another."""

    SYNC = "sync"
    LAUNCH = "launch"  # a sync that is in flight while local steps go on
    VALIDATION = "validation"
    EPOCH_END = "epoch end"
    TRAINING_END = "training end"
    VALIDATION_WITHIN_EPOCH = "validation within an epoch"
    COLLECTIVE_WITHIN_BATCH = "collective within a batch"
    CHECKPOINT = "checkpoint"
    EVALUATION = "evaluation of the workers' mean"
    ADOPTION = "adoption of new weights"

    @property
    def needs_sync(self) -> bool:
        """Whether a worker here wants its parameters to be synchronised."""
        return self in (SyncPoint.SYNC, SyncPoint.LAUNCH)

    @property
    def sends_weights(self) -> bool:
        """Whether a worker here sends its parameters, for a sync or for a mean that changes nothing."""
        return self.needs_sync or self is SyncPoint.EVALUATION

    @property
    def answers_syncs(self) -> bool:
        """Whether a worker that waits here takes part in the syncs of others."""
        return self in (SyncPoint.VALIDATION, SyncPoint.EPOCH_END, SyncPoint.TRAINING_END)


@dataclass(frozen=True)
class LocalSettings:
    """Settings of a local optimizer that an outer optimizer may read, one value per parameter group.

    Attributes:
        lrs: Learning rates, NaN where a group has none.
        momenta: Heavy-ball momenta that last from one sync of a tensor to the next, in [0, 1].

    Example:
        >>> LocalSettings.of([{"lr": 0.1, "momentum": 0.9}, {"lr": None}])
        LocalSettings(lrs=[0.1, nan], momenta=[0.9, 0.0])
    """

    lrs: list[float] = field(default_factory=list)
    momenta: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, groups: Sequence[Mapping[str, Any]], momentum_power: float = 1.0) -> LocalSettings:
        """Read the settings from parameter groups.

        Args:
            groups: Parameter groups of the local optimizer.
            momentum_power: Power to which momenta are taken: the number of syncs from one of a tensor to its next, or
                infinity where a sync resets the local optimizer.
        """
        lrs = [group.get("lr") for group in groups]
        return cls(
            lrs=[math.nan if lr is None else float(lr) for lr in lrs],
            momenta=[_momentum(group.get("momentum")) ** momentum_power for group in groups],
        )


@dataclass(frozen=True)
class WorkerStatus:
    """Progress of one worker.

    Attributes:
        local_steps: Local steps of this round, those to come in flight included.
        point: Point at which the worker is: a sync, or one where it waits for all others.
        speed_share: Share of the fastest worker's steps that it takes in a round, in (0, 1].
        step_seconds: Seconds per local step, 0 if unknown.
        norm: Norm of its pseudo-gradient.
    """

    local_steps: int
    point: SyncPoint = SyncPoint.SYNC
    speed_share: float = 1.0
    step_seconds: float = 0.0
    norm: float = 0.0


@dataclass(frozen=True)
class GroupStatus:
    """The status of all workers.

    Attributes:
        workers: Status of each worker.
        changed: Positions of the unstepped tensors that some worker changed, among those that all follow.
        settings: Settings of the local optimizers, the largest of each over the workers.
    """

    workers: list[WorkerStatus] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    settings: LocalSettings = field(default_factory=LocalSettings)

    @property
    def all_wait(self) -> bool:
        """Whether all workers wait at the same point, and none sends its weights."""
        return not any(worker.point.sends_weights for worker in self.workers)

    @property
    def norms(self) -> list[float]:
        """Norms of the workers' pseudo-gradients, scaled to equal numbers of steps."""
        return [worker.norm / worker.speed_share for worker in self.workers]

    def state_dict(self) -> dict[str, Any]:
        """The status as types that `torch.load(weights_only=True)` accepts."""
        return {
            "workers": [{**vars(worker), "point": worker.point.value} for worker in self.workers],
            "changed": self.changed,
            "settings": asdict(self.settings),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> GroupStatus:
        """Restore the result of `state_dict`."""
        workers = [WorkerStatus(**{**worker, "point": SyncPoint(worker["point"])}) for worker in state["workers"]]
        return cls(workers, state["changed"], LocalSettings(**state["settings"]))


def gather_status(
    comm: Communicator,
    device: torch.device,
    equal: Mapping[CommonInteger, int | Sequence[str] | None],
    own: WorkerStatus,
    changed: Sequence[bool] = (),
    settings: LocalSettings | None = None,
) -> GroupStatus:
    """Check that the workers agree, and learn the status of each, in one small integer all-reduce.

    The message has the same length at every point, so that those of workers at different points meet.

    Args:
        comm: Collectives among the workers.
        device: Device on which the process group communicates.
        equal: Values of some of the `COMMON` integers; each of the others is equal to any.
        own: Status of this worker.
        changed: Whether this worker changed each unstepped tensor that all follow; as many on all workers.
        settings: Settings of this worker's local optimizer; as many groups on all workers.

    Raises:
        DisagreementError: One of the integers differs, or workers wait at different points.

    Example:
        >>> status = gather_status(
        ...     Communicator(), torch.device("cpu"), {ROUND: 0}, WorkerStatus(16), [False, True]
        ... )
        >>> status.workers[0].local_steps, status.changed
        (16, [1])
    """
    num_workers, points = comm.num_workers, list(SyncPoint)
    settings = settings or LocalSettings()
    rows = [0] * (NUM_ROWS * num_workers)
    floats = [own.speed_share, own.step_seconds, own.norm]
    rows[comm.rank :: num_workers] = [own.local_steps, points.index(own.point), *map(to_integer, floats)]
    values = [*settings.lrs, *settings.momenta]
    common = {integer: equal.get(integer) for integer in COMMON}
    largest = comm.agree(device, common, [*rows, *map(int, changed), *map(to_integer, values)])
    received = iter(largest)
    columns = [[next(received) for _ in range(num_workers)] for _ in range(NUM_ROWS)]
    by_someone = [i for i in range(len(changed)) if next(received)]
    maxima = [from_integer(value) for value in received]
    decoded = [math.nan if math.isinf(value) else value for value in maxima]  # NaN travels as infinity
    status = GroupStatus(
        workers=[
            WorkerStatus(steps, points[point], *map(from_integer, rest))
            for steps, point, *rest in zip(*columns, strict=True)
        ],
        changed=by_someone,
        settings=LocalSettings(decoded[: len(settings.lrs)], decoded[len(settings.lrs) :]),
    )
    _check_points(status.workers)
    return status


def to_integer(number: float) -> int:
    """Turn a float >= 0 into a 64-bit integer >= 0, in the same order; NaN becomes infinity.

    Example:
        >>> to_integer(0.0), to_integer(1.0) < to_integer(1.5) < to_integer(float("nan"))
        (0, True)
    """
    return struct.unpack("<q", struct.pack("<d", math.inf if math.isnan(number) else number))[0]


def from_integer(integer: int) -> float:
    """Invert `to_integer`.

    Example:
        >>> from_integer(to_integer(0.1))
        0.1
    """
    return struct.unpack("<d", struct.pack("<q", integer))[0]


def _momentum(value: Any) -> float:
    """A momentum in [0, 1]; 0 for a setting that is not a number, as some optimizers have."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return min(max(number, 0.0), 1.0) if math.isfinite(number) else 0.0


def _check_points(workers: Sequence[WorkerStatus]) -> None:
    """Refuse workers that wait at different points, or at one that does not answer the syncs of others."""
    waiting = {worker.point: k for k, worker in enumerate(workers) if not worker.point.needs_sync}
    syncing = {worker.point: k for k, worker in enumerate(workers) if worker.point.needs_sync}
    if not waiting or (len(waiting) == 1 and (not syncing or all(point.answers_syncs for point in waiting))):
        return
    places = [f"worker {k} at the {point.value}" for point, k in {**waiting, **syncing}.items()]
    raise DisagreementError(
        f"The workers wait for one another at different places: {', '.join(places)}. With unequal data or speeds they "
        "meet at the ends of their epochs and the validation there, and each must have a batch in every epoch. "
        "Validate, save and reduce only there, not after a number of steps (max_steps, an int val_check_interval, "
        "every_n_train_steps) nor in every batch (sync_dist=True without on_step=False, max_time); or give all workers "
        "as many batches: limit_train_batches."
    )
