"""Kinds of update: how the output of the network becomes the step. Tensors are [P, X, *] with any trailing shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.functional.ada import AdaState, Decays, Factoring
from lightning_lopt.functional.orthogonal import orthogonalise
from lightning_lopt.functional.whitening import whiten

GATE_RANGE = (-4.0, 0.5)  # of a gate's exponent: it damps more than it pushes
MAX_CORRECTION = 1.0  # in units of the base step
MOMENTUM_WARMUP = 2.0


class Base(NamedTuple):
    """A hand-made step that an update starts from.

    Attributes:
        forms: the step in its three forms, per coordinate, [P, 3, *].
        rms: the root mean square over the tensor that all of them have, [P, 1, *] with trailing dimensions of size 1.
    """

    forms: Tensor
    rms: Tensor


def published(output: Tensor, base: Base | None) -> Tensor:
    r"""The step of the paper: :math:`\lambda_1 d \exp(\lambda_2 m)`, absolute in size.

    Args:
        output: (λ1 d, λ2 m), [P, 2, *]; overwritten.
        base: ignored.

    Returns:
        What is subtracted from the parameter, [P, 1, *].
    """
    direction, magnitude = output.split(1, dim=1)
    return direction.mul_(magnitude.exp_())


def gated(output: Tensor, base: Base | None) -> Tensor:
    r"""A gate on a mean of the three forms b_i of a hand-made base step, plus a correction in its units:

    .. math:: e^{\lambda_2 m} \sum_i \mathrm{softmax}(0, \lambda_2 l)_i\, b_i + \mathrm{rms}(b)\,\lambda_1 d

    A zero output is the mean of all forms; the step anneals with the pseudo-gradient. The exponent is clamped to
    `GATE_RANGE` and λ1 d to ±`MAX_CORRECTION`, which bounds the step by a multiple of the base step.

    Args:
        output: (λ1 d, λ2 m, λ2 l), with two l, [P, 4, *]; overwritten.
        base: the base step.

    Returns:
        What is subtracted from the parameter, [P, 1, *].
    """
    assert base is not None
    correction, gate, logits = output.split([1, 1, 2], dim=1)
    shares = torch.cat([torch.zeros_like(gate), logits], 1).softmax(1)
    step = shares.mul_(base.forms).sum(1, keepdim=True)
    correction.clamp_(-MAX_CORRECTION, MAX_CORRECTION).mul_(base.rms)
    return correction.add_(gate.clamp_(*GATE_RANGE).exp_().mul_(step))


def decays_of_round(decays: Decays, round_idx: Tensor, norm_ratio: Tensor, carried: Tensor | None = None) -> Decays:
    r"""The decays of round t for an update with a base step, whose first momentum is

    .. math:: m_1 \leftarrow \beta_t \min\Big(1, \frac{|g_t|}{|g_{t-1}|}\Big) m_1 + (1 - \beta_t) g_t,\quad
        1 - \beta_t = \max\Big(1 - (1 - \kappa)\,\beta_1, \frac{2}{t + 2}\Big)

    with g already damped.

    In the first rounds there is little to remember: it is g itself in round 0, then for a while a mean over about the
    last half of the rounds. And where the pseudo-gradient becomes smaller, as with a learning rate that decays, what
    is remembered does so, too. What the workers' own momentum keeps from round to round is not remembered again: with
    heavy-ball momentum μ and H local steps that is a share κ = μ^H of its velocity.

    Args:
        decays: of the network.
        round_idx: t, from 0, [P].
        norm_ratio: of the tensor's pseudo-gradients in this round and the one before, [P].
        carried: κ in [0, 1], [P]; None for 0.

    Source: Shamir and Zhang 2013, arXiv 1212.1824: polynomial-decay averaging with η = 1, until it is as slow as β_1.

    Example:
        >>> decays, ones = Decays(*torch.full((3, 1, 3), 0.1)), torch.ones(1)
        >>> [round(1 - decays_of_round(decays, t * ones, ones).momentum[0, 0].item(), 2) for t in (0, 4, 12, 99)]
        [0.0, 0.67, 0.86, 0.9]
    """
    first, others = decays.momentum.tensor_split([1], 1)
    if carried is not None:
        first = first + carried[:, None].to(first) * (1 - first)
    floor = MOMENTUM_WARMUP / (round_idx[:, None].to(first) + MOMENTUM_WARMUP)
    momentum = torch.cat([torch.maximum(first, floor), others], 1)
    return decays._replace(momentum=momentum, shrink=norm_ratio.clamp(max=1))


def carried(momentum: float, local_steps: int) -> float:
    """The share μ^H of heavy-ball momentum μ that is left of it after a round; 0 without momentum or steps.

    Example:
        >>> round(carried(0.9, 4), 4), carried(0.0, 0), carried(float("nan"), 4)
        (0.6561, 0.0, 0.0)
    """
    return min(momentum, 1.0) ** local_steps if momentum > 0 and local_steps else 0.0


def nesterov(grad: Tensor, momentum: Tensor, decays: Decays) -> Tensor:
    r"""Nesterov momentum: :math:`s = g + \frac{\beta}{1-\beta} m`, with the first momentum accumulator.

    Args:
        grad: [P, 1, B, a, b].
        momentum: [P, 3, B, a, b], already advanced.
        decays: complements of the decays of this round.

    Returns:
        [P, 1, B, a, b].
    """
    keep = decays.momentum[:, :1, None, None, None]
    return torch.addcmul(grad, (1 - keep) / keep, momentum[:, :1])


class Update(NamedTuple):
    """A kind of update.

    Attributes:
        step: how the network's output becomes the step.
        relative: whether it starts from a base step, in three forms, which take Gram matrices. The network then sees
            the statistics of the tensor, and no feature changes with the scale of g.
        num_outputs: of the network: direction and magnitude; or correction, gate, and what decides between the forms.
    """

    step: Callable[[Tensor, Base | None], Tensor]
    relative: bool
    num_outputs: int


UPDATES = {
    "published": Update(published, relative=False, num_outputs=2),
    "blended_nesterov": Update(gated, relative=True, num_outputs=4),
}


def base_forms(step: Tensor, state: AdaState, factors: Factoring, like: Tensor) -> Tensor:
    """A Nesterov step as it is, orthogonalised (a vector as it is) and whitened.

    Args:
        step: [P, 1, B, a, b].
        state: the accumulators, already advanced.
        factors: the factoring of the parameter.
        like: a tensor of the parameter's shape, [P, *S].

    Returns:
        [P, 3, B, a, b].
    """
    whole = factors.restore(step, like)
    orthogonal = factors.matrices(orthogonalise(whole)) if factors.factored else step
    return torch.cat([step, orthogonal, factors.matrices(whiten(whole, state))], 1)
