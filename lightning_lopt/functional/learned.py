"""The learned step of LOpt-A and LAgg-A in its exact separable form.

The first layer of the network is linear, so the features that are constant along a row or a column, the time
features and the normalisation by RMS never have to be formed per coordinate: they become two vectors, a bias
and a scaling of the weights. `functional.plain` holds the plain form, which this one equals up to rounding.

A step is `factored_sums` -> `accumulate` -> `apply`; `step` is the three in a row. Both sums are exact over
shards of a tensor, so a caller that shards tensors reduces them in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_lopt.functional import ada
from lightning_lopt.functional.ada import AdaState, Decays, Factoring

# Elements per block. On a CPU the planes of a block (16 + 2 x 32 floats per element in the network) should stay in
# the cache of a core; a GPU wants few large launches. Either way the extra memory is tens of MB, whatever the model.
PASS_BLOCK = {"cpu": 1 << 15, "other": 1 << 20}
NETWORK_BLOCK = {"cpu": 3 << 13, "other": 1 << 18}

Result = TypeVar("Result")


class Network(NamedTuple):
    """Meta-parameters with a leading particle dimension.

    Attributes:
        weights: one [P, out, in] per layer.
        biases: one [P, out] per layer.
        decays: complements of the decays.
        num_inputs: pseudo-gradient inputs: 1 (their mean) or K.
        step_mult: λ1.
        exp_mult: λ2.
        update: a key of `UPDATES`.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    decays: Decays
    num_inputs: int
    step_mult: float
    exp_mult: float
    update: str


class Moments(NamedTuple):
    """Sums over one tensor, from which the features are normalised.

    Attributes:
        features: sums of squares of the per-coordinate features [P, G + 15].
        base: sum of squares of the base step [P].
        count: number of coordinates.
    """

    features: Tensor
    base: Tensor
    count: int


def published(output: Tensor, base: Tensor, base_rms: Tensor, network: Network) -> Tensor:
    r"""The step of the paper: :math:`\lambda_1 d \exp(\lambda_2 m)`, absolute in size.

    Args:
        output: (d, m), [P, 2, n].
        base: ignored.
        base_rms: ignored.
        network: for λ1 and λ2.

    Returns:
        What is subtracted from the parameter, [P, n].
    """
    direction, magnitude = output.unbind(1)
    return network.step_mult * direction * torch.exp(network.exp_mult * magnitude)


def gated(output: Tensor, base: Tensor, base_rms: Tensor, network: Network) -> Tensor:
    r"""A gate on a hand-made base step, plus a correction in its units:
    :math:`b \exp(\lambda_2 m) + \mathrm{rms}(b)\,\lambda_1 d`; the exponent is clamped to ±2.

    A zero output is the base step itself; the step anneals with the pseudo-gradient.

    Args:
        output: (d, m), [P, 2, n].
        base: [P, n].
        base_rms: root mean square of the base over the tensor, [P, 1].
        network: for λ1 and λ2.

    Returns:
        What is subtracted from the parameter, [P, n].
    """
    direction, magnitude = output.unbind(1)
    gate = torch.exp((network.exp_mult * magnitude).clamp_(-2, 2))
    return base * gate + base_rms * network.step_mult * direction


def average_base(grad: Tensor, momentum: Tensor, decays: Decays) -> Tensor:
    """Plain averaging: the step is g itself."""
    return grad


def nesterov_base(grad: Tensor, momentum: Tensor, decays: Decays) -> Tensor:
    r"""Nesterov momentum with learning rate 0.7: :math:`0.7\,(g + \beta u)`, where :math:`u = m_1/(1-\beta_1)`
    is the heavy-ball sum behind the first momentum accumulator (DiLoCo's outer step when β1 = 0.9).

    Args:
        grad: [P, h, w].
        momentum: [P, 3, h, w], already advanced.
        decays: complements of the decays.
    """
    keep = decays.momentum[:, :1, None]
    return 0.7 * (grad + (1 - keep) / keep * momentum[:, 0])


class Update(NamedTuple):
    """A kind of update: its base step, and how the network's output turns it into the step."""

    base: Callable[[Tensor, Tensor, Decays], Tensor]
    step: Callable[[Tensor, Tensor, Tensor, Network], Tensor]


UPDATES = {
    "published": Update(average_base, published),
    "gated_average": Update(average_base, gated),
    "gated_nesterov": Update(nesterov_base, gated),
}


class FeatureIndex(NamedTuple):
    """Columns of the first layer by where its features live."""

    element: list[int]
    row: list[int]
    col: list[int]
    time: list[int]


def feature_index(num_inputs: int) -> FeatureIndex:
    """Columns of the per-coordinate, row, column and time features, in the documented order.

    Example:
        >>> index = feature_index(1)
        >>> len(index.element), index.row, index.col, index.time[0]
        (16, [13, 14, 15, 19, 20, 21], [16, 17, 18, 22, 23, 24], 28)
    """
    first = num_inputs + 12  # g (G), p, m (3), v, m/sqrt(v) (3), 1/sqrt(v), fac_g (3)
    constant = range(first, first + 12)
    row = [*constant[0:3], *constant[6:9]]
    col = [*constant[3:6], *constant[9:12]]
    time_start = first + 15
    element = [*range(first), *range(first + 12, time_start)]
    return FeatureIndex(element, row, col, list(range(time_start, time_start + ada.NUM_TIME_FEATURES)))


class _Planes(NamedTuple):
    """What one step reads: all as [P, .., B, a, b], with `inputs` [P, G, B, a, b]."""

    param: Tensor
    grad: Tensor
    inputs: Tensor
    state: AdaState
    factors: Factoring
    scales: tuple[Tensor, Tensor, Tensor, Tensor]

    def along(self, vector: Tensor, axis: int, block: ada.Block) -> Tensor:
        """The part of a row or column vector [P, X, B, r] that belongs to a block, to broadcast over [P, X, h, w]."""
        index, rows, cols = block
        part = vector[:, :, index, rows if axis == -2 else cols]
        return part.unsqueeze(-1 if axis == -2 else -2)

    def features(self, block: ada.Block, out: Tensor) -> Tensor:
        """Write the per-coordinate features of a block into `out` [P, G + 15, h, w]."""
        index, rows, cols = block
        param, grad = self.param[:, index, rows, cols], self.grad[:, index, rows, cols]
        momentum, second = self.state.momentum[:, :, index, rows, cols], self.state.second[:, index, rows, cols]
        row_axis, col_axis = self.factors.row_axis, self.factors.col_axis
        row_g, col_g, row_m, col_m = self.scales
        inputs, plain_p, plain_m, plain_v, normed_m, rsqrt_v, fac_g, fac_m = out.split(
            [self.inputs.shape[1], 1, 3, 1, 3, 1, 3, 3], dim=1
        )
        inputs.copy_(self.inputs[:, :, index, rows, cols])
        plain_p.copy_(param.unsqueeze(1))
        plain_m.copy_(momentum)
        plain_v.copy_(second.unsqueeze(1))
        torch.add(second.unsqueeze(1), ada.SECOND_EPS, out=rsqrt_v).rsqrt_()
        torch.mul(momentum, rsqrt_v, out=normed_m)
        scale = self.along(row_m, row_axis, block) * self.along(col_m, col_axis, block)
        torch.mul(momentum, scale, out=fac_m)
        if not self.factors.factored:
            scale = self.along(row_g, row_axis, block) * self.along(col_g, col_axis, block)
        torch.mul(grad.unsqueeze(1), scale, out=fac_g)
        return out


class _Scratch:
    """One buffer, viewed as [P, planes, h, w] for blocks of any shape up to its size."""

    def __init__(self, like: Tensor, planes: int, size: int) -> None:
        self._shape = (like.shape[0], planes)
        self._buffer = like.new_empty(like.shape[0] * planes * size)

    def view(self, *block: int) -> Tensor:
        shape = (*self._shape, *block)
        count = 1
        for side in shape:
            count *= side
        return self._buffer[:count].view(shape)


def _planes(param: Tensor, grad: Tensor, worker_grads: Tensor | None, state: AdaState, factors: Factoring) -> _Planes:
    matrices = factors.matrices(grad)
    if worker_grads is None:
        inputs = matrices.unsqueeze(1)
    else:
        num_particles, num_workers = worker_grads.shape[:2]
        inputs = factors.matrices(worker_grads.flatten(0, 1)).unflatten(0, (num_particles, num_workers))
    scales = ada.gradient_scales(state, factors)
    return _Planes(factors.matrices(param), matrices, inputs, state, factors, scales)


def _blocks(sizes: dict[str, int], like: Tensor, factors: Factoring) -> tuple[int, list[ada.Block]]:
    """The number of elements of the largest block, and the blocks."""
    budget = sizes.get(like.device.type, sizes["other"]) // like.shape[0]
    size = min(max(1, budget), factors.shape[1] * factors.shape[2])
    return size, list(ada.blocks(factors.shape, size))


def _over_blocks(blocks: list[ada.Block], work: Callable[[Sequence[ada.Block]], list[Result]]) -> list[Result]:
    """Call `work` on all blocks, on a CPU in as many threads as torch may use, and return its results in order.

    The operations of a block are too small to be worth splitting, so that each thread runs whole blocks. Results
    do not depend on the number of threads.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(blocks) < 4 * threads:
        return work(blocks)
    cuts = [round(i * len(blocks) / threads) for i in range(threads + 1)]
    parts = [blocks[start:stop] for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return [result for results in pool.map(torch.no_grad()(work), parts) for result in results]
    finally:
        torch.set_num_threads(threads)


def accumulate(planes: _Planes, network: Network) -> Moments:
    """Advance m and v and return the sums that normalise the features."""
    size, blocks = _blocks(PASS_BLOCK, planes.grad, planes.factors)
    base_of = UPDATES[network.update].base

    def work(part: Sequence[ada.Block]) -> list[tuple[Tensor, Tensor]]:
        scratch = _Scratch(planes.grad, planes.inputs.shape[1] + 15, size)
        sums = []
        for block in part:
            index, rows, cols = block
            grad = planes.grad[:, index, rows, cols]
            momentum = planes.state.momentum[:, :, index, rows, cols]
            ada.update_moments(momentum, planes.state.second[:, index, rows, cols], grad, network.decays)
            features = planes.features(block, scratch.view(*grad.shape[1:])).flatten(2)
            base = base_of(grad, momentum, network.decays).flatten(1)
            sums.append(tuple(torch.linalg.vector_norm(x, dim=-1).square_() for x in (features, base)))
        return sums

    features, base = zip(*_over_blocks(blocks, work), strict=True)
    return Moments(torch.stack(features).sum(0), torch.stack(base).sum(0), planes.grad[0].numel())


def _rms_scale(features: Tensor) -> Tensor:
    return (features.square().mean((2, 3), keepdim=True) + ada.RMS_EPS).rsqrt()


def _constant_features(accumulator: Tensor) -> Tensor:
    """Features 8 and 10 (or 9 and 11), normalised: [P, 3, B, r] -> [P, 6, B, r]."""
    raw = torch.cat([accumulator, (accumulator + ada.RSQRT_EPS).rsqrt()], 1)
    return raw * _rms_scale(raw)


class _FirstLayer:
    """The first layer, split by where its features live."""

    def __init__(self, planes: _Planes, moments: Moments, network: Network, step: Tensor) -> None:
        weight, bias = network.weights[0], network.biases[0]
        index = feature_index(network.num_inputs)
        scale = (moments.features / moments.count + ada.RMS_EPS).rsqrt()
        self.element = weight[:, :, index.element] * scale.unsqueeze(1)
        time = ada.time_features(step, weight.dtype).unsqueeze(-1)
        self.bias = torch.baddbmm(bias.unsqueeze(-1), weight[:, :, index.time], time).squeeze(-1)
        row_weight, col_weight = weight[:, :, index.row], weight[:, :, index.col]
        self._planes = planes
        self._row = _constant_features(planes.state.row)
        if planes.factors.factored:
            self._row = torch.einsum("phf,pfbr->phbr", row_weight, self._row) + self.bias[:, :, None, None]
            self._col = torch.einsum("phf,pfbc->phbc", col_weight, _constant_features(planes.state.col))
        else:  # a vector's row and column features are the same ones
            self._row_weight = row_weight + col_weight

    def constant(self, block: ada.Block, out: Tensor) -> None:
        """Write what the features that are not per-coordinate add into `out` [P, hidden, h, w]."""
        planes = self._planes
        row = planes.along(self._row, planes.factors.row_axis, block)
        if planes.factors.factored:
            torch.add(row, planes.along(self._col, planes.factors.col_axis, block), out=out)
        else:
            linear = torch.baddbmm(self.bias.unsqueeze(-1), self._row_weight, row.flatten(2))
            out.copy_(linear.unsqueeze(2))


def apply(planes: _Planes, moments: Moments, network: Network, step: Tensor) -> None:
    """Run the network over all coordinates and move `planes.param`, in place."""
    kind = UPDATES[network.update]
    base_rms = (moments.base / moments.count).sqrt().unsqueeze(-1)
    first = _FirstLayer(planes, moments, network, step)
    thresholds, last_bias = _shifted_biases(network)
    size, blocks = _blocks(NETWORK_BLOCK, planes.grad, planes.factors)

    def work(part: Sequence[ada.Block]) -> list[None]:
        inputs = _Scratch(planes.grad, first.element.shape[-1], size)
        layers = [_Scratch(planes.grad, weight.shape[1], size) for weight in network.weights]
        for block in part:
            index, rows, cols = block
            grad = planes.grad[:, index, rows, cols]
            sides = grad.shape[1:]
            hidden = layers[0].view(*sides)
            first.constant(block, hidden)
            features = planes.features(block, inputs.view(*sides)).flatten(2)
            hidden = hidden.flatten(2).baddbmm_(first.element, features).relu_()
            for weight, threshold, layer in zip(network.weights[1:-1], thresholds, layers[1:-1], strict=True):
                hidden = torch.bmm(weight, hidden, out=layer.view(*sides).flatten(2))
                torch.maximum(hidden, threshold, out=hidden)
            output = torch.bmm(network.weights[-1], hidden, out=layers[-1].view(*sides).flatten(2)).add_(last_bias)
            base = kind.base(grad, planes.state.momentum[:, :, index, rows, cols], network.decays)
            change = kind.step(output, base.flatten(1), base_rms, network)
            planes.param[:, index, rows, cols].sub_(change.view_as(grad))
        return []

    _over_blocks(blocks, work)


def _shifted_biases(network: Network) -> tuple[list[Tensor], Tensor]:
    """relu(x + b) = max(x, -b) + b: one pass per hidden layer, with b carried into the next layer's bias.

    Returns:
        The thresholds -b [P, hidden, 1] of all hidden layers but the first, and the bias [P, 2, 1] of the last.
    """
    thresholds = []
    carried = network.biases[1].unsqueeze(-1)
    for weight, bias in zip(network.weights[2:], network.biases[2:], strict=True):
        thresholds.append(-carried)
        carried = torch.baddbmm(bias.unsqueeze(-1), weight, carried)
    return thresholds, carried


@torch.no_grad()
def step(
    param: Tensor,
    grad: Tensor,
    state: AdaState,
    network: Network,
    round_idx: Tensor,
    worker_grads: Tensor | None = None,
) -> None:
    r"""One outer step of the learned optimizer, in place on `param` and `state`.

    .. math:: p \leftarrow p - \lambda_1 d \exp(\lambda_2 m),\quad (d, m) = \mathrm{MLP}(\text{Ada features})

    Args:
        param: anchor, [P, *S], float32 or float64.
        grad: averaged pseudo-gradient (global - local), [P, *S], same dtype.
        state: the accumulators of this tensor.
        network: meta-parameters, same dtype.
        round_idx: number of steps already taken, from 0, [P].
        worker_grads: each worker's pseudo-gradient in fixed order, [P, K, *S]; for networks with K inputs.

    Source: arXiv 2312.02204, section 3 and appendix.

    Example:
        >>> from lightning_lopt import AdaMLP
        >>> param, grad = torch.ones(1, 3), torch.tensor([[1.0, 0.0, -1.0]])
        >>> state = AdaState.zeros((3,), 1, torch.float32, param.device)
        >>> step(param, grad, state, AdaMLP(seed=0).functional(), torch.tensor([0]))
        >>> bool((param != 1).all())
        True
    """
    if param.numel() == 0:
        return
    factors = ada.factoring(tuple(param.shape[1:]))
    block_size, _ = _blocks(PASS_BLOCK, grad, factors)
    sums = ada.factored_sums(factors.matrices(grad), factors, block_size)
    ada.update_factors(state, sums, network.decays, factors)
    planes = _planes(param, grad, worker_grads, state, factors)
    apply(planes, accumulate(planes, network), network, round_idx)
    if planes.param.data_ptr() != param.data_ptr():  # the permuted view was a copy
        param.copy_(factors.restore(planes.param, param))
