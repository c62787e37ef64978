"""The report of a round."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RoundReport:
    """Results and costs of one round.

    Attributes:
        round_idx: Index of the round, from 0.
        local_steps: H of this round.
        pseudo_grad_norm: Euclidean norm of the averaged pseudo-gradient.
        drift: Root mean square distance of the workers from their mean when the sync was launched.
        bytes_sent: Bytes that this worker sent in this sync.
        transfer_seconds: Seconds from the launch until the mean is here, waiting for other workers included.
        waited_seconds: The part of `transfer_seconds` in which training stood still; the rest ran beside local steps.
        outer_seconds: Seconds in the outer step.
        sync_seconds: Seconds in the whole sync.
        left_out: Number of workers that were left out, since their pseudo-gradients were not finite or far larger than
            the others'; if all were, the round was skipped and the anchor kept.
        fell_back: Whether the outer step was refused and the workers were averaged instead.
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
