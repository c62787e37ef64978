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
from lightning_lopt.functional.updates import Update


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


def separate(
    network: Network, state: AdaState, moments: Moments, eps: Epsilons, round_idx: Tensor, factors: Factoring
) -> Layers:
    """Fold into the layers all that is not per coordinate.

    Args:
        network: Meta-parameters, with the decays of the round.
        state: Accumulators of the tensor, already advanced.
        moments: Result of `learned.accumulate`.
        eps: Terms added before roots and divisions.
        round_idx: Number of steps already taken, from 0, [P].
        factors: Factoring of the parameter.
    """
    first, bias, tiled = _first_layer(network, state, moments, eps, round_idx, factors)
    grid = bias.shape[2:]
    bias, weights, thresholds = bias.flatten(2), list(network.weights[1:]), []
    for weight, layer_bias in zip(weights, network.biases[1:], strict=True):
        thresholds.append(-bias)
        bias = torch.baddbmm(layer_bias.unsqueeze(-1), weight, bias)
    num_gates = bias.shape[1] - 1
    mults = bias.new_tensor([[network.step_mult], *[[network.exp_mult]] * num_gates])
    weights = [first, *weights[:-1], weights[-1] * mults]
    return Layers(weights, [t.unflatten(2, grid) for t in thresholds], (bias * mults).unflatten(2, grid), tiled)


def _first_layer(
    network: Network, state: AdaState, moments: Moments, eps: Epsilons, round_idx: Tensor, factors: Factoring
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight [P, hidden, 6 + G + 15], the bias [P, hidden, B, a, 1], and the tiled features."""
    weight, num_inputs = network.weights[0], network.num_inputs
    row_weight, col_weight = (columns_of_kinds(weight, num_inputs, kind) for kind in ("row", "column"))
    constants = ada.time_features(round_idx, weight.dtype)
    if "tensor" in network.update.feature_kinds:
        constants = torch.cat([constants, tensor_features(moments, state, network, round_idx, factors)], 1)
    constant_weight = columns_of_kinds(weight, num_inputs, "time", "tensor")
    bias = torch.baddbmm(network.biases[0].unsqueeze(-1), constant_weight, constants.unsqueeze(-1))
    bias = bias.view(*weight.shape[:2], 1, 1, 1)
    along_b = _constant_features(state.row, eps)
    if not factors.factored:  # a vector's row and column features are the same ones, along b
        b_weight = row_weight + col_weight
    else:
        along_a, a_weight, b_weight = _constant_features(state.col, eps), col_weight, row_weight
        if factors.row_axis == -2:
            along_a, a_weight, along_b, b_weight = along_b, b_weight, along_a, a_weight
        bias = bias + torch.bmm(a_weight, along_a.flatten(2)).view(*weight.shape[:2], *along_a.shape[2:], 1)
    scale = (moments.features / moments.numel + eps.rms).rsqrt_().unsqueeze(1)
    coordinate_weight = columns_of_kinds(weight, num_inputs, "coordinate") * scale
    return torch.cat([b_weight, coordinate_weight], 2), bias, along_b.unsqueeze(-2)


def _constant_features(accumulator: Tensor, eps: Epsilons) -> Tensor:
    """The row (or column) features, normalised: [P, 3, B, r] to [P, 6, B, r]."""
    raw = torch.cat([accumulator, (accumulator + eps.rsqrt).rsqrt_()], 1)
    return raw.mul_((raw.square().mean((2, 3), keepdim=True) + eps.rms).rsqrt_())


def tensor_features(
    moments: Moments, state: AdaState, network: Network, round_idx: Tensor, factors: Factoring
) -> Tensor:
    r"""Compute the features of the tensor as a whole, all independent of the scale of g.

    .. math:: \cos(g, m_i),\quad \tfrac12 \log\frac{|\hat m_i|}{|g|},\quad \tfrac12 \log\frac{|g|}{\hat R_i^{1/2}},\quad
        \tfrac12 \log\frac{|g|}{|p|},\quad [\text{vector}]

    with norms as root mean squares over the tensor, :math:`\hat R_i` the mean of R_i over the tensor, and both
    accumulators divided by the share of their limit that they have reached, which is 1 for m_1. The logarithms are
    clipped to ±3.

    Args:
        moments: Result of `learned.accumulate`.
        state: Accumulators of the tensor, already advanced.
        network: Meta-parameters, with the decays of the round.
        round_idx: Number of steps already taken, from 0, [P].
        factors: Factoring of the parameter.

    Returns:
        Features of kind "tensor", [P, 11].
    """
    tiny, columns = ada.MIN_SCALE, feature_slices(network.num_inputs, ("coordinate",))
    param, momentum = moments.features[:, columns["param"]], moments.features[:, columns["momentum"]]
    grad, products = moments.products.split([1, 3], 1)
    age = (round_idx + 1).unsqueeze(1)
    mean_square = grad / moments.numel + tiny
    slow = _grown(network.decays.momentum[:, 1:], age)  # the first accumulator has no bias
    unbiased_m = momentum / torch.cat([torch.ones_like(slow[:, :1]), slow], 1).square()
    unbiased_r = ada.row_means(state) / _grown(network.decays.factored, age) + tiny
    cosines = products / (grad * momentum).sqrt().clamp_(min=tiny)
    ratios = [
        (unbiased_m / moments.numel + tiny) / mean_square,
        mean_square / unbiased_r,
        mean_square / (param / moments.numel + tiny),
    ]
    logs = (0.25 * torch.log(torch.cat(ratios, 1))).clamp_(-3, 3)
    is_vector = torch.full_like(grad, float(not factors.factored))
    return torch.cat([cosines, logs, is_vector], 1)


def _grown(complement: Tensor, age: Tensor) -> Tensor:
    """The share of its limit that an average of constants has reached: 1 - (1 - complement)^age."""
    return -torch.expm1(age * torch.log1p(-complement.clamp(max=1)))
