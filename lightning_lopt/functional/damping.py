"""How much of a pseudo-gradient counts that is larger than those before it let expect."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_lopt.functional.ada import AdaState, squared_norm

GROWTH = 1.5  # of |g| in a round, from which on it is damped
FORGET = 0.999  # per round: what comes once in 400 rounds still counts


def damping(
    grads: Sequence[Tensor],
    states: Sequence[AdaState],
    rounds: Sequence[Tensor],
    local_scales: Sequence[Tensor],
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    r"""What all pseudo-gradients of a round are multiplied with before a step that is relative to them.

    .. math:: q_t = \min\Big(1, \frac{L_t}{|g_t|}\max\big(1, \tfrac{s_t}{s_{t-1}}\big)\Big),\qquad d_t = q_t^2,\qquad
        L_{t+1} = \max(1.5\, q_t |g_t|,\; 0.999\, L_t)

    with norms over all tensors. Local steps that diverge are seen in norms that grow from round to round; the larger
    g is, the less of it is left, as in redescending estimators, so that one wild round moves next to nothing. But the
    limit L grows by half all the same: what stays large counts again after some rounds, and what recent rounds had,
    as with rare examples, counts at once. Growth that comes from more local steps or a higher local learning rate
    (s = γH) is not damped, nor that of tensors whose g has always been 0. The first two rounds of a tensor count in
    full: in its first one a fragment has trained for a shorter time.

    Args:
        grads: averaged pseudo-gradient of each tensor, [P, *S].
        states: its accumulators; remembers L and s.
        rounds: number of steps already taken, from 0, [P].
        local_scales: s >= 0, [P]; 0 or nan where it is not known.
        total: makes sums over all shards of these over the given tensors, [2, P].

    Returns:
        d in [0, 1], [P], float64.

    Example:
        >>> state = AdaState.zeros((2,), 1, torch.float32, torch.device("cpu"))
        >>> round_idx, unknown = torch.tensor([5]), torch.zeros(1)
        >>> for x in (2.0, 3.0, 9.0, 9.0):
        ...     print(round(damping([torch.tensor([[x, 0.0]])], [state], [round_idx], [unknown]).item(), 4))
        1.0
        1.0
        0.25
        0.5625
    """
    squares, limits = [], []
    for grad, state, scale in zip(grads, states, local_scales, strict=True):
        known = (scale > 0) & (state.local_scale > 0)
        rise = torch.where(known, scale / state.local_scale, 1.0).clamp(min=1).double()
        squares.append(squared_norm(grad).double())
        limits.append((state.limit * rise).square())
        state.local_scale.copy_(torch.where(scale > 0, scale, state.local_scale))
    sums = [torch.stack([square * (limit > 0), limit]) for square, limit in zip(squares, limits, strict=True)]
    now, allowed = total(torch.stack(sums).sum(0) if sums else torch.zeros(2, 1, dtype=torch.float64))
    factor = torch.where(allowed > 0, (allowed / now).clamp(max=1), 1.0)
    for square, limit, state, round_idx in zip(squares, limits, states, rounds, strict=True):
        counted = torch.where(square.isfinite(), square * factor, limit).sqrt()
        state.limit.copy_(torch.maximum(GROWTH * counted, FORGET * state.limit) * (round_idx > 0))
    return factor


def damped(grads: Tensor, damping: Tensor) -> Tensor:
    """Their product: [P, *], [P] -> [P, *]."""
    return grads * damping.to(grads).view(-1, *[1] * (grads.dim() - 1))
