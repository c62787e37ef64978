"""The report of a round, and the warning of one that leaves workers out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_lopt.functional.outliers import FACTOR
from lightning_lopt.sync.exchange import Exchange


@dataclass(frozen=True)
class RoundReport:
    """Results and costs of one round.

    Attributes:
        round_idx: Index of the round, from 0.
        local_steps: H of this round.
        pseudo_grad_norm: Euclidean norm of the averaged pseudo-gradient. Parameters that were unfrozen or added since
            the last sync have none yet.
        drift: Root mean square distance of the workers from their mean when the sync was launched, on the coordinates
            that this sync sent. With compression, that of the values as they were sent, which have in them the values
            that earlier rounds left over.
        bytes_sent: Bytes that this rank sent in this sync.
        transfer_seconds: Seconds from the launch until the mean is here, waiting for other workers included.
        waited_seconds: The part of `transfer_seconds` in which training stood still; the rest ran beside local steps.
        outer_seconds: Seconds in the outer step.
        sync_seconds: Seconds in the whole sync.
        left_out: Number of workers that were left out, since their pseudo-gradients were not finite or far larger than
            the others'; if all were, the round was skipped and the anchor kept.
        fell_back: Whether the outer step was refused and the workers were averaged instead.
        partial: Whether only a part of the model was sent, of which drift and norm are.
    """

    round_idx: int
    local_steps: int
    pseudo_grad_norm: float
    drift: float
    bytes_sent: int
    transfer_seconds: float
    waited_seconds: float
    outer_seconds: float
    sync_seconds: float
    left_out: int
    fell_back: bool
    partial: bool


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
