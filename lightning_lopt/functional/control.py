"""A linear controller of the blended Nesterov step: settings of each tensor in each round, from how the run goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lopt.functional.ada import BaseState, factoring, squared_norm
from lightning_lopt.functional.blended import BlendedSettings
from lightning_lopt.functional.model import ModelTensor
from lightning_lopt.functional.phase import LocalDecay, contraction

INPUTS = (
    "phase",  # log of the share of the local learning rate that is left
    "fall",  # log of that rate over the one of the round before
    "contraction",  # log of `phase.contraction`
    "local_steps",  # log H
    "retained",  # share of their momentum that the workers retain
    "age",  # log(1 + t)
    "cosine",  # of the pseudo-gradient and the momentum before it
    "mean_cosine",  # over about five rounds
    "growth",  # log of the pseudo-gradient's norm over that of the round before
    "level",  # log of that norm over its mean of about ten rounds
    "momentum_over_grad",  # log of the ratio of norms
    "grad_over_param",
    "aspect",  # log of the ratio of the first side to the product of the others, in absolute value
    "is_vector",
    "phase_local_steps",  # products
    "phase_cosine",
    "phase_retained",
)
OUTPUTS = ("rate", "memory", "orthogonal", "whitened")
BOUND = 1.5  # of the outputs
SMALLEST_SHARE = 0.01  # of the local learning rate; less counts as this
COSINE_ROUNDS, LEVEL_ROUNDS = 5.0, 10.0
TINY = 1e-30


class ControllerWeights(NamedTuple):
    """Meta-parameters of a controller, each with a leading dimension P, or 1 for all particles.

    Attributes:
        weight: Weights, [P, 4, 17].
        bias: Biases, [P, 4].
        low: Lower ends of the inputs, [P, 17], to which they are clamped.
        high: Upper ends, [P, 17].
    """

    weight: Tensor
    bias: Tensor
    low: Tensor
    high: Tensor


class LocalPhase(NamedTuple):
    """Phase of the local training of a tensor.

    Attributes:
        share: Share of the local learning rate that is left since it last rose, in [0, 1], [P].
        fall: Logarithm of the rate over that of the round before, [P].
        contraction: Value of `phase.contraction`, [P].
        local_steps: Number of local steps H, [P].
    """

    share: Tensor
    fall: Tensor
    contraction: Tensor
    local_steps: Tensor

    @classmethod
    def of(cls, before: Sequence[LocalDecay], now: Sequence[LocalDecay], local_steps: int, like: Tensor) -> LocalPhase:
        """Compute the phase of P runs.

        Args:
            before: Decay of each run before the round.
            now: Decay of each run with the round.
            local_steps: Number of local steps H of the round.
            like: Tensor of the type and on the device of the result.
        """
        falls = [math.log(n.now / b.now) if n.now > 0 and b.now > 0 else 0.0 for b, n in zip(before, now, strict=True)]
        shares = [n.share for n in now]
        rows = shares, falls, [contraction(share, local_steps) for share in shares], [max(local_steps, 1)] * len(now)
        return cls(*like.new_tensor(rows).unbind())


@dataclass
class ControlledState(BaseState):
    """Memory of the controlled step of one parameter tensor, updated in place.

    Attributes:
        mean_cosine: Mean cosine of pseudo-gradients and the momentum before them, [P].
        log_norm: Logarithm of the norm of the last pseudo-gradient, [P].
        log_level: Its mean, [P].
    """

    mean_cosine: Tensor
    log_norm: Tensor
    log_level: Tensor

    @override
    @classmethod
    def zeros(
        cls, shape: tuple[int, ...], num_particles: int, dtype: torch.dtype, device: torch.device
    ) -> ControlledState:
        numbers = [torch.zeros(num_particles, dtype=dtype, device=device) for _ in range(3)]
        return cls(*vars(BaseState.zeros(shape, num_particles, dtype, device)).values(), *numbers)


def observe(tensor: ModelTensor[ControlledState], phase: LocalPhase) -> Tensor:
    r"""Compute the inputs of a tensor before its step, and advance its memory of them.

    No input changes with the scale of the loss or, but for the ratio to the parameter, of the pseudo-gradients.

    Args:
        tensor: Tensor with its averaged pseudo-gradient.
        phase: Phase of its local training.

    Returns:
        Inputs in the order of `INPUTS`, [P, 17].
    """
    grad, param, state = tensor.grad, tensor.param, tensor.state
    matrices = factoring(tuple(param.shape[1:])).matrices(grad)
    squared, squared_momentum = squared_norm(grad), squared_norm(state.momentum)
    inner = (matrices * state.momentum).flatten(1).sum(1)
    age = tensor.round_idx.to(grad)
    begun = age > 0
    cosine = inner / (squared * squared_momentum).sqrt().clamp(min=TINY)
    cosine = torch.where(begun, cosine, 0).clamp(-1, 1)
    log_grad = _log_norm(squared)
    growth = torch.where(begun, log_grad - state.log_norm, 0)
    state.log_norm.copy_(log_grad)
    state.mean_cosine.lerp_(cosine, _weight(age - 1, COSINE_ROUNDS) * begun)
    state.log_level.lerp_(log_grad, _weight(age, LEVEL_ROUNDS))
    share, steps = phase.share.clamp(min=SMALLEST_SHARE).log(), phase.local_steps.log()
    retained = tensor.retained_momentum.to(grad)
    shape = param.shape[1:]
    sides = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, 1)
    inputs = [
        share,
        phase.fall.clamp(-1, 1),
        phase.contraction.clamp(min=SMALLEST_SHARE).log(),
        steps,
        retained,
        (age + 1).log(),
        cosine,
        state.mean_cosine,
        growth.clamp(-2, 2),
        (log_grad - state.log_level).clamp(-3, 3),
        torch.where(begun, _log_norm(squared_momentum) - log_grad, 0).clamp(-3, 3),
        (log_grad - _log_norm(squared_norm(param.to(grad)))).clamp(-10, 2),
        torch.full_like(age, abs(math.log(sides[0] / sides[1])) if min(sides) else 0.0),
        torch.full_like(age, float(len(shape) < 2)),
        share * steps,
        share * state.mean_cosine,
        share * retained,
    ]
    return torch.stack([each.expand_as(age) for each in inputs], 1).nan_to_num(0, 0, 0)


def _log_norm(squared: Tensor) -> Tensor:
    return 0.5 * (squared + TINY).log()


def _weight(age: Tensor, rounds: float) -> Tensor:
    """Weight of the newest value in a mean over all rounds, later over about the last `rounds`."""
    return (1 / (age + 1).clamp(min=1)).clamp(min=1 / rounds)


def controlled(inputs: Tensor, weights: ControllerWeights, base: BlendedSettings) -> BlendedSettings:
    r"""Change the settings of a step.

    .. math:: u = 1.5 \tanh\Big(\frac{W x + b}{1.5}\Big),\qquad 1 - \beta' = (1 - \beta)\, e^{u_2},\qquad
        \frac{\mathrm{lr}'}{1 - \beta'} = \frac{\mathrm{lr}}{1 - \beta}\, e^{u_1},\qquad
        w' \propto (w_1, w_2 e^{u_3}, w_3 e^{u_4})

    with the inputs x clamped to their ends. With W = 0 and b = 0 the settings stay, bit for bit.

    Args:
        inputs: Result of `observe`, [P, 17].
        weights: Meta-parameters.
        base: Settings without control, [P] and [P, 3].

    Example:
        >>> number = lambda *x: torch.tensor([x])
        >>> zero = ControllerWeights(torch.zeros(1, 4, 17), number(0.0, -0.5, 0.0, 0.0), number(-9.0), number(9.0))
        >>> base = BlendedSettings(torch.tensor([1.0]), torch.tensor([0.9]), number(0.2, 0.3, 0.5))
        >>> [round(x.item(), 3) for x in controlled(torch.zeros(1, 17), zero, base)[:2]]
        [0.617, 0.938]
    """
    clamped = inputs.clamp(weights.low, weights.high).unsqueeze(2)
    sums = torch.matmul(weights.weight, clamped).squeeze(2) + weights.bias
    rate, memory, *logits = (BOUND * torch.tanh(sums / BOUND)).unbind(1)
    momentum = base.momentum + (1 - base.momentum) * (1 - memory.exp())
    blend = base.blend * torch.stack([torch.zeros_like(rate), *logits], 1).exp()
    blend = blend * (base.blend.sum(1, keepdim=True) / blend.sum(1, keepdim=True))
    return BlendedSettings(base.lr * (rate + memory).exp(), momentum, blend)
