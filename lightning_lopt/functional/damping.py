"""How much of a pseudo-gradient counts that is larger than those before it let expect."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_lopt.functional.ada import AdaState, squared_norm

GROWTH = 1.5  # of |g| in a round, from which on it is damped


def damping(
    grads: Iterable[Tensor],
    states: Iterable[AdaState],
    local_scales: Iterable[Tensor],
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    r"""What all pseudo-gradients of a round are multiplied with before a step that is relative to them.

    .. math:: d_t = \min\Big(1, c \max\big(1, \tfrac{s_t}{s_{t-1}}\big) \frac{n_{t-1}}{|g_t|}\Big)^2,\qquad
        n_t = \sqrt{d_t}\,|g_t|,\qquad c = 1.5

    with norms over all tensors. Local steps that diverge are seen in norms that grow from round to round; the larger
    g is, the less of it is left, as in redescending estimators, so that one wild round moves next to nothing. But what
    is expected of the next round grows by c all the same: what stays large counts again after some rounds. Growth that
    comes from more local steps or a higher local learning rate (s = γH) is not damped, nor that of tensors whose g has
    always been 0.

    Args:
        grads: averaged pseudo-gradient of each tensor, [P, *S].
        states: its accumulators; remembers s.
        local_scales: s >= 0, [P]; 0 or nan where it is not known.
        total: makes sums over all shards of these over the given tensors, [2, P].

    Returns:
        d in (0, 1], [P].

    Example:
        >>> state, unknown = AdaState.zeros((2,), 1, torch.float32, torch.device("cpu")), torch.zeros(1)
        >>> state.square[:] = 4.0
        >>> [round(damping([torch.tensor([[x, 0.0]])], [state], [unknown]).item(), 4) for x in (3, 5, 25)]
        [1.0, 0.36, 0.0144]
    """
    sums = []
    for grad, state, scale in zip(grads, states, local_scales, strict=True):
        known = (scale > 0) & (state.local_scale > 0)
        rise = torch.where(known, scale / state.local_scale, 1.0).clamp(min=1)
        sums.append(torch.stack([squared_norm(grad) * (state.square > 0), state.square * rise.square()]).double())
        state.local_scale.copy_(torch.where(scale > 0, scale, state.local_scale))
    now, expected = total(torch.stack(sums).sum(0) if sums else torch.zeros(2, 1))
    return torch.where(expected > 0, (GROWTH**2 * expected / now).clamp(max=1), 1.0)


def damped(grads: Tensor, damping: Tensor) -> Tensor:
    """Their product: [P, *], [P] -> [P, *]."""
    return grads * damping.to(grads).view(-1, *[1] * (grads.dim() - 1))
