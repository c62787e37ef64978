"""Update rules of the learned step: how the outputs of the network become the step of a tensor.

To add a rule, subclass `Update` and give it a row in `UPDATES`: `AdaMLP(update=...)` then takes its key, and the tests
over `UPDATES` take it up. The methods are independent choices: a rule may have a base step without damping, or features
of the whole tensor without a base step.

`Update.step` sees the outputs of the network and the base step, neither the pseudo-gradient nor the parameter. A rule
that needs one of them, or a norm, brings it in through `Update.base_forms`: a form of the base step may be any tensor
of the parameter's shape, the pseudo-gradient itself for example, and the root mean square of the first one comes along.

A change of a rule that moves parameters otherwise is a new rule with a new name, and the former name stays, since
weights files and saved runs hold it: `FORMER_UPDATES` tells which name a new one follows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_lopt.functional.ada import AdaState, Decays, Epsilons, Factoring, epsilons, sum_in_blocks
from lightning_lopt.functional.blended import (
    FORMER_ROOTS,
    ROOTS,
    Roots,
    base_forms,
    complement_of_round,
    damp_model,
    nesterov,
    norm_ratio,
    zero_where_unused,
)
from lightning_lopt.functional.damping import Total, local_total
from lightning_lopt.functional.features import ALL_KINDS, PUBLISHED_KINDS, FeatureKind
from lightning_lopt.functional.model import ModelTensor
from lightning_lopt.functional.whitening import update_grams

GATE_RANGE = (-4.0, 0.5)  # of a gate's exponent: it damps more than it pushes
MAX_CORRECTION = 1.0  # in units of the base step


class Base(NamedTuple):
    """A hand-made step that an update starts from, on a tensor or a block of it.

    Attributes:
        forms: Forms of the step, [P, N, B, a, b].
        rms: Root mean square of the first form over the whole tensor, [P, 1, 1, 1, 1].
    """

    forms: Tensor
    rms: Tensor


class Update(ABC):
    """An update rule; it has no state of its own.

    Attributes:
        num_outputs: Number of outputs of the network.
        feature_kinds: Kinds of the features that the network sees.
    """

    num_outputs: ClassVar[int]
    feature_kinds: ClassVar[tuple[FeatureKind, ...]]

    @abstractmethod
    def init_state(
        self, shape: tuple[int, ...], num_particles: int, dtype: torch.dtype, device: torch.device
    ) -> AdaState:
        """Create the accumulators of a tensor before its first step; arguments are those of `AdaState.zeros`."""

    @abstractmethod
    def damp(self, tensors: Sequence[ModelTensor[AdaState]], total: Total = local_total) -> Tensor | None:
        """Compute the factor of all pseudo-gradients of a model.

        Args:
            tensors: Tensors of the model.
            total: Sum over the shards of the model.

        Returns:
            Factor in [0, 1], [P]; None for 1.
        """

    @abstractmethod
    def decays_of_round(self, decays: Decays, round_idx: Tensor, retained: Tensor | None) -> Decays:
        """Choose the decays of a round.

        Args:
            decays: Decays of the network.
            round_idx: Number of steps already taken, from 0, [P].
            retained: Share of their momentum that the workers retain over a round, [P]; None for 0.
        """

    @abstractmethod
    def advance(self, state: AdaState, grad: Tensor, sums: tuple[Tensor, Tensor], decays: Decays) -> Decays:
        """Advance the state that this rule alone uses, and choose the decays of a tensor.

        The momenta, v and the factors R and C are advanced afterwards, by the caller, with the decays returned.

        Args:
            state: Accumulators of the tensor, changed in place.
            grad: Averaged pseudo-gradient, already damped, [P, *S].
            sums: Row and column sums of its squares, as `ada.factored_sums` returns them.
            decays: Decays of the round.
        """

    @abstractmethod
    def epsilons(self, state: AdaState) -> Epsilons:
        """Choose the terms added before roots and divisions, from accumulators already advanced."""

    @abstractmethod
    def block_sums(self, grad: Tensor, momentum: Tensor, decays: Decays) -> list[Tensor]:
        """Sum over a block what the root mean square of the base step and features of kind "tensor" are made of.

        Args:
            grad: Averaged pseudo-gradient g of the block, [P, 1, B, a, b].
            momentum: Momenta m_i of the block, already advanced, [P, 3, B, a, b].
            decays: Decays of the round.

        Returns:
            Sum of the squares of the base step's first form, [P, 1], then sums of g², g m_1, g m_2, g m_3, [P, 4]. The
            second entry may be left out by a rule without features of kind "tensor"; the first is 0 for a rule that
            has them but no base step. Empty for a rule with neither.
        """

    @abstractmethod
    def base_forms(
        self, grad: Tensor, state: AdaState, decays: Decays, factors: Factoring, like: Tensor
    ) -> Tensor | None:
        """Compute the forms of the base step.

        Args:
            grad: Averaged pseudo-gradient, [P, 1, B, a, b].
            state: Accumulators of the tensor, already advanced.
            decays: Decays of the round.
            factors: Factoring of the tensor.
            like: Tensor of the parameter's shape, [P, *S].

        Returns:
            Forms [P, N, B, a, b], in any number N >= 1; None without a base step.
        """

    @abstractmethod
    def step(self, output: Tensor, base: Base | None) -> Tensor:
        """Turn outputs of the network into the step.

        Args:
            output: Outputs, all but the first already times λ2 and that times λ1, [P, outputs, *]; overwritten.
            base: Base step; None for a rule without one.

        Returns:
            Step that is subtracted from the parameter, [P, 1, *].
        """


class PublishedUpdate(Update):
    """The paper's update, from direction and magnitude.

    It also moves coordinates whose pseudo-gradient is and was exactly 0, rows of an embedding that no batch uses for
    example, as the authors' code does; no other current update moves them.
    """

    num_outputs = 2
    feature_kinds = PUBLISHED_KINDS

    @override
    def init_state(
        self, shape: tuple[int, ...], num_particles: int, dtype: torch.dtype, device: torch.device
    ) -> AdaState:
        return AdaState.zeros(shape, num_particles, dtype, device)

    @override
    def damp(self, tensors: Sequence[ModelTensor[AdaState]], total: Total = local_total) -> Tensor | None:
        return None

    @override
    def decays_of_round(self, decays: Decays, round_idx: Tensor, retained: Tensor | None) -> Decays:
        return decays

    @override
    def advance(self, state: AdaState, grad: Tensor, sums: tuple[Tensor, Tensor], decays: Decays) -> Decays:
        return decays

    @override
    def epsilons(self, state: AdaState) -> Epsilons:
        return epsilons(state, relative=False)

    @override
    def block_sums(self, grad: Tensor, momentum: Tensor, decays: Decays) -> list[Tensor]:
        return []

    @override
    def base_forms(
        self, grad: Tensor, state: AdaState, decays: Decays, factors: Factoring, like: Tensor
    ) -> Tensor | None:
        return None

    @override
    def step(self, output: Tensor, base: Base | None) -> Tensor:
        r"""Turn (λ1 d, λ2 m) into :math:`\lambda_1 d \exp(\lambda_2 m)`, a step that is absolute in size."""
        direction, magnitude = output.split(1, dim=1)
        return direction.mul_(magnitude.exp_())


class BlendedNesterovUpdate(Update):
    """An update of the blended Nesterov step, from a correction, a gate, and two logits that blend its forms.

    No feature of the network changes with the scale of the pseudo-gradients. The correction also moves coordinates
    whose pseudo-gradient is and was exactly 0: `MaskedBlendedNesterovUpdate` has taken the place of this rule, which is
    kept for weights and runs that were saved with it.

    Attributes:
        roots: Polynomials of the base step's forms.
    """

    num_outputs = 4
    feature_kinds = ALL_KINDS
    roots: ClassVar[Roots] = FORMER_ROOTS

    @override
    def init_state(
        self, shape: tuple[int, ...], num_particles: int, dtype: torch.dtype, device: torch.device
    ) -> AdaState:
        return AdaState.zeros(shape, num_particles, dtype, device, grams=True)

    @override
    def damp(self, tensors: Sequence[ModelTensor[AdaState]], total: Total = local_total) -> Tensor:
        return damp_model(tensors, [tensor.state.base for tensor in tensors], total)

    @override
    def decays_of_round(self, decays: Decays, round_idx: Tensor, retained: Tensor | None) -> Decays:
        """Choose decays with which the first momentum advances as that of `blended.step_model`."""
        first, others = decays.momentum.tensor_split([1], 1)
        return decays._replace(momentum=torch.cat([complement_of_round(first, round_idx, retained), others], 1))

    @override
    def advance(self, state: AdaState, grad: Tensor, sums: tuple[Tensor, Tensor], decays: Decays) -> Decays:
        base = state.base
        squared_norm = sum_in_blocks(sums[0].flatten(1).unsqueeze(1)).squeeze(1)
        update_grams(base, grad)
        return decays._replace(shrink=norm_ratio(base, squared_norm).clamp_(max=1))

    @override
    def epsilons(self, state: AdaState) -> Epsilons:
        return epsilons(state, relative=True)

    @override
    def block_sums(self, grad: Tensor, momentum: Tensor, decays: Decays) -> list[Tensor]:
        base = nesterov(grad, momentum[:, :1], decays.momentum[:, :1]).flatten(1)
        grads = grad.flatten(2)
        products = torch.bmm(torch.cat([grads, momentum.flatten(2)], 1), grads.mT).squeeze(2)
        return [torch.linalg.vector_norm(base, dim=-1, keepdim=True).square_(), products]

    @override
    def base_forms(self, grad: Tensor, state: AdaState, decays: Decays, factors: Factoring, like: Tensor) -> Tensor:
        step = nesterov(grad, state.momentum[:, :1], decays.momentum[:, :1])
        return base_forms(step, state.base, factors, like, self.roots)

    @override
    def step(self, output: Tensor, base: Base | None) -> Tensor:
        r"""Gate a mean of the three forms b_i of the base step, and correct it in units of its root mean square.

        .. math:: e^{\lambda_2 m} \sum_i \mathrm{softmax}(0, \lambda_2 l)_i\, b_i + \mathrm{rms}(b)\,\lambda_1 d

        The outputs are (λ1 d, λ2 m, λ2 l), with two l. A zero output is the mean of all forms; the step anneals with
        the pseudo-gradient. The exponent is clamped to `GATE_RANGE` and λ1 d to ±`MAX_CORRECTION`, which bounds the
        step by a multiple of the base step.
        """
        assert base is not None
        correction, gate, logits = output.split([1, 1, 2], dim=1)
        blend = torch.cat([torch.zeros_like(gate), logits], 1).softmax(1)
        step = blend.mul_(base.forms).sum(1, keepdim=True)
        correction.clamp_(-MAX_CORRECTION, MAX_CORRECTION).mul_(base.rms)
        return correction.add_(gate.clamp_(*GATE_RANGE).exp_().mul_(step))


class MaskedBlendedNesterovUpdate(BlendedNesterovUpdate):
    """The update `BlendedNesterovUpdate`, but 0 for coordinates whose pseudo-gradient is and was exactly 0.

    And its forms are made by other polynomials, of fewer products.
    """

    roots = ROOTS

    @override
    def step(self, output: Tensor, base: Base | None) -> Tensor:
        r"""Take the step of `BlendedNesterovUpdate.step` where the first form b_1 of the base step is not 0.

        .. math:: [b_1 \ne 0]\,\Big(e^{\lambda_2 m} \sum_i \mathrm{softmax}(0, \lambda_2 l)_i\, b_i
            + \mathrm{rms}(b)\,\lambda_1 d\Big)
        """
        assert base is not None
        return zero_where_unused(super().step(output, base), base.forms)


UPDATES: dict[str, Update] = {
    "published": PublishedUpdate(),
    "blended_nesterov": BlendedNesterovUpdate(),
    "masked_blended_nesterov": MaskedBlendedNesterovUpdate(),
}
FORMER_UPDATES = {"masked_blended_nesterov": "blended_nesterov"}  # the version before each, for runs saved with it
