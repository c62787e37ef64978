"""Evolution strategies, persistent (PES) and plain: meta-gradients of long unrolls from short windows of them.

A particle is an antithetic pair: the same unroll under θ + ε and θ − ε, with ε drawn anew for each window. Its
accumulator ξ is the sum of all ε since the unroll began, which is what the losses of the current window depend on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class Estimate(NamedTuple):
    """Result of one window.

    Attributes:
        gradient: Meta-gradient, mean over particles, {[*S]}.
        accumulator: Accumulators ξ of the next window, {[P, *S]}.
    """

    gradient: Tensors
    accumulator: Tensors


def perturbations(
    parameters: Mapping[str, Tensor], num_particles: int, sigma: float, generator: torch.Generator
) -> Tensors:
    r"""Draw one perturbation per particle.

    .. math:: \varepsilon \sim \mathcal N(0, \sigma^2 I)

    Args:
        parameters: Meta-parameters θ, {[*S]}.
        num_particles: Number of particles P >= 1.
        sigma: Standard deviation σ > 0, in the units of the meta-parameters.
        generator: Generator on the CPU, so that the draw does not depend on the device.

    Returns:
        Perturbations ε, {[P, *S]}.
    """
    return {
        name: (sigma * torch.randn(num_particles, *p.shape, generator=generator, dtype=p.dtype)).to(p.device)
        for name, p in parameters.items()
    }


def antithetic(parameters: Mapping[str, Tensor], noise: Mapping[str, Tensor]) -> Tensors:
    """Join θ + ε of all particles and θ − ε of all particles: {[*S]}, {[P, *S]} to {[2P, *S]}.

    Example:
        >>> antithetic({"w": torch.tensor(1.0)}, {"w": torch.tensor([0.25, 0.5])})["w"].tolist()
        [1.25, 1.5, 0.75, 0.5]
    """
    return {name: torch.cat([p + noise[name], p - noise[name]]) for name, p in parameters.items()}


def pes_gradient(
    loss_pos: Tensor, loss_neg: Tensor, done: Tensor, noise: Tensors, accumulator: Tensors, sigma: float
) -> Estimate:
    r"""Estimate the PES gradient of one window, unbiased also where unrolls end inside it.

    .. math:: \frac{1}{2 \sigma^2 W P} \sum_{p, j} (\ell^+_{jp} - \ell^-_{jp})
        \begin{cases} \xi_p + \varepsilon_p & \text{no unroll of } p \text{ has ended before round } j \\
        \varepsilon_p & \text{else} \end{cases}

    Args:
        loss_pos: Losses under θ + ε, round by round, [W, P].
        loss_neg: Losses under θ − ε, on the same data, [W, P].
        done: Whether round j was the last one of an unroll, [W, P] bool; the next round starts a new one.
        noise: Perturbations ε of this window, {[P, *S]}.
        accumulator: Sum ξ of the earlier ε of the unroll that the window starts in, {[P, *S]}.
        sigma: Standard deviation σ of ε.

    Returns:
        Gradient, and accumulators of the next window: ξ + ε, or ε after an end.

    Source: Vicol et al. 2021 (arXiv 2112.13835), equation 11.

    Example:
        >>> noise, start = {"w": torch.tensor([0.5])}, {"w": torch.tensor([1.0])}
        >>> loss, zero = torch.tensor([[1.0], [1.0]]), torch.zeros(2, 1)
        >>> estimate = pes_gradient(loss, zero, torch.tensor([[True], [False]]), noise, start, sigma=0.5)
        >>> estimate.gradient["w"].item(), estimate.accumulator["w"].item()  # (1 * 1.5 + 1 * 0.5) / (2 * 0.25 * 2)
        (2.0, 0.5)
    """
    ended_before = (done.cumsum(0) - done.long()) > 0
    weights = torch.full_like(loss_pos, 1 / len(loss_pos))
    return _estimate((loss_pos - loss_neg) * weights, ended_before, done, noise, accumulator, sigma)


def published_pes_gradient(
    loss_pos: Tensor,
    loss_neg: Tensor,
    mask: Tensor,
    done: Tensor,
    noise: Tensors,
    accumulator: Tensors,
    sigma: float,
) -> Estimate:
    """Estimate the gradient by the reference code's formula, which is biased towards zero for unrolls of a few windows.

    It credits the last loss of an unroll to ε instead of ξ + ε, and divides by the number of valid rounds in the
    window instead of W. Kept to reproduce published runs.

    Args:
        loss_pos: Losses under θ + ε, round by round, [W, P].
        loss_neg: Losses under θ − ε, on the same data, [W, P].
        mask: Whether the loss of a round counts, [W, P] bool; False for a round that merely resets.
        done: Whether round j was the last one of an unroll, [W, P] bool.
        noise: Perturbations ε of this window, {[P, *S]}.
        accumulator: Sum ξ of the earlier ε of the unroll that the window starts in, {[P, *S]}.
        sigma: Standard deviation σ of ε.

    Returns:
        Gradient, and accumulators of the next window, as `pes_gradient` returns them.

    Source: `truncated_pes.compute_pes_grad` of google/learned_optimization.
    """
    weights = mask.to(loss_pos.dtype) / mask.sum(0)
    return _estimate((loss_pos - loss_neg) * weights, done.cumsum(0) > 0, done, noise, accumulator, sigma)


def truncated_es_gradient(loss_pos: Tensor, loss_neg: Tensor, noise: Tensors, sigma: float) -> Estimate:
    r"""Estimate the gradient by plain truncated evolution strategies, blind to what happened before the window.

    .. math:: \frac{1}{2 \sigma^2 W P} \sum_{p, j} (\ell^+_{jp} - \ell^-_{jp})\, \varepsilon_p

    The baseline to PES. Both signs must start the window from the same state.

    Args:
        loss_pos: Losses under θ + ε, round by round, [W, P].
        loss_neg: Losses under θ − ε, on the same data, [W, P].
        noise: Perturbations ε of this window, {[P, *S]}.
        sigma: Standard deviation σ of ε.

    Returns:
        Gradient, and accumulators that stay 0.

    Example:
        >>> noise, loss = {"w": torch.tensor([0.5])}, torch.tensor([[1.0], [1.0]])
        >>> truncated_es_gradient(loss, torch.zeros(2, 1), noise, sigma=0.5).gradient["w"].item()
        1.0
    """
    delta = (loss_pos - loss_neg) / len(loss_pos)
    zeros = {name: torch.zeros_like(eps) for name, eps in noise.items()}
    never = torch.zeros_like(delta, dtype=torch.bool)
    return Estimate(_estimate(delta, ~never, never, noise, zeros, sigma).gradient, zeros)


def _estimate(
    delta: Tensor, fresh: Tensor, done: Tensor, noise: Tensors, accumulator: Tensors, sigma: float
) -> Estimate:
    """Credit the differences of `fresh` rounds to ε and the others to ξ + ε."""
    to_noise = (delta * fresh).sum(0)
    to_sum = (delta * ~fresh).sum(0)
    restarted = done.any(0)
    gradient, advanced = {}, {}
    for name, eps in noise.items():
        column = (-1,) + (1,) * (eps.dim() - 1)
        total = accumulator[name] + eps
        credit = to_sum.to(eps.dtype).view(column) * total + to_noise.to(eps.dtype).view(column) * eps
        gradient[name] = credit.mean(0) / (2 * sigma**2)
        advanced[name] = torch.where(restarted.view(column), eps, total)
    return Estimate(gradient, advanced)
