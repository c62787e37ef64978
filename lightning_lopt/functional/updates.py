"""Kinds of update: how the output of the network becomes the step. Tensors are [P, X, *] with any trailing shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.functional.ada import Decays


class Base(NamedTuple):
    """A hand-made step that an update starts from.

    Attributes:
        value: per coordinate, [P, 1, *].
        rms: its root mean square over the tensor, [P, 1, *] with trailing dimensions of size 1.
    """

    value: Tensor
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
    r"""A gate on a hand-made base step, plus a correction in its units:
    :math:`b \exp(\lambda_2 m) + \mathrm{rms}(b)\,\lambda_1 d`; the exponent is clamped to ±2.

    A zero output is the base step itself; the step anneals with the pseudo-gradient.

    Args:
        output: (λ1 d, λ2 m), [P, 2, *]; overwritten.
        base: the base step.

    Returns:
        What is subtracted from the parameter, [P, 1, *].
    """
    assert base is not None
    direction, magnitude = output.split(1, dim=1)
    return direction.mul_(base.rms).addcmul_(base.value, magnitude.clamp_(-2, 2).exp_())


def average_base(grad: Tensor, momentum: Tensor, decays: Decays) -> Tensor:
    """Plain averaging: the step is g itself."""
    return grad


def nesterov_base(grad: Tensor, momentum: Tensor, decays: Decays) -> Tensor:
    r"""Nesterov momentum with learning rate 0.7: :math:`0.7\,(g + \beta u)`, where :math:`u = m_1/(1-\beta_1)`
    is the heavy-ball sum behind the first momentum accumulator (DiLoCo's outer step when β1 = 0.9).

    Args:
        grad: [P, 1, B, a, b].
        momentum: [P, 3, B, a, b], already advanced.
        decays: complements of the decays.
    """
    keep = decays.momentum[:, :1, None, None, None]
    return torch.addcmul(grad, (1 - keep) / keep, momentum[:, :1]).mul_(0.7)


class Update(NamedTuple):
    """A kind of update: its base step, if it has one, and how the network's output turns it into the step."""

    base: Callable[[Tensor, Tensor, Decays], Tensor] | None
    step: Callable[[Tensor, Base | None], Tensor]


UPDATES = {
    "published": Update(None, published),
    "gated_average": Update(average_base, gated),
    "gated_nesterov": Update(nesterov_base, gated),
}
