"""The plain form of the learned step: the paper's formulas, every feature formed for every coordinate.

Slow and hungry (over 39 floats per parameter). `functional.learned` is tested and timed against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lopt.functional import ada
from lightning_lopt.functional.ada import AdaState, Epsilons, Factoring
from lightning_lopt.functional.damping import damped
from lightning_lopt.functional.layers import Network
from lightning_lopt.functional.updates import UPDATES, Base, base_forms, decays_of_round, nesterov
from lightning_lopt.functional.whitening import update_grams


def features(
    param: Tensor, grad: Tensor, inputs: Tensor, state: AdaState, eps: Epsilons, round_idx: Tensor, factors: Factoring
) -> Tensor:
    """All features in the documented order, normalised, from accumulators already advanced.

    Args:
        param: [P, 1, B, a, b].
        grad: averaged pseudo-gradient, [P, 1, B, a, b].
        inputs: the pseudo-gradients that the network sees, [P, G, B, a, b].
        state: the accumulators.
        eps: what is added before roots and divisions.
        round_idx: [P].
        factors: the factoring of the parameter.

    Returns:
        [P, G + 38, B, a, b].
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
    """The features of the whole tensor that `layers.tensor_features` makes from sums, [P, 11]."""
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
    """The network on every coordinate: [P, F, B, a, b] -> (λ1 d, λ2 m, ...) as [P, outputs, B, a, b]."""
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
    carried: Tensor | None = None,
) -> None:
    """`functional.learned.step`, in the plain form; same arguments.

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
    kind, base = UPDATES[network.update], None
    factors = ada.factoring(tuple(param.shape[1:]))
    if kind.relative and damping is not None:
        grad, worker_grads = damped(grad, damping), None if worker_grads is None else damped(worker_grads, damping)
    p, g = factors.matrices(param), factors.matrices(grad)
    inputs = g
    if worker_grads is not None:
        inputs = torch.cat([factors.matrices(worker) for worker in worker_grads.unbind(1)], 1)
    squares = g.square().squeeze(1)
    sums = squares.sum(factors.col_axis), squares.sum(factors.row_axis)
    if kind.relative:
        decays = decays_of_round(network.decays, round_idx, ada.norm_ratio(state, sums), carried)
        network = network._replace(decays=decays)
        update_grams(state, grad)
    ada.update_factors(state, sums, network.decays, factors)
    ada.update_moments(state.momentum, state.second.unsqueeze(1), g, network.decays)

    eps = ada.epsilons(state, relative=kind.relative)
    seen = features(p, g, inputs, state, eps, round_idx, factors)
    if kind.relative:
        context = tensor_features(p, g, state, network, round_idx, factors)
        seen = torch.cat([seen, context[:, :, None, None, None].expand(-1, -1, *g.shape[2:])], 1)
        base_step = nesterov(g, state.momentum, network.decays)
        rms = base_step.square().mean((2, 3, 4), keepdim=True).sqrt()
        base = Base(base_forms(base_step, state, factors, param), rms)
    change = kind.step(evaluate(seen, network), base)
    param.copy_(factors.restore(p - change, param))
