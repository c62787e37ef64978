"""The learned step of LOpt-A and LAgg-A in its exact separable form.

`functional.layers` says how the network separates. What is left per coordinate runs in blocks that stay in a cache.
`functional.plain` holds the plain form, which this one equals up to rounding.

A step is `ada.factored_sums` -> `accumulate` -> `apply`; `step` is the three in a row. The sums of the first two
add up over shards of a tensor, so a caller that shards tensors reduces them in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.functional import ada
from lightning_lopt.functional.ada import AdaState, Factoring
from lightning_lopt.functional.blocks import Grid, block_shape, cut, over
from lightning_lopt.functional.damping import damped
from lightning_lopt.functional.layers import Layers, Moments, Network, separate
from lightning_lopt.functional.updates import UPDATES, Base, base_forms, decays_of_round, nesterov
from lightning_lopt.functional.whitening import update_grams

# Elements per block, over all particles. A thread needs 2 x 32 floats for each: on a CPU larger blocks fall out of
# the cache and smaller ones cost more in dispatch; a GPU wants few large launches. Tens of MB, whatever the model.
BLOCK_SIZE = {"cpu": 9 << 11, "other": 1 << 18}


class _Operands(NamedTuple):
    """What a step reads and writes, of a whole tensor or of a block: [P, X, B, a, b]."""

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
        _, _, batch, a, b = self.grad.shape
        return batch, a, b

    @property
    def block(self) -> Grid:
        size = BLOCK_SIZE.get(self.grad.device.type, BLOCK_SIZE["other"])
        return block_shape(self.grid, max(1, size // len(self.grad)))

    def blocks(self) -> list[_Operands]:
        grid, block = self.grid, self.block
        return [_Operands(*views) for views in zip(*(cut(tensor, grid, block) for tensor in self), strict=True)]


class _Views(NamedTuple):
    """The buffers of a `_Workspace` as blocks of one shape use them: [P, X, B, a, b], `flat` ones [P, X, n].

    A coordinate has tiled features (0 or 6), then the per-coordinate ones in the order of the network.
    """

    copied: Tensor
    momentum: Tensor
    second: Tensor
    normed_m: Tensor
    rsqrt_v: Tensor
    fac_g: Tensor
    fac_m: Tensor
    flat_features: Tensor
    layers: list[Tensor]
    flat_layers: list[Tensor]


class _Workspace:
    """The buffers of one thread: the features and the layers of the network alternate between two of them.

    Args:
        operands: of the whole tensor.
        num_tiled: features constant along a, which come as vectors.
        widths: outputs of each layer.
    """

    def __init__(self, operands: _Operands, num_tiled: int = 0, widths: Sequence[int] = ()) -> None:
        num_inputs = operands.inputs.shape[1]
        self._factored = operands.factored
        self._sections = [num_tiled + num_inputs + 1, 3, 1, 3, 1, 3, 3]
        self._widths = [sum(self._sections), *widths]
        size = len(operands.grad) * max(self._widths) * math.prod(operands.block)
        self._buffers = [operands.grad.new_empty(size) for _ in self._widths[:2]]
        self._views: dict[torch.Size, _Views] = {}

    def views(self, like: Tensor) -> _Views:
        """The views for blocks of the shape of `like` [P, 1, B, a, b]."""
        if like.shape not in self._views:
            features, *layers = (
                self._buffers[i % 2][: width * like.numel()].view(len(like), width, *like.shape[2:])
                for i, width in enumerate(self._widths)
            )
            _, momentum, second, normed_m, rsqrt_v, fac_g, fac_m = features.split(self._sections, dim=1)
            self._views[like.shape] = _Views(
                copied=features.narrow(1, 0, sum(self._sections[:3])),
                momentum=momentum,
                second=second,
                normed_m=normed_m,
                rsqrt_v=rsqrt_v,
                fac_g=fac_g,
                fac_m=fac_m,
                flat_features=features.flatten(2),
                layers=layers,
                flat_layers=[layer.flatten(2) for layer in layers],
            )
        return self._views[like.shape]

    def features(self, x: _Operands, *tiled: Tensor) -> _Views:
        """Write the features of a block."""
        views = self.views(x.grad)
        torch.cat([*tiled, x.inputs, x.param, x.momentum, x.second], 1, out=views.copied)
        torch.add(views.second, x.second_eps, out=views.rsqrt_v).rsqrt_()
        torch.mul(views.momentum, views.rsqrt_v, out=views.normed_m)
        torch.mul(x.row_scale, x.col_scale, out=views.fac_m)
        torch.mul(views.fac_m if self._factored else x.vector_scale, x.grad, out=views.fac_g)
        views.fac_m.mul_(views.momentum)
        return views


def accumulate(operands: _Operands, network: Network) -> Moments:
    """Advance m and v and return the sums over the tensor that the rest needs."""
    relative = UPDATES[network.update].relative

    def work(blocks: Sequence[_Operands]) -> list[Tensor]:
        workspace = _Workspace(operands)
        sums = []
        for x in blocks:
            ada.update_moments(x.momentum, x.second, x.grad, network.decays)
            views = workspace.features(x)
            parts = [torch.linalg.vector_norm(views.flat_features, dim=-1).square_()]
            if relative:
                grad = x.grad.flatten(2)
                base = nesterov(x.grad, x.momentum, network.decays).flatten(1)
                products = torch.bmm(torch.cat([grad, views.momentum.flatten(2)], 1), grad.mT).squeeze(2)
                parts += [torch.linalg.vector_norm(base, dim=-1, keepdim=True).square_(), products]
            sums.append(torch.cat(parts, 1))
        return sums

    sums = torch.stack(over(operands.blocks(), work, operands.grad.device)).sum(0)
    features, base, products = sums.tensor_split([operands.inputs.shape[1] + 15, operands.inputs.shape[1] + 16], 1)
    return Moments(features, base, products, operands.grad[0].numel())


def apply(operands: _Operands, layers: Layers, moments: Moments, network: Network, forms: Tensor | None) -> None:
    """Run the network over all coordinates and move `operands.param`, in place; `forms` are those of its base step."""
    kind = UPDATES[network.update]
    *hidden_weights, last_weight = layers.weights
    grid, block = operands.grid, operands.block
    constants = layers.tiled.expand(-1, -1, *grid), layers.bias, *layers.thresholds
    constant_blocks = list(zip(*(cut(tensor, grid, block) for tensor in constants), strict=True))
    bases = [None] * len(constant_blocks)
    if forms is not None:
        base_rms = (moments.base / moments.numel).sqrt_()[..., None, None, None]
        bases = [Base(part, base_rms) for part in cut(forms, grid, block)]

    def work(blocks: Sequence[tuple[_Operands, Base | None, tuple[Tensor, ...]]]) -> list[None]:
        workspace = _Workspace(operands, layers.tiled.shape[1], [weight.shape[1] for weight in layers.weights])
        for x, base, (tiled, last_bias, *thresholds) in blocks:
            views = workspace.features(x, tiled)
            *buffers, output = views.layers
            *flat_buffers, flat_output = views.flat_layers
            hidden = views.flat_features
            for weight, threshold, buffer, flat in zip(hidden_weights, thresholds, buffers, flat_buffers, strict=True):
                hidden = torch.bmm(weight, hidden, out=flat)
                torch.maximum(buffer, threshold, out=buffer)
            torch.bmm(last_weight, hidden, out=flat_output)
            x.param.sub_(kind.step(output.add_(last_bias), base))
        return []

    over(list(zip(operands.blocks(), bases, constant_blocks, strict=True)), work, operands.grad.device)


@torch.no_grad()
def step(
    param: Tensor,
    grad: Tensor,
    state: AdaState,
    network: Network,
    round_idx: Tensor,
    worker_grads: Tensor | None = None,
    damping: Tensor | None = None,
    carried: Tensor | None = None,
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
        damping: what an update with a base step multiplies all pseudo-gradients with, [P]; None for 1.
        carried: the share of their momentum that the workers keep over a round, [P], which such an update does not
            remember again; None for 0.

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
    factors, kind = ada.factoring(tuple(param.shape[1:])), UPDATES[network.update]
    if kind.relative and damping is not None:
        grad, worker_grads = damped(grad, damping), None if worker_grads is None else damped(worker_grads, damping)
    sums = ada.factored_sums(factors.matrices(grad), factors)
    if kind.relative:
        decays = decays_of_round(network.decays, round_idx, ada.norm_ratio(state, sums), carried)
        network = network._replace(decays=decays)
        update_grams(state, grad)
    ada.update_factors(state, sums, network.decays, factors)
    eps = ada.epsilons(state, relative=kind.relative)
    operands = _Operands.of(param, grad, worker_grads, state, eps, factors)
    moments = accumulate(operands, network)
    forms = None
    if kind.relative:
        base_step = nesterov(operands.grad, operands.momentum, network.decays)
        forms = base_forms(base_step, state, factors, param)
    apply(operands, separate(network, state, moments, eps, round_idx, factors), moments, network, forms)
    if operands.param.data_ptr() != param.data_ptr():  # the permuted view was a copy
        param.copy_(factors.restore(operands.param, param))
