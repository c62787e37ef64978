"""The network of the learned optimizer, and the part of its layers that is left in the separable form.

The first layer is linear, so what is constant along an axis never has to be formed per coordinate: the time features
and those of the factor along a only move biases; those of the factor along b enter the product as vectors.
Normalisation by RMS scales weights. A bias b of a hidden layer needs no pass of its own: relu(x + b) = max(x, -b) + b,
where the last b moves the bias of the next layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.functional import ada
from lightning_lopt.functional.ada import AdaState, Decays, Epsilons, Factoring
from lightning_lopt.functional.features import columns_of_kinds, feature_slices
from lightning_lopt.functional.model import repeated
from lightning_lopt.functional.updates import Update

NUM_TILED = 6  # features that are constant along an axis of a matrix, for either axis


class Network(NamedTuple):
    """Meta-parameters with a leading particle dimension.

    Attributes:
        weights: Weight of each layer, [P, out, in].
        biases: Bias of each layer, [P, out].
        decays: Complements of the decays.
        num_inputs: Number of pseudo-gradients that the network sees: 1 (their mean) or K.
        step_mult: Multiplier λ1 of the first output.
        exp_mult: Multiplier λ2 of the others.
        update: Kind of update that the outputs become.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    decays: Decays
    num_inputs: int
    step_mult: float
    exp_mult: float
    update: Update


class Moments(NamedTuple):
    """Sums over one tensor, from which the features are normalised.

    Attributes:
        features: Sums of squares of the per-coordinate features, in the order of the network, [P, G + 15].
        base: Sum of squares of the base step, [P, 1]; [P, 0] for an update with neither a base step nor features of
            kind "tensor".
        products: Sums of g², g m_1, g m_2, g m_3, [P, 4], from which features of kind "tensor" are made; [P, 0] for an
            update without them.
        numel: Number of coordinates.
    """

    features: Tensor
    base: Tensor
    products: Tensor
    numel: int


class Layers(NamedTuple):
    """The network as one tensor needs it.

    Attributes:
        weights: Weight of each layer, [P, out, in]: the first of the tiled and the per-coordinate features, the last
            scaled by λ1, and by λ2 from the second output on.
        thresholds: Threshold of each hidden layer, whose output is max(x, threshold), [P, out, B, a, 1].
        bias: Bias of the last layer, [P, outputs, B, a, 1].
        tiled: Features that are constant along a, [P, 6, B, 1, b].
    """

    weights: list[Tensor]
    thresholds: list[Tensor]
    bias: Tensor
    tiled: Tensor


class FoldedNetwork(NamedTuple):
    """A network with all folded into it that is the same for all tensors of a round.

    Attributes:
        row: Columns of the first layer for features constant along a row, [P, out, 6].
        column: Columns for those constant along a column, [P, out, 6].
        coordinate: Columns for those of each coordinate, [P, out, G + 15].
        tensor: Columns for those of the tensor, [P, out, 11 or 0].
        weights: Weight of each further layer, [P, out, in], the last one scaled by λ1, and by λ2 from the second
            output on.
        biases: Bias of each layer, [P, out, 1]: the first with the features of time, the last one scaled.
        decays: Complements of the decays of the round.
        momentum_bias: Squared shares of their limits that the momenta have reached, [P, 3].
        row_bias: Shares of their limits that the row factors have reached, [P, 3].
        num_inputs: Number of pseudo-gradients that the network sees.
        update: Kind of update that the outputs become.
    """

    row: Tensor
    column: Tensor
    coordinate: Tensor
    tensor: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    decays: Decays
    momentum_bias: Tensor
    row_bias: Tensor
    num_inputs: int
    update: Update

    def repeated(self, count: int) -> FoldedNetwork:
        """Repeat it for the particles of several tensors: [P, *] to [count * P, *]."""
        if count == 1:
            return self
        own = {name: repeated(x, count) for name, x in self._asdict().items() if isinstance(x, Tensor)}
        weights, biases = (tuple(repeated(x, count) for x in parts) for parts in (self.weights, self.biases))
        momentum, rms, factored, _ = self.decays
        decays = Decays(*(repeated(x, count) for x in (momentum, rms, factored)))
        return self._replace(**own, weights=weights, biases=biases, decays=decays)

    @property
    def widths(self) -> list[int]:
        """Numbers of outputs of all layers."""
        return [bias.shape[1] for bias in self.biases]


def fold(network: Network, round_idx: Tensor, retained: Tensor | None) -> FoldedNetwork:
    """Fold into a network all that is the same for all tensors of a round.

    Args:
        network: Meta-parameters.
        round_idx: Number of steps already taken, from 0, [P].
        retained: Share of their momentum that the workers retain over a round, [P]; None for 0.
    """
    first, num_inputs, update = network.weights[0], network.num_inputs, network.update
    columns = {
        kind: columns_of_kinds(first, num_inputs, kind) if kind in update.feature_kinds else first[..., :0]
        for kind in ("row", "column", "coordinate", "time", "tensor")
    }
    time = ada.time_features(round_idx, first.dtype).unsqueeze(-1)
    bias = torch.baddbmm(network.biases[0].unsqueeze(-1), columns.pop("time"), time)
    *biases, last_bias = network.biases[1:]
    mults = first.new_full((len(last_bias[0]), 1), network.exp_mult)
    mults[0] = network.step_mult
    decays, age = update.decays_of_round(network.decays, round_idx, retained), (round_idx + 1).unsqueeze(1)
    momentum_bias = _grown(decays.momentum, age).square_()
    momentum_bias[:, 0] = 1  # the first accumulator has no bias
    return FoldedNetwork(
        **columns,
        weights=(*network.weights[1:-1], network.weights[-1] * mults),
        biases=(bias, *(b.unsqueeze(-1) for b in biases), last_bias.unsqueeze(-1) * mults),
        decays=decays,
        momentum_bias=momentum_bias,
        row_bias=_grown(decays.factored, age),
        num_inputs=num_inputs,
        update=update,
    )


def separate(network: FoldedNetwork, state: AdaState, moments: Moments, eps: Epsilons, factors: Factoring) -> Layers:
    """Fold into the layers all that is not per coordinate.

    Args:
        network: Network of the round.
        state: Accumulators of the tensor, already advanced.
        moments: Result of `learned.accumulate`.
        eps: Terms added before roots and divisions.
        factors: Factoring of the parameter.
    """
    first, bias, tiled = _first_layer(network, state, moments, eps, factors)
    grid = bias.shape[2:]
    bias, thresholds = bias.flatten(2), []
    for weight, layer_bias in zip(network.weights, network.biases[1:], strict=True):
        thresholds.append(-bias)
        bias = torch.baddbmm(layer_bias, weight, bias)
    return Layers([first, *network.weights], [t.unflatten(2, grid) for t in thresholds], bias.unflatten(2, grid), tiled)


def _first_layer(
    network: FoldedNetwork, state: AdaState, moments: Moments, eps: Epsilons, factors: Factoring
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight [P, hidden, 6 + G + 15], the bias [P, hidden, B, a, 1], and the tiled features."""
    bias = network.biases[0]
    if "tensor" in network.update.feature_kinds:
        context = tensor_features(moments, state, network, factors).unsqueeze(-1)
        bias = torch.baddbmm(bias, network.tensor, context)
    bias = bias.view(*bias.shape[:2], 1, 1, 1)
    along_b = _constant_features(state.row, eps)
    if not factors.factored:  # a vector's row and column features are the same ones, along b
        b_weight = network.row + network.column
    else:
        along_a, a_weight, b_weight = _constant_features(state.col, eps), network.column, network.row
        if factors.row_axis == -2:
            along_a, a_weight, along_b, b_weight = along_b, b_weight, along_a, a_weight
        bias = bias + torch.bmm(a_weight, along_a.flatten(2)).view(*bias.shape[:2], *along_a.shape[2:], 1)
    scale = (moments.features / moments.numel + eps.rms).rsqrt_().unsqueeze(1)
    return torch.cat([b_weight, network.coordinate * scale], 2), bias, along_b.unsqueeze(-2)


def _constant_features(accumulator: Tensor, eps: Epsilons) -> Tensor:
    """The row (or column) features, normalised: [P, 3, B, r] to [P, 6, B, r]."""
    raw = torch.cat([accumulator, (accumulator + eps.rsqrt).rsqrt_()], 1)
    return raw.mul_((raw.square().mean((2, 3), keepdim=True) + eps.rms).rsqrt_())


def tensor_features(moments: Moments, state: AdaState, network: FoldedNetwork, factors: Factoring) -> Tensor:
    r"""Compute the features of the tensor as a whole, all independent of the scale of g.

    .. math:: \cos(g, m_i),\quad \tfrac12 \log\frac{|\hat m_i|}{|g|},\quad \tfrac12 \log\frac{|g|}{\hat R_i^{1/2}},\quad
        \tfrac12 \log\frac{|g|}{|p|},\quad [\text{vector}]

    with norms as root mean squares over the tensor, :math:`\hat R_i` the mean of R_i over the tensor, and both
    accumulators divided by the share of their limit that they have reached, which is 1 for m_1. The logarithms are
    clipped to ±3.

    Args:
        moments: Result of `learned.accumulate`.
        state: Accumulators of the tensor, already advanced.
        network: Network of the round.
        factors: Factoring of the parameter.

    Returns:
        Features of kind "tensor", [P, 11].
    """
    tiny, columns = ada.MIN_SCALE, feature_slices(network.num_inputs, ("coordinate",))
    param, momentum = moments.features[:, columns["param"]], moments.features[:, columns["momentum"]]
    grad, products = moments.products.split([1, 3], 1)
    mean_square = grad / moments.numel + tiny
    above = torch.cat([momentum / moments.numel / network.momentum_bias + tiny, mean_square.expand(-1, 4)], 1)
    row = ada.row_means(state) / network.row_bias
    below = torch.cat([mean_square.expand(-1, 3), row + tiny, param / moments.numel + tiny], 1)
    logs = torch.log(above / below).mul_(0.25).clamp_(-3, 3)
    cosines = products / (grad * momentum).sqrt_().clamp_(min=tiny)
    return torch.cat([cosines, logs, grad.new_full(grad.shape, float(not factors.factored))], 1)


def _grown(complement: Tensor, age: Tensor) -> Tensor:
    """The share of its limit that an average of constants has reached: 1 - (1 - complement)^age."""
    return -torch.expm1(age * torch.log1p(-complement.clamp(max=1)))
