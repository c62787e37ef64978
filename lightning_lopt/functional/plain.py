"""The slow, readable form of the learned step: the paper's formulas, every feature formed for every coordinate.

It needs over 39 floats per parameter. No optimizer calls it: `functional.learned`, the fast form that runs, is tested
and timed against it. Whoever wants to understand the step, or to change it, begins here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lopt.functional import ada
from lightning_lopt.functional.ada import AdaState, Epsilons, Factoring
from lightning_lopt.functional.damping import damped
from lightning_lopt.functional.layers import Network
from lightning_lopt.functional.updates import Base


def features(
    param: Tensor, grad: Tensor, inputs: Tensor, state: AdaState, eps: Epsilons, round_idx: Tensor, factors: Factoring
) -> Tensor:
    """Form all features but those of the tensor, in the order of `features.FEATURES`, normalised.

    Args:
        param: Parameter, [P, 1, B, a, b].
        grad: Averaged pseudo-gradient, [P, 1, B, a, b].
        inputs: Pseudo-gradients that the network sees, [P, G, B, a, b].
        state: Accumulators of the tensor, already advanced.
        eps: Terms added before roots and divisions.
        round_idx: Number of steps already taken, from 0, [P].
        factors: Factoring of the parameter.

    Returns:
        Features, [P, G + 38, B, a, b].
    """
    eps_factor, eps_second, eps_rsqrt = (e.unsqueeze(-1) for e in eps[:3])
    m, v, g = state.momentum, state.second.unsqueeze(1), grad
    full = (len(grad), 3, *grad.shape[2:])
    row = state.row.unsqueeze(factors.col_axis).expand(full)
    if factors.factored:
        col = state.col.unsqueeze(factors.row_axis).expand(full)
        row_mean = state.row.mean(-1, keepdim=True).unsqueeze(factors.col_axis)
        row_factor = (row / (row_mean + eps_factor)).clamp(min=1e-9).rsqrt()
        col_factor = col.clamp(min=eps_factor).rsqrt()
        fac_g, fac_m = g * row_factor * col_factor, m * row_factor * col_factor
    else:
        col = row
        fac_g = g * (row + eps_factor).clamp(min=eps_factor).rsqrt()
        fac_m = m * (row + eps_second) ** -0.5
    rsqrt_v = (v + eps_second).rsqrt()
    rsqrt_row, rsqrt_col = (row + eps_rsqrt).rsqrt(), (col + eps_rsqrt).rsqrt()
    raw = torch.cat([inputs, param, m, v, m * rsqrt_v, rsqrt_v, fac_g, row, col, rsqrt_row, rsqrt_col, fac_m], 1)
    normalised = raw * (raw.square().mean((2, 3, 4), keepdim=True) + eps.rms).rsqrt()
    time = ada.time_features(round_idx, raw.dtype)[:, :, None, None, None].expand(-1, -1, *grad.shape[2:])
    return torch.cat([normalised, time], 1)


def tensor_features(
    param: Tensor, grad: Tensor, state: AdaState, network: Network, round_idx: Tensor, factors: Factoring
) -> Tensor:
    """Form the features of the whole tensor that `layers.tensor_features` makes from sums, [P, 11]."""
    tiny, age = ada.MIN_SCALE, (round_idx + 1)[:, None]
    products = (grad * state.momentum).mean((2, 3, 4))
    g, p, m = (x.square().mean((2, 3, 4)) for x in (grad, param, state.momentum))
    grown = 1 - (1 - network.decays.momentum).clamp(min=0) ** age
    grown[:, 0] = 1
    unbiased_m = m / grown.square()
    unbiased_r = state.row.mean((2, 3)) / (1 - (1 - network.decays.factored) ** age)
    ratios = torch.cat([(unbiased_m + tiny) / (g + tiny), (g + tiny) / (unbiased_r + tiny), (g + tiny) / (p + tiny)], 1)
    is_vector = torch.full_like(g, float(not factors.factored))
    return torch.cat([products / (g * m).sqrt().clamp(min=tiny), (ratios.log() / 4).clamp(-3, 3), is_vector], 1)


def evaluate(all_features: Tensor, network: Network) -> Tensor:
    """Run the network on every coordinate: [P, F, B, a, b] to (λ1 d, λ2 m, ...) as [P, outputs, B, a, b]."""
    hidden = all_features.flatten(2)
    for layer, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        hidden = weight @ (hidden.relu() if layer else hidden) + bias.unsqueeze(-1)
    direction, gates = hidden.unflatten(2, all_features.shape[2:]).tensor_split([1], dim=1)
    return torch.cat([network.step_mult * direction, network.exp_mult * gates], 1)


@torch.no_grad()
def step(
    param: Tensor,
    grad: Tensor,
    state: AdaState,
    network: Network,
    round_idx: Tensor,
    worker_grads: Tensor | None = None,
    damping: Tensor | None = None,
    retained_momentum: Tensor | None = None,
) -> None:
    """Take the step of `functional.learned.step`, in the plain form; arguments are the same.

    Example:
        >>> from lightning_lopt import AdaMLP
        >>> from lightning_lopt.functional import learned
        >>> network, grad, results = AdaMLP(seed=0).functional(), torch.tensor([[1.0, 0.0, -1.0]]), []
        >>> for form in (step, learned.step):
        ...     results.append(torch.ones(1, 3))
        ...     state = AdaState.zeros((3,), 1, torch.float32, grad.device)
        ...     form(results[-1], grad, state, network, torch.tensor([0]))
        >>> torch.allclose(*results, rtol=0, atol=1e-6)
        True
    """
    if param.numel() == 0:
        return
    factors, update = ada.factoring(tuple(param.shape[1:])), network.update
    if damping is not None:
        grad, worker_grads = damped(grad, damping), None if worker_grads is None else damped(worker_grads, damping)
    p, g = factors.matrices(param), factors.matrices(grad)
    inputs = g
    if worker_grads is not None:
        inputs = torch.cat([factors.matrices(worker) for worker in worker_grads.unbind(1)], 1)
    squares = g.square().squeeze(1)
    sums = squares.sum(factors.col_axis), squares.sum(factors.row_axis)
    decays = update.decays_of_round(network.decays, round_idx, retained_momentum)
    decays = update.advance(state, grad, sums, decays)
    network = network._replace(decays=decays)
    ada.update_factors(state, sums, decays, factors)
    ada.update_moments(state.momentum, state.second.unsqueeze(1), g, decays)

    seen = features(p, g, inputs, state, update.epsilons(state), round_idx, factors)
    if "tensor" in update.feature_kinds:
        context = tensor_features(p, g, state, network, round_idx, factors)
        seen = torch.cat([seen, context[:, :, None, None, None].expand(-1, -1, *g.shape[2:])], 1)
    forms = update.base_forms(g, state, decays, factors, param)
    base = None if forms is None else Base(forms, forms[:, :1].square().mean((2, 3, 4), keepdim=True).sqrt())
    change = update.step(evaluate(seen, network), base)
    param.copy_(factors.restore(p - change, param))
