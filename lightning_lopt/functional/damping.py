"""Damping of pseudo-gradients that grow much faster than in earlier rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_lopt.functional.ada import BaseState, squared_norm

GROWTH = 1.5  # of |g| in a round, from which on it is damped
FORGET = 0.999  # per round: what comes once in 400 rounds still counts

Total = Callable[[Tensor], Tensor]
"""Sum over all shards of sums over the tensors of one of them."""


def local_total(sums: Tensor) -> Tensor:
    """Return sums over tensors as they are: the total where nobody else holds tensors of the model."""
    return sums


def damping(
    grads: Sequence[Tensor],
    states: Sequence[BaseState],
    rounds: Sequence[Tensor],
    local_scales: Sequence[Tensor],
    total: Total = local_total,
) -> Tensor:
    r"""Compute the common factor of all pseudo-gradients of a round before a step that is relative to them.

    .. math:: q_t = \min\Big(1, \frac{L_t}{|g_t|}\max\big(1, \tfrac{s_t}{s_{t-1}}\big)\Big),\qquad d_t = q_t^2,\qquad
        L_{t+1} = \max(1.5\, q_t |g_t|,\; 0.999\, L_t)

    with norms over all tensors. Local steps that diverge are seen in norms that grow from round to round; the larger g
    is, the less of it is left, as in redescending estimators, so that a single diverging round changes almost nothing.
    But the limit L grows by half all the same: what stays large counts again after some rounds, and what recent rounds
    had, as with rare examples, counts at once. Growth that comes from more local steps or a higher local learning rate
    (s = γH) is not damped, nor that of tensors whose g has always been 0. The first two rounds of a tensor count in
    full: in its first one a fragment has trained for a shorter time.

    Args:
        grads: Averaged pseudo-gradient of each tensor, [P, *S].
        states: Memory of each tensor, in which L and s are kept.
        rounds: Number of steps already taken by each tensor, from 0, [P].
        local_scales: Scale s >= 0 of each tensor, [P]; 0 or nan where it is not known.
        total: Sum over all shards of sums over the given tensors, [2, P].

    Returns:
        Factor d in [0, 1], [P], float64.

    Example:
        >>> state = BaseState.zeros((2,), 1, torch.float32, torch.device("cpu"))
        >>> round_idx, unknown = torch.tensor([5]), torch.zeros(1)
        >>> for x in (2.0, 3.0, 9.0, 9.0):
        ...     print(round(damping([torch.tensor([[x, 0.0]])], [state], [round_idx], [unknown]).item(), 4))
        1.0
        1.0
        0.25
        0.5625
    """
    if not grads:
        return _factor(*total(torch.zeros(2, 1, dtype=torch.float64)))
    squares = torch.stack([squared_norm(grad) for grad in grads]).double()
    limits, known_scales = (
        torch.stack(memory) for memory in zip(*((state.norm_limit, state.local_scale) for state in states), strict=True)
    )
    scales = torch.stack(list(local_scales)).to(known_scales)
    known = (scales > 0) & (known_scales > 0)
    rise = torch.where(known, scales / known_scales, 1.0).clamp(min=1).double()
    squared_limits = (limits * rise).square()
    factor = _factor(*total(torch.stack([squares * (squared_limits > 0), squared_limits], 1).sum(0)))
    counted = torch.where(squares.isfinite(), squares * factor, squared_limits).sqrt()
    new_limits = torch.maximum(GROWTH * counted, FORGET * limits) * (torch.stack(list(rounds)) > 0)
    new_scales = torch.where(scales > 0, scales, known_scales)
    torch.ops.aten._foreach_copy_([state.norm_limit for state in states], new_limits.unbind())
    torch.ops.aten._foreach_copy_([state.local_scale for state in states], new_scales.unbind())
    return factor


def _factor(now: Tensor, allowed: Tensor) -> Tensor:
    return torch.where(allowed > 0, (allowed / now).clamp(max=1), 1.0)


def damped(grads: Tensor, factor: Tensor) -> Tensor:
    """Multiply pseudo-gradients with their damping: [P, *], [P] to [P, *]."""
    return grads * factor.to(grads).view(-1, *[1] * (grads.dim() - 1))
