"""Workers that a round leaves out: those that diverged, and those far from all others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

FACTOR = 10.0  # leaves out 6 of 24,000 healthy workers, 5 leaves out 61 (examples/records/2026-11-30_outliers)
FORGET = 0.99  # a peak that fades more slowly lets pass, late in a run, what is far above the median (same record)


class Norms(NamedTuple):
    """Norms of earlier pseudo-gradients, of the workers that the rounds took.

    Attributes:
        last: Norms in the round before, 0 for workers that it left out; empty in the first one.
        peak: Largest norm of all rounds, one that is n rounds old times 0.99^n: a tenth after 229.
    """

    last: Sequence[float] = ()
    peak: float = 0.0

    def then(self, norms: Sequence[float]) -> Norms:
        """Add a round with these norms.

        Example:
            >>> Norms().then([4.0, 2.0]).then([1.0, 1.0])
            Norms(last=[1.0, 1.0], peak=3.96)
        """
        return Norms(list(norms), max(FORGET * self.peak, *norms))


def outliers(norms: Sequence[float], before: Norms) -> list[int]:
    r"""Choose the workers k that a round leaves out, by the norms of all workers' pseudo-gradients.

    .. math:: \lVert g_k \rVert \text{ not finite} \quad\text{or}\quad
        \lVert g_k \rVert > \max\big(10 \operatorname{median}(\lVert g_1 \rVert, \dots, \lVert g_K \rVert,
        \text{last}),\ \text{peak}\big)

    The median (the upper one) is over what is finite and not 0, and takes no more norms of the round before than of
    this one. So it is never below the smallest norm of this round: a change that all workers share, as with a new
    learning rate, number of steps or batch, never counts. With two workers, the norms of
    the round before are needed to tell which one diverged. A norm that rounds took not long ago is taken again: where
    the loss is nearly 0, most batches give next to nothing, and one with a hard example a hundred times that.

    Args:
        norms: Norm of each worker's pseudo-gradient in this round.
        before: Norms of earlier rounds.

    Example:
        >>> outliers([1.0, float("nan"), 2.0, 50.0], Norms())
        [1, 3]
        >>> outliers([50.0, 60.0], Norms([1.0, 2.0], 2.0))
        []
        >>> outliers([1.0, 60.0], Norms([1.0, 2.0], 2.0))
        [1]
        >>> outliers([1.0, 60.0], Norms([1.0, 2.0], 70.0))
        []
    """
    now = [n for n in norms if math.isfinite(n) and n > 0]
    history = sorted((n for n in before.last if n > 0), reverse=True)
    pool = sorted(now + history[: len(now)])
    limit = max(FACTOR * pool[len(pool) // 2], before.peak) if pool else math.inf
    return [k for k, norm in enumerate(norms) if not math.isfinite(norm) or norm > limit]


class OutlierFilter:
    """The choice of the workers that rounds leave out, with its memory of earlier rounds.

    Args:
        norms: Norms of earlier rounds; None before the first.

    Attributes:
        norms: Norms of earlier rounds.
        num_left_out: Number of workers that rounds left out so far.

    Example:
        >>> outlier_filter = OutlierFilter()
        >>> for norms in ([1.0, 2.0], [1.0, 60.0], [50.0, 60.0]):
        ...     left_out = outlier_filter.outliers(norms)
        ...     outlier_filter.update(norms, left_out)
        ...     print(left_out)
        []
        [1]
        []
    """

    def __init__(self, norms: Norms | None = None) -> None:
        self.norms = norms or Norms()
        self.num_left_out = 0

    def outliers(self, norms: Sequence[float]) -> list[int]:
        """Choose the workers that a round with these norms leaves out."""
        return outliers(norms, self.norms)

    def update(self, norms: Sequence[float], left_out: Sequence[int]) -> None:
        """Remember a round; one that left out all workers is forgotten.

        Args:
            norms: Norm of each worker's pseudo-gradient.
            left_out: Workers that the round left out.
        """
        self.num_left_out += len(left_out)
        if len(left_out) < len(norms):
            self.norms = self.norms.then([0.0 if k in left_out else norm for k, norm in enumerate(norms)])
