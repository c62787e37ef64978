"""The blended Nesterov step, made by hand: a Nesterov step as it is, orthogonalised and whitened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.functional import orthogonal, whitening
from lightning_lopt.functional.ada import SQUARE_EPS, BaseState, Factoring, factoring, squared_norm
from lightning_lopt.functional.damping import Total, damped, damping, local_total
from lightning_lopt.functional.integers import as_number
from lightning_lopt.functional.model import ModelTensor, groups_of_one_shape, step_together
from lightning_lopt.functional.orthogonal import Polynomials, orthogonalise
from lightning_lopt.functional.products import norm
from lightning_lopt.functional.whitening import update_grams, whiten

MOMENTUM_WARMUP = 2.0
LR, MOMENTUM, BLEND = 1.1, 0.85, (0.05, 0.45, 0.5)  # made by hand
ADAM_POWER = 2.0  # made by hand


def retained_momentum(momentum: float, local_steps: int) -> float:
    """Compute the share μ^H of heavy-ball momentum μ that is left of it after a round.

    Args:
        momentum: Momentum μ of the local optimizer; 0 or nan without one.
        local_steps: Number of local steps H; 0 where nothing was retained.

    Example:
        >>> round(retained_momentum(0.9, 4), 4), retained_momentum(0.0, 0), retained_momentum(float("nan"), 4)
        (0.6561, 0.0, 0.0)
    """
    return min(momentum, 1.0) ** local_steps if momentum > 0 and local_steps else 0.0


def momentum_of_adam(beta: float) -> float:
    """Compute the heavy-ball momentum β1² that counts as retained for Adam's first moment with decay β1.

    Source: ours; the power was chosen by hand, among 0 (none), 1 and 2.

    Example:
        >>> round(momentum_of_adam(0.9), 2)
        0.81
    """
    return beta**ADAM_POWER


def norm_ratio(state: BaseState, squared: Tensor) -> Tensor:
    """Divide the norm of the pseudo-gradient by that of the round before, and remember it for the next round.

    Args:
        state: Memory of the parameter.
        squared: Squared norm of the pseudo-gradient, [P].

    Returns:
        Ratio |g_t| / |g_{t-1}|, [P]; infinite after 0.
    """
    ratio = ((squared + SQUARE_EPS) / state.squared_norm).sqrt_()
    state.squared_norm.copy_(squared)
    return ratio


def complement_of_round(complement: Tensor, round_idx: Tensor, retained: Tensor | None = None) -> Tensor:
    r"""Compute the complement of the momentum's decay in round t.

    .. math:: 1 - \beta_t = \max\Big(1 - (1 - \kappa)\,\beta, \frac{2}{t + 2}\Big)

    In the first rounds there is little to remember: the momentum is g itself in round 0, then for a while a mean over
    about the last half of the rounds. And what the workers' own momentum retains from round to round is not remembered
    again: with heavy-ball momentum μ and H local steps that is a share κ = μ^H of its velocity.

    Args:
        complement: Complement 1 - β, [P, 1].
        round_idx: Number of steps already taken t, from 0, [P].
        retained: Share κ in [0, 1], [P]; None for 0.

    Source: Shamir and Zhang 2013, arXiv 1212.1824: polynomial-decay averaging with η = 1, until it is as slow as β.

    Example:
        >>> keep, t = torch.full((1, 1), 0.1), torch.ones(1)
        >>> [round(1 - complement_of_round(keep, rounds * t).item(), 2) for rounds in (0, 4, 12, 99)]
        [0.0, 0.67, 0.86, 0.9]
    """
    if retained is not None:
        complement = complement + retained[:, None].to(complement) * (1 - complement)
    floor = MOMENTUM_WARMUP / (round_idx[:, None].to(complement) + MOMENTUM_WARMUP)
    return torch.maximum(complement, floor)


def nesterov(grad: Tensor, momentum: Tensor, complement: Tensor) -> Tensor:
    r"""Compute the Nesterov step :math:`s = g + \frac{\beta}{1-\beta} m`.

    Args:
        grad: Averaged pseudo-gradient g, [P, 1, B, a, b].
        momentum: Momentum m, already advanced, [P, 1, B, a, b].
        complement: Complement 1 - β of the decay of this round, [P, 1].

    Returns:
        Step s, [P, 1, B, a, b].
    """
    keep = complement[..., None, None, None]
    return torch.addcmul(grad, (1 - keep) / keep, momentum)


class Roots(NamedTuple):
    """Polynomials by which a step is brought to its forms.

    Attributes:
        orthogonal: Those with which it is orthogonalised.
        whitened: Those with which it is whitened.
    """

    orthogonal: Polynomials = orthogonal.POLYNOMIALS
    whitened: Polynomials = whitening.POLYNOMIALS


ROOTS, FORMER_ROOTS = Roots(), Roots(orthogonal.FORMER_POLYNOMIALS, whitening.FORMER_POLYNOMIALS)


def base_forms(step: Tensor, state: BaseState, factors: Factoring, like: Tensor, roots: Roots = ROOTS) -> Tensor:
    """Stack a Nesterov step as it is, orthogonalised (a vector as it is) and whitened.

    Args:
        step: Nesterov step, [P, 1, B, a, b].
        state: Memory of the parameter, already advanced.
        factors: Factoring of the parameter.
        like: Tensor of the parameter's shape, [P, *S].
        roots: Polynomials of the forms.

    Returns:
        Forms of the step, all of one norm, [P, 3, B, a, b].
    """
    whole = factors.restore(step, like)
    size = norm(whole)
    orthogonalised = factors.matrices(orthogonalise(whole, size, roots.orthogonal)) if factors.factored else step
    return torch.cat([step, orthogonalised, factors.matrices(whiten(whole, state, size, roots.whitened))], 1)


def zero_where_unused(step: Tensor, forms: Tensor) -> Tensor:
    """Set a step to 0 where the Nesterov step is 0: the pseudo-gradient of such a coordinate is and was exactly 0.

    Args:
        step: Step made of the forms, [P, 1, B, a, b]; overwritten.
        forms: Result of `base_forms`, of which the first one is the Nesterov step, [P, N, B, a, b].

    Returns:
        The step.

    Example:
        >>> forms = torch.tensor([0.0, 2.0]).view(1, 1, 1, 1, 2)
        >>> zero_where_unused(torch.ones(1, 1, 1, 1, 2), forms).flatten()
        tensor([0., 1.])
    """
    return step.masked_fill_(forms[:, :1] == 0, 0)


class BlendedSettings(NamedTuple):
    """Hyperparameters of the blended Nesterov step.

    Attributes:
        lr: Learning rate, [P].
        momentum: Momentum β in [0, 1), [P].
        blend: Weights of the three forms, [P, 3].
    """

    lr: Tensor
    momentum: Tensor
    blend: Tensor

    @classmethod
    def by_hand(cls, num_particles: int, like: Tensor) -> BlendedSettings:
        """Repeat the hyperparameters made by hand for P particles.

        Args:
            num_particles: Number of particles P.
            like: Tensor of the type and on the device of the result.
        """
        return cls(*(like.new_tensor([value] * num_particles) for value in (LR, MOMENTUM, BLEND)))


def check_settings(lr: float, momentum: float, blend: Sequence[float]) -> None:
    """Raise a ValueError that names which hyperparameter of the blended Nesterov step is out of its range."""
    if not 0 < as_number(lr) < math.inf:
        raise ValueError(f"The blended Nesterov step needs a finite lr > 0, not {lr!r}.")
    if not 0 <= as_number(momentum) < 1:
        raise ValueError(f"The blended Nesterov step needs momentum in [0, 1), not {momentum!r}.")
    if len(blend) != 3 or not min(blend) >= 0 or not abs(sum(blend) - 1) < 1e-6:
        raise ValueError(f"blend must be three weights >= 0 whose sum is 1, not {blend!r}.")


@torch.no_grad()
def step_model(
    tensors: Sequence[ModelTensor[BaseState]], settings: Sequence[BlendedSettings], total: Total = local_total
) -> None:
    r"""Take one blended Nesterov step of a whole model, in place.

    .. math:: m \leftarrow \beta_t \min\Big(1, \frac{|g_t|}{|g_{t-1}|}\Big) m + (1 - \beta_t) g,\quad
        s = g + \frac{\beta_t}{1-\beta_t} m,\quad p \leftarrow p - \mathrm{lr}\,(w_1 s + w_2 O(s) + w_3 W(s))

    in round t, with g already multiplied by its `damping` and the 1 - β_t of `complement_of_round`: Nesterov momentum
    that grows to its β over the first rounds, and shrinks with the pseudo-gradient, as when a learning rate decays. O
    makes the singular values of a matrix nearly equal (`orthogonalise`), and leaves a vector as it is; W whitens by
    recent pseudo-gradients (`whiten`). Both keep the norm. Coordinates whose pseudo-gradient is and was exactly 0 stay
    (`zero_where_unused`).

    Args:
        tensors: Tensors of the model.
        settings: Hyperparameters of each tensor, in its type.
        total: Sum over the shards of the model.
    """
    factor = damp_model(tensors, [tensor.state for tensor in tensors], total)
    for group in groups_of_one_shape(tensors, [None] * len(tensors)):
        several = zip(*(settings[i] for i in group), strict=True)
        joined = BlendedSettings(*map(torch.cat, several)) if len(group) > 1 else settings[group[0]]
        step_together([tensors[i] for i in group], partial(_step, settings=joined, factor=factor.repeat(len(group))))


def damp_model(tensors: Sequence[ModelTensor[Any]], states: Sequence[BaseState], total: Total = local_total) -> Tensor:
    """Compute the `damping` of a model.

    Args:
        tensors: Tensors of the model.
        states: Memory of each tensor.
        total: Sum over the shards of the model.
    """
    grads, rounds = [tensor.grad for tensor in tensors], [tensor.round_idx for tensor in tensors]
    return damping(grads, states, rounds, [tensor.local_scale for tensor in tensors], total)


def _step(tensor: ModelTensor[BaseState], settings: BlendedSettings, factor: Tensor) -> None:
    param, state = tensor.param, tensor.state
    factors = factoring(tuple(param.shape[1:]))
    grad = damped(tensor.grad, factor)
    complement = complement_of_round(1 - settings.momentum[:, None], tensor.round_idx, tensor.retained_momentum)
    shrink = norm_ratio(state, squared_norm(grad)).clamp(max=1)
    update_grams(state, grad)
    matrices = factors.matrices(grad)
    state.momentum.mul_(shrink.view(-1, 1, 1, 1, 1)).lerp_(matrices, complement[..., None, None, None])
    forms = base_forms(nesterov(matrices, state.momentum, complement), state, factors, param)
    weights = (settings.lr[:, None] * settings.blend)[..., None, None, None]
    step = zero_where_unused((weights * forms).sum(1, keepdim=True), forms)
    param.sub_(factors.restore(step, param))
