"""Kinds of update: how the output of the network becomes the step. Tensors are [P, X, *] with any trailing shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.functional.ada import Decays

GATE_RANGE = (-4.0, 2.0)  # of a gate's exponent
MAX_CORRECTION = 8.0  # in units of the base step


class Base(NamedTuple):
    """A hand-made step that an update starts from.

    Attributes:
        terms: whose sum is the step, per coordinate, [P, M, *].
        rms: root mean square of their sum over the tensor, [P, 1, *] with trailing dimensions of size 1.
    """

    terms: Tensor
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
    r"""Gates on the terms of a hand-made base step, plus a correction in its units:
    :math:`\sum_j b_j \exp(\lambda_2 m_j) + \mathrm{rms}(b)\,\lambda_1 d`.

    A zero output is the base step itself; the step anneals with the pseudo-gradient. Exponents are clamped to
    `GATE_RANGE` and λ1 d to ±`MAX_CORRECTION`, which bounds the step by a multiple of the base step.

    Args:
        output: (λ1 d, λ2 m_1, ..., λ2 m_M), [P, 1 + M, *]; overwritten.
        base: the base step, of M terms.

    Returns:
        What is subtracted from the parameter, [P, 1, *].
    """
    assert base is not None
    correction, gates = output.tensor_split([1], dim=1)
    correction.clamp_(-MAX_CORRECTION, MAX_CORRECTION).mul_(base.rms)
    return correction.add_(gates.clamp_(*GATE_RANGE).exp_().mul_(base.terms).sum(1, keepdim=True))


def nesterov_terms(grad: Tensor, momentum: Tensor, decays: Decays) -> Tensor:
    r"""Nesterov momentum with learning rate 0.7: :math:`0.7 g` and :math:`0.7 \beta u`, where
    :math:`u = m_1/(1-\beta_1)` is the heavy-ball sum behind the first momentum accumulator (DiLoCo's outer step when
    β1 = 0.9).

    Args:
        grad: [P, 1, B, a, b].
        momentum: [P, 3, B, a, b], already advanced.
        decays: complements of the decays.

    Returns:
        [P, 2, B, a, b].
    """
    keep = decays.momentum[:, :1, None, None, None]
    return torch.cat([0.7 * grad, (0.7 * (1 - keep) / keep) * momentum[:, :1]], 1)


class Update(NamedTuple):
    """A kind of update.

    Attributes:
        terms: of its base step, if it has one.
        step: how the network's output turns them into the step.
        num_outputs: of the network.
    """

    terms: Callable[[Tensor, Tensor, Decays], Tensor] | None
    step: Callable[[Tensor, Base | None], Tensor]
    num_outputs: int

    @property
    def relative(self) -> bool:
        """Whether the network sees the statistics of the tensor, and no feature changes with the scale of g."""
        return self.terms is not None


UPDATES = {
    "published": Update(None, published, num_outputs=2),
    "adaptive_nesterov": Update(nesterov_terms, gated, num_outputs=3),
}
