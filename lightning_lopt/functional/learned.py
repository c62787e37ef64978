"""The learned step of LOpt-A and LAgg-A in its exact separable form.

`functional.layers` separates the network; the part that is left per coordinate runs in blocks that stay in a cache.
`functional.plain` holds the plain form, which this one equals up to rounding.

A step needs whole tensors: rows, columns and norms go into it, and the blended Nesterov step orthogonalises and
whitens whole matrices. `step_model` is the step of a model, `step` that of one of its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.functional import ada
from lightning_lopt.functional.ada import AdaState, Factoring
from lightning_lopt.functional.blocks import Grid, block_shape, in_threads, split_blocks
from lightning_lopt.functional.damping import Total, damped, local_total
from lightning_lopt.functional.features import count_features, feature_slices
from lightning_lopt.functional.layers import (
    NUM_TILED,
    FoldedNetwork,
    Layers,
    Moments,
    Network,
    fold,
    separate,
)
from lightning_lopt.functional.model import ModelTensor, groups_of_one_shape, step_together
from lightning_lopt.functional.updates import Base, Update

# Numbers in the buffers of a block, over all particles, of which an element needs 2 x 32 in the published network: on
# a CPU larger blocks fall out of the cache and smaller ones cost more in dispatch; a GPU wants few large launches. Tens
# of MB, whatever the model.
BLOCK_SIZE = {"cpu": 9 << 17, "other": 1 << 24}


class _Operands(NamedTuple):
    """All that a step reads and writes, of a whole tensor or of a block: [P, X, B, a, b]."""

    param: Tensor
    grad: Tensor
    inputs: Tensor
    momentum: Tensor
    second: Tensor
    row_scale: Tensor
    col_scale: Tensor
    vector_scale: Tensor  # of fac_g, for vectors
    second_eps: Tensor

    @classmethod
    def of(
        cls,
        param: Tensor,
        grad: Tensor,
        workers: Tensor | None,
        state: AdaState,
        eps: ada.Epsilons,
        factors: Factoring,
    ) -> _Operands:
        inputs = grad = factors.matrices(grad)
        if workers is not None:
            inputs = factors.matrices(workers.flatten(0, 1)).squeeze(1).unflatten(0, workers.shape[:2])
        row, col, vector = ada.gradient_scales(state, eps, factors)
        rows = factors.along(row, factors.row_axis)
        vector = rows if vector is row else factors.along(vector, factors.row_axis)
        second, col = state.second.unsqueeze(1), factors.along(col, factors.col_axis)
        second_eps = eps.second.unsqueeze(-1)
        return cls(factors.matrices(param), grad, inputs, state.momentum, second, rows, col, vector, second_eps)

    @property
    def factored(self) -> bool:
        """Whether it is a matrix, or several; else a vector."""
        return self.row_scale is self.vector_scale

    @property
    def grid(self) -> Grid:
        """Sizes (B, a, b)."""
        _, _, batch, a, b = self.grad.shape
        return batch, a, b

    def blocks(self, block: Grid) -> list[_Operands]:
        """Views of all blocks."""
        grid = self.grid
        if block == grid:
            return [self]
        return [
            _Operands(*views) for views in zip(*(split_blocks(tensor, grid, block) for tensor in self), strict=True)
        ]


class _Views(NamedTuple):
    """The buffers of a `_Workspace` as blocks of one shape use them: [P, X, B, a, b], `flat` ones [P, X, n].

    A coordinate has tiled features (6), then the per-coordinate ones in the order of the network.
    """

    tiled: Tensor
    copied: Tensor
    momentum: Tensor
    second: Tensor
    normed_m: Tensor
    rsqrt_v: Tensor
    fac_g: Tensor
    fac_m: Tensor
    flat_coordinate: Tensor
    flat_features: Tensor
    layers: list[Tensor]
    flat_layers: list[Tensor]


class _Workspace:
    """The buffers of one thread: the features and the layers of the network alternate between two of them.

    Args:
        plan: Plan of the blocks.
    """

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._buffers = [plan.like.new_empty(plan.numel * max(plan.widths[i::2])) for i in range(2)]
        self._views: dict[torch.Size, _Views] = {}

    def views(self, like: Tensor) -> _Views:
        """The views for blocks of the shape of `like` [P, 1, B, a, b]."""
        if like.shape not in self._views:
            features, *layers = (
                self._buffers[i % 2][: width * like.numel()].view(like.shape[0], width, *like.shape[2:])
                for i, width in enumerate(self._plan.widths)
            )
            coordinate, columns = features[:, NUM_TILED:], self._plan.columns
            part = {name: coordinate[:, which] for name, which in columns.items()}
            self._views[like.shape] = _Views(
                tiled=features[:, :NUM_TILED],
                copied=coordinate[:, : columns["second"].stop],
                momentum=part["momentum"],
                second=part["second"],
                normed_m=part["normed_momentum"],
                rsqrt_v=part["rsqrt_second"],
                fac_g=part["factored_grad"],
                fac_m=part["factored_momentum"],
                flat_coordinate=coordinate.flatten(2),
                flat_features=features.flatten(2),
                layers=layers,
                flat_layers=[layer.flatten(2) for layer in layers],
            )
        return self._views[like.shape]

    def features(self, x: _Operands) -> _Views:
        """Write the per-coordinate features of a block."""
        views = self.views(x.grad)
        torch.cat([x.inputs, x.param, x.momentum, x.second], 1, out=views.copied)
        torch.add(views.second, x.second_eps, out=views.rsqrt_v).rsqrt_()
        torch.mul(views.momentum, views.rsqrt_v, out=views.normed_m)
        torch.mul(x.row_scale, x.col_scale, out=views.fac_m)
        torch.mul(views.fac_m if self._plan.factored else x.vector_scale, x.grad, out=views.fac_g)
        views.fac_m.mul_(views.momentum)
        return views


class _Plan:
    """The blocks of a tensor.

    Args:
        operands: Operands of the whole tensor.
        network: Network of the round.

    Attributes:
        like: Averaged pseudo-gradient of the tensor.
        factored: Whether the tensor is a matrix, or several; else a vector.
        columns: Places of the per-coordinate features.
        widths: Number of all features, then that of the outputs of each layer.
        block: Sizes (B, a, b) of a block.
        numel: Number of elements of a block, over all particles.
        whole: Workspace of the tensor if it is one block: its features are written once; else None.
    """

    def __init__(self, operands: _Operands, network: FoldedNetwork) -> None:
        self.like, self.factored = operands.grad, operands.factored
        self.columns = feature_slices(network.num_inputs, ("coordinate",))
        self.widths = [NUM_TILED + count_features(network.num_inputs, ("coordinate",)), *network.widths]
        size = BLOCK_SIZE.get(self.like.device.type, BLOCK_SIZE["other"]) // sum(max(self.widths[i::2]) for i in (0, 1))
        self.block = block_shape(operands.grid, max(1, size // self.like.shape[0]))
        self.numel = self.like.shape[0] * math.prod(self.block)
        self.whole = _Workspace(self) if self.block == operands.grid else None


def accumulate(operands: _Operands, network: FoldedNetwork, plan: _Plan) -> Moments:
    """Advance m and v and return the sums over the tensor that the rest needs."""
    count = count_features(network.num_inputs, ("coordinate",))

    def work(blocks: Sequence[_Operands]) -> list[Tensor]:
        workspace = plan.whole or _Workspace(plan)
        sums = []
        for x in blocks:
            ada.update_moments(x.momentum, x.second, x.grad, network.decays)
            views = workspace.features(x)
            features = torch.linalg.vector_norm(views.flat_coordinate, dim=-1).square_()
            sums.append(torch.cat([features, *network.update.block_sums(x.grad, views.momentum, network.decays)], 1))
        return sums

    parts = in_threads(work, operands.blocks(plan.block), operands.grad.device)
    sums = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    return Moments(sums[:, :count], sums[:, count : count + 1], sums[:, count + 1 :], operands.grad[0].numel())


def apply(
    operands: _Operands, layers: Layers, moments: Moments, update: Update, forms: Tensor | None, plan: _Plan
) -> None:
    """Run the network over all coordinates and move `operands.param`, in place.

    Args:
        operands: Operands of the tensor.
        layers: Result of `layers.separate`.
        moments: Result of `accumulate`.
        update: Kind of update.
        forms: Forms of its base step, [P, N, B, a, b]; None for an update without one.
        plan: Plan of the blocks.
    """
    *hidden_weights, last_weight = layers.weights
    grid, block = operands.grid, plan.block
    constants = layers.tiled, layers.bias, *layers.thresholds
    if plan.whole is None:
        constants = layers.tiled.expand(-1, -1, *grid), *constants[1:]
    constant_blocks = list(zip(*(split_blocks(tensor, grid, block) for tensor in constants), strict=True))
    bases = [None] * len(constant_blocks)
    if forms is not None:
        base_rms = (moments.base / moments.numel).sqrt_()[..., None, None, None]
        bases = [Base(part, base_rms) for part in split_blocks(forms, grid, block)]

    def work(blocks: Sequence[tuple[_Operands, Base | None, tuple[Tensor, ...]]]) -> list[None]:
        workspace = plan.whole or _Workspace(plan)
        for x, base, (tiled, last_bias, *thresholds) in blocks:
            views = workspace.views(x.grad) if plan.whole else workspace.features(x)
            views.tiled.copy_(tiled)
            *buffers, output = views.layers
            *flat_buffers, flat_output = views.flat_layers
            hidden = views.flat_features
            for weight, threshold, buffer, flat in zip(hidden_weights, thresholds, buffers, flat_buffers, strict=True):
                hidden = torch.bmm(weight, hidden, out=flat)
                torch.maximum(buffer, threshold, out=buffer)
            torch.bmm(last_weight, hidden, out=flat_output)
            x.param.sub_(update.step(output.add_(last_bias), base))
        return []

    in_threads(work, list(zip(operands.blocks(block), bases, constant_blocks, strict=True)), operands.grad.device)


@torch.no_grad()
def step(
    param: Tensor,
    grad: Tensor,
    state: AdaState,
    network: Network,
    round_idx: Tensor,
    worker_grads: Tensor | None = None,
    damping: Tensor | None = None,
    retained_momentum: Tensor | None = None,
) -> None:
    r"""Take one outer step of the learned optimizer on one tensor, in place on `param` and `state`.

    .. math:: p \leftarrow p - \mathrm{step}(\mathrm{MLP}(\text{features}))

    with the `Update.step` of the network's update, for the published one :math:`\lambda_1 d \exp(\lambda_2 m)`.

    Args:
        param: Anchor, [P, *S], float32 or float64.
        grad: Averaged pseudo-gradient (global - local), [P, *S], of the same type.
        state: Accumulators of this tensor.
        network: Meta-parameters, of the same type.
        round_idx: Number of steps already taken, from 0, [P].
        worker_grads: Pseudo-gradient of each worker in fixed order, [P, K, *S]; for networks with K inputs.
        damping: Factor of all pseudo-gradients, as the update chose it for the whole model, [P]; None for 1.
        retained_momentum: Share of their momentum that the workers retain over a round, [P]; None for 0. An update may
            leave it out of its own momentum (`Update.advance`).

    Source: arXiv 2312.02204, section 3 and appendix.

    Example:
        >>> from lightning_lopt import AdaMLP
        >>> param, grad = torch.ones(1, 3), torch.tensor([[1.0, 0.0, -1.0]])
        >>> state = AdaState.zeros((3,), 1, torch.float32, param.device)
        >>> step(param, grad, state, AdaMLP(seed=0).functional(), torch.tensor([0]))
        >>> bool((param != 1).all())
        True
    """
    unknown, retained = torch.zeros_like(round_idx, dtype=grad.dtype), retained_momentum
    tensor = ModelTensor(
        param, grad, state, round_idx, unknown, unknown if retained is None else retained, worker_grads
    )
    _step(tensor, fold(network, round_idx, tensor.retained_momentum), damping)


def _step(tensor: ModelTensor[AdaState], network: FoldedNetwork, damping: Tensor | None) -> None:
    """Take the step of a tensor with the network of the round."""
    param, grad, worker_grads, state = tensor.param, tensor.grad, tensor.worker_grads, tensor.state
    if param.numel() == 0:
        return
    factors, update = ada.factoring(tuple(param.shape[1:])), network.update
    if damping is not None:
        grad, worker_grads = damped(grad, damping), None if worker_grads is None else damped(worker_grads, damping)
    sums = ada.factored_sums(factors.matrices(grad), factors)
    network = network._replace(decays=update.advance(state, grad, sums, network.decays))
    ada.update_factors(state, sums, network.decays, factors)
    eps = update.epsilons(state)
    operands = _Operands.of(param, grad, worker_grads, state, eps, factors)
    plan = _Plan(operands, network)
    moments = accumulate(operands, network, plan)
    forms = update.base_forms(operands.grad, state, network.decays, factors, param)
    apply(operands, separate(network, state, moments, eps, factors), moments, update, forms, plan)
    if operands.param.data_ptr() != param.data_ptr():  # the permuted view was a copy
        param.copy_(factors.restore(operands.param, param))


@torch.no_grad()
def step_model(
    tensors: Sequence[ModelTensor[AdaState]],
    networks: Sequence[Network],
    update: Update,
    total: Total = local_total,
) -> None:
    """Take one outer step of the learned optimizer on a whole model, in place.

    The pseudo-gradients of all tensors are damped together, then each tensor takes its `step`.

    Args:
        tensors: Tensors of the model; none where others hold all of them, who wait in `total`.
        networks: Meta-parameters for each tensor, in the type of its pseudo-gradient and on its device.
        update: Kind of update of these networks.
        total: Sum over the shards of the model.

    Example:
        >>> from lightning_lopt import AdaMLP
        >>> network, zero = AdaMLP.base_step().functional(), torch.zeros(1)
        >>> param, grad = torch.ones(1, 2, 2), torch.eye(2).unsqueeze(0)
        >>> state = network.update.init_state((2, 2), 1, torch.float32, param.device)
        >>> step_model([ModelTensor(param, grad, state, torch.tensor([0]), zero, zero)], [network], network.update)
        >>> [round(x, 3) for x in param.flatten().tolist()]
        [-0.1, 1.0, 1.0, -0.1]
    """
    factor = update.damp(tensors, total)
    rounds = [(id(n), id(t.round_idx), id(t.retained_momentum)) for n, t in zip(networks, tensors, strict=True)]
    folded: dict[tuple[int, int, int], FoldedNetwork] = {}
    for group in groups_of_one_shape(tensors, rounds):
        first, key, count = tensors[group[0]], rounds[group[0]], len(group)
        if key not in folded:
            folded[key] = fold(networks[group[0]], first.round_idx, first.retained_momentum)
        network, damping = folded[key].repeated(count), None if factor is None else factor.repeat(count)

        def step_group(
            tensor: ModelTensor[AdaState], network: FoldedNetwork = network, damping: Tensor | None = damping
        ) -> None:
            work = replace(tensor, param=tensor.param.to(tensor.grad.dtype))
            _step(work, network, damping)
            if work.param.data_ptr() != tensor.param.data_ptr():  # of another type
                tensor.param.copy_(work.param)

        step_together([tensors[i] for i in group], step_group)
