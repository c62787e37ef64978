"""The memory of which pseudo-gradients were usual, and a warning when a round leaves a worker out."""

from __future__ import annotations

import math
import warnings

from lightning_lopt.functional.outliers import FACTOR, Norms
from lightning_lopt.sync.exchange import Exchange


class OutlierFilter:
    """Norms that `outliers` compares a round with, and a single warning.

    Args:
        warns: Whether this process is the one that warns.

    Attributes:
        norms: Norms of the pseudo-gradients of which earlier syncs took the mean.
    """

    def __init__(self, *, warns: bool) -> None:
        self._warns = warns
        self.norms = Norms()

    def update(self, exchange: Exchange) -> None:
        """Remember the norms of an exchange, and warn once if it left a worker out."""
        if not exchange.skipped:
            self.norms = self.norms.then(exchange.kept_norms)
        if exchange.left_out and self._warns:
            self._warns = False
            warnings.warn(_explanation(exchange), stacklevel=3)


def _explanation(exchange: Exchange) -> str:
    norms = [f"{norm:.3g}" if math.isfinite(norm) else "not finite" for norm in exchange.status.norms]
    who = ", ".join(f"worker {k} ({norms[k]})" for k in exchange.left_out)
    kept = f", the others' up to {max(exchange.kept_norms):.3g}" if exchange.kept_norms else ""
    return (
        f"Round {exchange.round_idx} {'is skipped: it ' * exchange.skipped}leaves out {who}; in brackets the norm of "
        f"the pseudo-gradient{kept}. One that is not finite, or over {FACTOR:g} times the median and all that recent "
        "rounds took, is of a worker that has diverged. It goes on from the global weights and forgets its local "
        "optimizer's state and what compression had not sent. If it happens often (RoundMonitor logs rounds/left_out; "
        "this is said once), lower the local learning rate, clip gradients, or look at that worker's data."
    )
