"""Slow momentum (SlowMo, arXiv 1910.00643) and, as a setting of it, BMUF."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def slow_momentum(
    param: Tensor, grad: Tensor, buffer: Tensor, *, outer_lr: float, momentum: float, local_lr: float
) -> None:
    r"""Take one slow-momentum step, in place on `param` and `buffer`.

    .. math:: u \leftarrow \beta u + g / \gamma,\qquad a \leftarrow a - \alpha \gamma u

    With γ = 0 (a warm-up from zero) no worker has moved: u stays as it is and so does the anchor.

    Args:
        param: Anchor a, [*S].
        grad: Averaged pseudo-gradient g = global - local, [*S].
        buffer: Slow momentum u, [*S].
        outer_lr: Outer learning rate α > 0.
        momentum: Decay β of the slow momentum, in [0, 1).
        local_lr: Local learning rate γ >= 0 at the sync.

    Source: arXiv 1910.00643, algorithm 1.

    Example:
        >>> a, u = torch.tensor([1.0]), torch.zeros(1)
        >>> for _ in range(2):  # 1 -> 0.8 -> 0.5 : u = 2, then 0.5 * 2 + 2 = 3
        ...     slow_momentum(a, torch.tensor([0.2]), u, outer_lr=1.0, momentum=0.5, local_lr=0.1)
        >>> a
        tensor([0.5000])
    """
    if local_lr == 0:
        return
    buffer.mul_(momentum).add_(grad, alpha=1 / local_lr)
    param.sub_(buffer, alpha=outer_lr * local_lr)
