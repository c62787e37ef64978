"""The small message that precedes each exchange: integers that must be equal, and the progress of every worker."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import torch

from lightning_lopt.comm import CommonInteger, Communicator, Difference, DisagreementError
from lightning_lopt.functional.blended import momentum_of_adam

NUM_ROWS = 9  # integers per worker

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
BATCHES = CommonInteger("the number of batches so far", "All workers must come here after the same batch.", shown=True)
CALL = CommonInteger("the collective and its tensors", "All workers must call the same one, with tensors of one shape.")
GROUPS = CommonInteger(
    "the number of the local optimizer's parameter groups",
    "Add the same groups on all workers, in the same round.",
    shown=True,
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
    "same seed. Noise of each worker's own may be added after the first step of a round. If nobody replaced weights, "
    "an optimizer stepped that is not one of configure_optimizers, or not by self.optimizers().",
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
    BATCHES,
    CALL,
    GROUPS,
)


class SyncPoint(Enum):
    """Places in a run at which the workers talk to one another."""

    SYNC = "sync"
    LAUNCH = "launch"  # a sync that is in flight while local steps go on
    VALIDATION = "validation"
    EPOCH_END = "epoch end"
    TRAINING_END = "training end"
    VALIDATION_WITHIN_EPOCH = "validation within an epoch"
    COLLECTIVE = "collective between batches"
    COLLECTIVE_WITHIN_BATCH = "collective within a batch"
    COLLECTIVE_IN_VALIDATION = "collective in a validation"
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
        """Whether a worker that may be ahead of others takes part in their syncs while it waits here."""
        return self in (SyncPoint.VALIDATION, SyncPoint.EPOCH_END, SyncPoint.TRAINING_END)


@dataclass(frozen=True)
class LocalSettings:
    """Settings of a local optimizer that an outer optimizer may read, one value per parameter group.

    Attributes:
        lrs: Learning rates, NaN where a group has none.
        momenta: Heavy-ball momenta that last from one sync of a tensor to the next, in [0, 1]; of Adam and others with
            `betas` that of `momentum_of_adam`.
        num_new: Number of the last groups that are new, so that other workers may not have them. They are sent when all
            workers are known to have them.

    Example:
        >>> LocalSettings.of([{"lr": 0.1, "momentum": 0.9}, {"lr": 0.1, "betas": (0.5, 0.999)}, {"lr": None}])
        LocalSettings(lrs=[0.1, 0.1, nan], momenta=[0.9, 0.25, 0.0], num_new=0)
    """

    lrs: list[float] = field(default_factory=list)
    momenta: list[float] = field(default_factory=list)
    num_new: int = 0

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
            momenta=[_momentum(group) ** momentum_power for group in groups],
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
        lr: Learning rate that schedules read, 0 if unknown.
        round_seconds: Seconds of its last round, 0 if unknown.
        stops: Whether it was told to end its training, by `trainer.should_stop`.
        uneven: Whether the workers may be unequally far, so that it answers syncs where its point does.
    """

    local_steps: int
    point: SyncPoint = SyncPoint.SYNC
    speed_share: float = 1.0
    step_seconds: float = 0.0
    norm: float = 0.0
    lr: float = 0.0
    round_seconds: float = 0.0
    stops: bool = False
    uneven: bool = False


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
    num_pieces: int = 0,
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
        num_pieces: Number of the unstepped tensors, the last ones, of which the worker's other ranks hold other parts.

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
    floats = [own.speed_share, own.step_seconds, own.norm, own.lr, own.round_seconds]
    flags = own.stops + 2 * own.uneven
    at = points.index(own.point)
    rows[comm.rank :: num_workers] = [own.local_steps, at, len(points) - at, flags, *map(to_integer, floats)]
    known = len(settings.lrs) - settings.num_new  # or the message would be longer than that of others
    values = [*settings.lrs[:known], *settings.momenta[:known]]
    common = {integer: equal.get(integer) for integer in COMMON} | {GROUPS: len(settings.lrs)}
    largest = [*rows, *map(to_integer, values), *map(int, changed)]
    differences, largest = comm.compare(device, common, largest, num_pieces)
    received = iter(largest)
    columns = [[next(received) for _ in range(num_workers)] for _ in range(NUM_ROWS)]
    maxima = _decode(next(received) for _ in values)
    by_someone = [i for i, flag in enumerate(received) if flag]
    for k, (last, first) in enumerate(zip(columns[1], columns[2], strict=True)):
        if last + first != len(points):  # not the same on all ranks of a worker
            places = f"{points[len(points) - first].value} and the {points[last].value}"
            raise DisagreementError(f"The processes of worker {k} wait for one another at the {places}.")
    workers = [
        WorkerStatus(steps, points[at], *map(from_integer, rest), stops=bool(flags & 1), uneven=bool(flags & 2))
        for steps, at, _, flags, *rest in zip(*columns, strict=True)
    ]
    if _apart(workers):
        raise DisagreementError(f"{_places(workers)} {' '.join(_causes(workers))}")
    if differences:
        raise DisagreementError(" ".join([comm.explain(differences), *_causes(workers, differences)]))
    if settings.num_new:
        new = [*settings.lrs[known:], *settings.momenta[known:]]
        added = _decode(comm.agree(device, {}, [*map(to_integer, new)]))
        maxima = [*maxima[:known], *added[: len(new) // 2], *maxima[known:], *added[len(new) // 2 :]]
    received_settings = LocalSettings(maxima[: len(settings.lrs)], maxima[len(settings.lrs) :])
    return GroupStatus(workers=workers, changed=by_someone, settings=received_settings)


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


def _momentum(group: Mapping[str, Any]) -> float:
    """A group's momentum, as a heavy-ball momentum in [0, 1]."""
    if group.get("momentum") is not None:
        return _number(group["momentum"])
    betas = group.get("betas")
    return momentum_of_adam(_number(betas[0])) if isinstance(betas, (tuple, list)) and betas else 0.0


def _number(value: Any) -> float:
    """A setting in [0, 1]; 0 for one that is not a number, as some optimizers have."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return min(max(number, 0.0), 1.0) if math.isfinite(number) else 0.0


def _decode(integers: Iterable[int]) -> list[float]:
    """Invert `to_integer`, of which NaN comes out as infinity."""
    values = [from_integer(integer) for integer in integers]
    return [math.nan if math.isinf(value) else value for value in values]


def _apart(workers: Sequence[WorkerStatus]) -> bool:
    """Whether workers wait at different points, or without answering the syncs of others."""
    waiting = [worker for worker in workers if not worker.point.needs_sync]
    answered = all(worker.uneven and worker.point.answers_syncs for worker in waiting)
    return len({worker.point for worker in waiting}) > 1 or (len(waiting) < len(workers) and not answered)


def _places(workers: Sequence[WorkerStatus]) -> str:
    """Say where the workers are: of those at one place, the first."""
    first: dict[SyncPoint, int] = {}
    for k, worker in enumerate(workers):
        first.setdefault(worker.point, k)
    places = [f"worker {k} at the {point.value}" for point, k in first.items()]
    return f"The workers wait for one another at different places: {', '.join(places)}."


def _causes(workers: Sequence[WorkerStatus], differences: Sequence[Difference] = ()) -> Iterator[str]:
    """Yield the likely causes of workers that wait for one another in vain."""
    stopped = [k for k, worker in enumerate(workers) if worker.stops]
    if 0 < len(stopped) < len(workers):
        yield (
            f"trainer.should_stop was set on {_names(stopped)} alone: set it on all workers in the same batch, for "
            "example to trainer.strategy.reduce_boolean_decision(stop, all=False)."
        )
        return
    known = [(worker.lr, k) for k, worker in enumerate(workers) if worker.lr]
    if known and (least := min(known)) < (most := max(known)) and least[0] != most[0]:
        yield (
            f"The learning rate is {least[0]:g} on worker {least[1]} and {most[0]:g} on worker {most[1]}, and a "
            "schedule of H may follow it. If it follows a metric (ReduceLROnPlateau), log that with sync_dist=True."
        )
    points = {worker.point for worker in workers}
    if len(points) > 1 or differences:
        said = {difference.integer.advice for difference in differences}
        for causing, advice in _ADVICE:
            if points & causing and advice not in said:
                yield advice
        if any(worker.uneven for worker in workers):
            yield _UNEVEN


def _names(workers: Sequence[int]) -> str:
    return f"worker{'s' * (len(workers) > 1)} {', '.join(map(str, workers))}"


_COLLECTIVES = {SyncPoint.COLLECTIVE, SyncPoint.COLLECTIVE_WITHIN_BATCH, SyncPoint.COLLECTIVE_IN_VALIDATION}
_ADVICE = (
    (
        {SyncPoint.CHECKPOINT},
        "All workers must write a checkpoint together: call trainer.save_checkpoint on each, after the same batch, not "
        "only where trainer.is_global_zero. Rank 0 alone writes the common file.",
    ),
    ({SyncPoint.ADOPTION}, NEW_WEIGHTS.advice),
    (
        {SyncPoint.EVALUATION},
        "All workers must ask for their mean together: validation, strategy.global_weights() and "
        "Rounds.swap_in('mean') are for each of them, after the same step.",
    ),
    (
        {SyncPoint.VALIDATION, SyncPoint.VALIDATION_WITHIN_EPOCH, SyncPoint.COLLECTIVE_IN_VALIDATION},
        "All workers must validate together: give them the same validation data hooks, limit_val_batches and "
        "val_check_interval.",
    ),
    (
        _COLLECTIVES,
        "A metric that is reduced must be logged on all workers, as many times on each: self.log(..., sync_dist=True). "
        "So must be whatever else talks to the other workers: self.all_gather, trainer.strategy.broadcast, barrier.",
    ),
)
_UNEVEN = (
    "With unequal data or speeds the workers meet at the ends of their epochs and the validation there, and each must "
    "have a batch in every epoch. Validate, save and reduce only there, not after a number of steps (max_steps, an int "
    "val_check_interval, every_n_train_steps) nor in every batch (sync_dist=True without on_step=False, max_time); or "
    "give all workers as many batches: limit_train_batches."
)
