"""Phase of a decaying local learning rate, and a rule by hand for the outer step in it."""

from __future__ import annotations

import math
from typing import NamedTuple

LARGEST_FACTOR = 2.5  # of the outer learning rate
LARGEST_MOMENTUM = 0.95  # to which a decay raises a smaller one


class LocalDecay(NamedTuple):
    """Decay of a local learning rate γ since it last rose.

    A rise begins anew: neither a warm-up nor a restart looks like a decay, whatever came before.

    Attributes:
        start: γ from which it decays; 0 where none is known.
        now: γ of the last round; 0 where it is not known.

    Example:
        >>> decay = LocalDecay()
        >>> for local_lr in (0.1, 0.4, 0.2, 0.1, 0.3):  # a warm-up, a decay, a restart
        ...     decay = decay.after(local_lr)
        ...     print(decay.share)
        1.0
        1.0
        0.5
        0.25
        1.0
    """

    start: float = 0.0
    now: float = 0.0

    def after(self, local_lr: float) -> LocalDecay:
        """Decay after a further round.

        Args:
            local_lr: Local learning rate γ >= 0 of the round; NaN where it is not known, which begins anew.
        """
        if math.isnan(local_lr):
            return LocalDecay()
        return LocalDecay(local_lr if local_lr > self.now else self.start, local_lr)

    @property
    def share(self) -> float:
        """Share of γ that is left, in [0, 1]."""
        return self.now / self.start if self.start else 1.0


def contraction(share: float, local_steps: int) -> float:
    r"""Compute how far a round still goes along the steepest direction, of the way to its minimum.

    .. math:: q = 1 - (1 - d)^H

    That holds for SGD whose γ_start goes all the way in one step: while many local steps still do so, the
    pseudo-gradient of this direction hardly shrinks.

    Args:
        share: Share d of the local learning rate that is left, in [0, 1].
        local_steps: Number of local steps H; 0 counts as 1.

    Example:
        >>> [round(contraction(0.1, local_steps), 3) for local_steps in (1, 4, 16, 64)]
        [0.1, 0.344, 0.815, 0.999]
    """
    return 1 - (1 - share) ** max(local_steps, 1)


def settings_in_phase(lr: float, momentum: float, share: float, local_steps: int, phase: float) -> tuple[float, float]:
    r"""Raise the outer learning rate and momentum of a round in which the local learning rate has decayed.

    .. math:: \mathrm{lr}_t = \mathrm{lr}\, \min(q^{-e},\, 2.5),\qquad
        1 - \beta_t = \min\big(1 - \beta,\; \max((1 - \beta)\, d^e,\; 0.05)\big)

    with the `contraction` q. A decaying γ anneals the steps already, so the outer step need not be careful as well, but
    it may not overshoot where a round still goes all the way.

    Args:
        lr: Outer learning rate before the decay.
        momentum: Outer momentum β before the decay, in [0, 1); one above 0.95 stays as it is.
        share: Share d of the local learning rate that is left, in [0, 1]; see `LocalDecay`.
        local_steps: Number of local steps H.
        phase: Exponent e >= 0; 0 leaves both as they are.

    Returns:
        Outer learning rate and momentum of the round.

    Source: made by hand; constants from a search on small tasks, examples/records/2026-11-30_phase.

    Example:
        >>> for share in (1.0, 0.5, 0.1):
        ...     print([round(x, 3) for x in settings_in_phase(1.1, 0.85, share, local_steps=4, phase=0.5)])
        [1.1, 0.85]
        [1.136, 0.894]
        [1.876, 0.95]
    """
    if phase == 0 or share == 1:
        return lr, momentum
    complement = max((1 - momentum) * share**phase, 1 - LARGEST_MOMENTUM)
    return lr / max(contraction(share, local_steps) ** phase, 1 / LARGEST_FACTOR), max(momentum, 1 - complement)
