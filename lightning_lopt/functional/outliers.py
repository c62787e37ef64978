"""Which workers a round leaves out: those that diverged, and those far from all others."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

FACTOR = 10.0
FORGET = 0.99


class Norms(NamedTuple):
    """Norms of earlier pseudo-gradients, of those workers that the rounds took.

    Attributes:
        last: in the round before; empty in the first one.
        peak: the largest of all rounds, one that is n rounds old times 0.99^n.
    """

    last: Sequence[float] = ()
    peak: float = 0.0

    def then(self, norms: Sequence[float]) -> Norms:
        """What is remembered after a round with these norms.

        Example:
            >>> Norms().then([4.0, 2.0]).then([1.0, 1.0])
            Norms(last=[1.0, 1.0], peak=3.96)
        """
        return Norms(list(norms), max(FORGET * self.peak, *norms))


def outliers(norms: Sequence[float], before: Norms) -> list[int]:
    r"""The workers k to leave out, by the norms of all workers' pseudo-gradients.

    .. math:: \lVert g_k \rVert \text{ not finite} \quad\text{or}\quad
        \lVert g_k \rVert > \max\big(10 \operatorname{median}(\lVert g_1 \rVert, \dots, \lVert g_K \rVert,
        \text{last}),\ \text{peak}\big)

    The median (the upper one) is over what is finite and not 0, and takes no more norms of the round before than of
    this one. So it is never below the smallest norm of this round: a change that all workers share, as with a new
    learning rate, number of steps or batch, never counts. Two workers need the round before to tell who is wild. And
    what rounds took not long ago they take again: where the loss is nearly 0, most batches give next to nothing, and
    one with a hard example a hundred times that.

    Args:
        norms: of this round, one per worker.
        before: of earlier rounds.

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


def to_integer(norm: float) -> int:
    """A float >= 0 as a 64-bit integer >= 0, in the same order; NaN becomes infinity.

    Example:
        >>> to_integer(0.0), to_integer(1.0) < to_integer(1.5) < to_integer(float("nan"))
        (0, True)
    """
    return struct.unpack("<q", struct.pack("<d", math.inf if math.isnan(norm) else norm))[0]


def from_integer(integer: int) -> float:
    """The float of which `to_integer` made this.

    Example:
        >>> from_integer(to_integer(0.1))
        0.1
    """
    return struct.unpack("<d", struct.pack("<q", integer))[0]
