"""The warning of a round that leaves workers out."""

from __future__ import annotations

import math

from lightning_lopt.functional.outliers import FACTOR
from lightning_lopt.sync.exchange import Exchange


def explain_outliers(exchange: Exchange) -> str:
    """Text of a warning about the workers that an exchange left out, with causes and remedies."""
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
