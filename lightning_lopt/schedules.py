"""Schedules of the syncs: callables from a `RoundInfo` to a number of local steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lightning_lopt.functional.integers import as_integer, as_number


@dataclass(frozen=True)
class RoundInfo:
    """The state of a run when a round begins, as a schedule sees it.

    Attributes:
        round_idx: Number of rounds finished so far.
        step: Number of local steps that this worker has finished so far.
        total_steps: Local steps of the whole run, None if unknown.
        lr: Local learning rate of the round's first step, the largest of all parameter groups.
        drift: Root mean square distance of the workers from their mean at the sync that ended the last round; see
            `RoundReport`. None before the first sync, and after one that sent only a part of the model (`density`,
            `Fragments`) or was skipped.
        pseudo_grad_norm: Euclidean norm of the averaged pseudo-gradient of that sync, None where `drift` is.
        seconds: Seconds from sync to sync of the round before the last, the most of all workers: each sync sends those
            of the round before it. None until that is known, from the fourth round on.

    `drift`, `pseudo_grad_norm` and `seconds` are the same on all workers, and after a resume; where machines round
    differently, with `sharded=True` alone. `step` and `lr` are this worker's own.
    """

    round_idx: int
    step: int
    total_steps: int | None
    lr: float
    drift: float | None = None
    pseudo_grad_norm: float | None = None
    seconds: float | None = None


Schedule = Callable[[RoundInfo], int]
"""Function from the state of a run to the local steps H of the round that begins.

It is called once in each round, on every worker (for virtual workers, once for all), and must return the same H on all.
Where H leaves no room for `overlap_steps`, the last H - 1 steps overlap; a constant H that small is refused.
"""


@runtime_checkable
class StatefulSchedule(Protocol):
    """Schedule that remembers something from round to round, which checkpoints hold.

    Example:
        >>> class WhileDriftIsSmall:
        ...     "H doubles while the drift is at most `limit`, and halves above it."
        ...
        ...     def __init__(self, limit, local_steps):
        ...         self.limit, self.local_steps = limit, local_steps
        ...
        ...     def __call__(self, info):
        ...         if info.drift is not None:
        ...             doubled, halved = 2 * self.local_steps, max(1, self.local_steps // 2)
        ...             self.local_steps = doubled if info.drift <= self.limit else halved
        ...         return self.local_steps
        ...
        ...     def state_dict(self):
        ...         return {"local_steps": self.local_steps}
        ...
        ...     def load_state_dict(self, state):
        ...         self.local_steps = state["local_steps"]
        >>> schedule = WhileDriftIsSmall(limit=0.5, local_steps=8)  # for LocalSGD(local_steps=schedule)
        >>> [schedule(RoundInfo(0, 0, None, 0.1, drift=drift)) for drift in (None, 0.2, 0.3, 0.7)]
        [8, 16, 32, 16]
    """

    def __call__(self, info: RoundInfo, /) -> int: ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that it remembers, of types that `torch.load(weights_only=True)` accepts."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Restore the result of `state_dict`."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same number of local steps in every round.

    Args:
        local_steps: Number of local steps H >= 1.

    Raises:
        ValueError: `local_steps` is not an integer >= 1.

    Example:
        >>> Constant(16)(RoundInfo(0, 0, None, 0.1))
        16
    """

    local_steps: int

    def __post_init__(self) -> None:
        local_steps = as_integer(self.local_steps, least=1)
        if local_steps is None:
            raise ValueError(f"local_steps must be an integer >= 1, not {self.local_steps!r}.")
        object.__setattr__(self, "local_steps", local_steps)

    def __call__(self, info: RoundInfo) -> int:
        return self.local_steps


@dataclass(frozen=True)
class QSR:
    r"""The quadratic synchronization rule: sync less often as the learning rate decays.

    .. math:: H = \max(H_{base}, \lfloor (\alpha / \eta)^{power} \rfloor)

    η is the local learning rate, the largest of all parameter groups, when the round begins. During learning-rate
    warm-up H is the base, since a small warm-up rate would give a huge H. Where η is 0, a round lasts to the end of the
    run if `total_steps` is known; otherwise H is the base.

    Args:
        alpha: Scale α > 0, in units of the learning rate; a good choice is slightly above lr_max * sqrt(base_steps):
            0.0175 in the authors' ViT-B with AdamW at 0.008 and a base of 4.
        base_steps: Smallest number of local steps H_base >= 1.
        power: Exponent > 0; 2 is the quadratic rule, 1 and 3 its relatives.
        warmup_steps: Number of local steps >= 0 of learning-rate warm-up.

    Raises:
        ValueError: An argument is out of its range, or the learning rate is not a number.

    Memory: none. Sends what the strategy sends, but less often. Fails with a rate that depends on the worker, which is
    an error, and saves nothing with a constant one.

    Source: arXiv 2310.14423, equation 2.

    Example:
        >>> rule = QSR(alpha=0.0175, base_steps=4)
        >>> rule(RoundInfo(0, 0, None, lr=0.008)), rule(RoundInfo(9, 90, None, lr=0.001))
        (4, 306)
    """

    alpha: float
    base_steps: int
    power: float = 2.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        alpha, power, warmup = map(as_number, (self.alpha, self.power, self.warmup_steps))
        positive = 0 < alpha < math.inf and power > 0 and warmup >= 0
        base_steps = as_integer(self.base_steps, least=1)
        if not positive or base_steps is None:
            raise ValueError(
                f"QSR needs alpha > 0, an integer base_steps >= 1, power > 0 and warmup_steps >= 0, not {self}."
            )
        object.__setattr__(self, "base_steps", base_steps)

    def __call__(self, info: RoundInfo) -> int:
        if info.step < self.warmup_steps:
            return self.base_steps
        if math.isnan(info.lr):
            raise ValueError(f"QSR cannot follow a learning rate that is not a number: {info}.")
        with suppress(OverflowError):
            if info.lr > 0:
                return max(self.base_steps, int((self.alpha / info.lr) ** self.power))
        return self.base_steps if info.total_steps is None else max(1, info.total_steps - info.step)  # nothing moves


def as_schedule(local_steps: int | Schedule) -> Schedule:
    """Turn an integer into a `Constant`, and return a callable as it is.

    Raises:
        ValueError: The argument is neither an integer >= 1 nor a callable, or has one method of `StatefulSchedule`
            without the other.
    """
    if not callable(local_steps):
        return Constant(local_steps)
    missing = [name for name in ("state_dict", "load_state_dict") if not hasattr(local_steps, name)]
    if len(missing) == 1:
        raise ValueError(f"The schedule {local_steps!r} has no {missing[0]}: a checkpoint needs both, or neither.")
    return local_steps
