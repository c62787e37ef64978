"""Ada accumulators and per-coordinate features of the learned optimizer (arXiv 2312.02204, appendix).

Every tensor carries a leading particle dimension P. A parameter of shape [P, *S] is seen as [P, B, a, b]:
its two largest dimensions come last, in their original order, all others are merged into B. A vector or
scalar is seen as [P, 1, 1, n].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.functional.blocks import block_shape, split_blocks
from lightning_lopt.functional.grams import gram_shapes

MOMENTUM_INIT = (0.9, 0.99, 0.999)
RMS_INIT = (0.999,)
FACTORED_INIT = (0.9, 0.99, 0.999)
TIME_SCALES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)

SQUARE_EPS = 1e-30
MIN_SCALE = 1e-20
RMS_EPS = 1e-5  # of the normalisation of published features by their mean square


class Epsilons(NamedTuple):
    """Terms added before roots and divisions.

    Attributes:
        factor: Term of the factored features, [P, 1, 1, 1].
        second: Term of the second moment, [P, 1, 1, 1].
        rsqrt: Term of the inverse roots of rows and columns, [P, 1, 1, 1].
        rms: Term of the normalisation by the root mean square, a number.
    """

    factor: Tensor
    second: Tensor
    rsqrt: Tensor
    rms: float


class Decays(NamedTuple):
    """Decays of the accumulators, as complements ``1 - decay``, which float32 holds exactly enough.

    Attributes:
        momentum: Complements for the momenta, [P, 3].
        rms: Complement for the second moment, [P, 1].
        factored: Complements for rows and columns, [P, 3].
        shrink: Factor of the first momentum before it is advanced, [P]; None for 1.
    """

    momentum: Tensor
    rms: Tensor
    factored: Tensor
    shrink: Tensor | None = None


def decay_complements(momentum: Tensor, rms: Tensor, factored: Tensor) -> Decays:
    r"""Turn meta-learned offsets into complements of decays.

    .. math:: 1 - \beta = \exp(10\,(\log(1 - \beta_{init}) / 10 + \text{offset}))

    The complements of the rms and factored decays are clipped to [0, 1], those of momentum are not.

    Args:
        momentum: Offsets of the momenta, [P, 3].
        rms: Offset of the second moment, [P, 1].
        factored: Offsets of rows and columns, [P, 3].

    Source: arXiv 2312.02204, reference code `FedAdafacMLPLOpt`.

    Example:
        >>> decays = decay_complements(torch.zeros(1, 3), torch.zeros(1, 1), torch.zeros(1, 3))
        >>> [round(x, 4) for x in decays.momentum[0].tolist()]
        [0.1, 0.01, 0.001]
    """

    def complement(offset: Tensor, init: tuple[float, ...]) -> Tensor:
        log_init = torch.tensor([math.log(1 - b) for b in init], dtype=offset.dtype, device=offset.device)
        return torch.exp(log_init + 10 * offset)

    return Decays(
        complement(momentum, MOMENTUM_INIT),
        complement(rms, RMS_INIT).clamp(max=1),
        complement(factored, FACTORED_INIT).clamp(max=1),
    )


@dataclass(frozen=True)
class Factoring:
    """View of a tensor of shape [*S] as [B, a, b], and the direction of its factors.

    Attributes:
        permutation: Dimensions of the tensor, the factored pair last.
        shape: Sizes (B, a, b).
        row_axis: Axis along which the row factor R runs: -2 for a (d0 is b), -1 for b.
        factored: Whether there are factors; vectors and scalars are [1, 1, n] with D = R along b and no column factor.
    """

    permutation: tuple[int, ...]
    shape: tuple[int, int, int]
    row_axis: int
    factored: bool = True

    @property
    def col_axis(self) -> int:
        """Axis along which the column factor C runs."""
        return -3 - self.row_axis

    def matrices(self, tensor: Tensor) -> Tensor:
        """View [P, *S] as [P, 1, B, a, b]; a copy where the permutation does not allow a view."""
        return tensor.permute(0, *(1 + d for d in self.permutation)).reshape(tensor.shape[0], 1, *self.shape)

    def along(self, vector: Tensor, axis: int) -> Tensor:
        """View [P, X, B, n] along `row_axis` or `col_axis` as [P, X, B, n, 1] or [P, X, B, 1, n]."""
        return vector.unsqueeze(-1 if axis == -2 else -2)

    def restore(self, matrices: Tensor, like: Tensor) -> Tensor:
        """Invert `matrices`: [P, 1, B, a, b] to [P, *S]."""
        inverse = sorted(range(len(self.permutation)), key=self.permutation.__getitem__)
        permuted = matrices.reshape(like.shape[0], *(like.shape[1 + d] for d in self.permutation))
        return permuted.permute(0, *(1 + d for d in inverse))


@lru_cache(maxsize=4096)
def factoring(shape: tuple[int, ...]) -> Factoring:
    """Choose the factoring of a tensor of a shape.

    d0 is the largest dimension and d1 the second largest, by a stable sort (on a tie the later index is d0).

    Example:
        >>> factoring((64, 32, 3, 3)).shape, factoring((64, 32, 3, 3)).row_axis, factoring((7,)).shape
        ((9, 64, 32), -1, (1, 1, 7))
    """
    if len(shape) < 2:
        return Factoring(tuple(range(len(shape))), (1, 1, math.prod(shape)), row_axis=-1, factored=False)
    by_size = sorted(range(len(shape)), key=shape.__getitem__)
    d1, d0 = by_size[-2], by_size[-1]
    first, second = sorted((d1, d0))
    others = tuple(d for d in range(len(shape)) if d not in (d1, d0))
    batch = math.prod(shape[d] for d in others)
    return Factoring((*others, first, second), (batch, shape[first], shape[second]), -2 if d1 == first else -1)


@dataclass
class BaseState:
    """Memory of the blended Nesterov step of one parameter tensor, updated in place.

    Attributes:
        momentum: Momentum m, [P, 1, B, a, b].
        squared_norm: Squared norm of the pseudo-gradient of the round before, [P]; 0 before the first.
        norm_limit: Norm of the pseudo-gradient from which on it is damped, [P]; 0 for none yet.
        local_scale: γH of the last round in which it was known, [P].
        left_gram: Exponential sum of G Gᵀ in diagonal blocks, [P, *`grams.gram_shapes`].
        right_gram: Exponential sum of Gᵀ G, likewise.
    """

    momentum: Tensor
    squared_norm: Tensor
    norm_limit: Tensor
    local_scale: Tensor
    left_gram: Tensor
    right_gram: Tensor

    @classmethod
    def zeros(cls, shape: tuple[int, ...], num_particles: int, dtype: torch.dtype, device: torch.device) -> BaseState:
        """Create the memory of a parameter before its first step.

        Args:
            shape: Shape of the parameter, [*S].
            num_particles: Number of particles P.
            dtype: Type of the memory.
            device: Device of the memory.
        """

        def new(*tail: int) -> Tensor:
            return torch.zeros(num_particles, *tail, dtype=dtype, device=device)

        left, right = gram_shapes(shape)
        return cls(new(1, *factoring(shape).shape), new(), new(), new(), new(*left), new(*right))


@dataclass
class AdaState:
    """Accumulators of one parameter tensor, updated in place.

    Attributes:
        momentum: Momenta m_i, [P, 3, B, a, b].
        second: Second moment v, [P, B, a, b].
        row: Row factors R_i, [P, 3, B, size of d1]; for vectors D_i, [P, 3, 1, n].
        col: Column factors C_i, [P, 3, B, size of d0]; unused for vectors.
        squared_norm: Squared norm of the pseudo-gradient of the round before, [P]; 0 before the first.
        norm_limit: Norm of the pseudo-gradient from which on it is damped, [P]; 0 for none yet.
        local_scale: γH of the last round in which it was known, [P].
        left_gram: Exponential sum of G Gᵀ in diagonal blocks, [P, *`grams.gram_shapes`]; empty if not wanted.
        right_gram: Exponential sum of Gᵀ G, likewise.
    """

    momentum: Tensor
    second: Tensor
    row: Tensor
    col: Tensor
    squared_norm: Tensor
    norm_limit: Tensor
    local_scale: Tensor
    left_gram: Tensor
    right_gram: Tensor

    @classmethod
    def zeros(
        cls,
        shape: tuple[int, ...],
        num_particles: int,
        dtype: torch.dtype,
        device: torch.device,
        grams: bool = False,
    ) -> AdaState:
        """Create the accumulators of a parameter before its first step.

        Args:
            shape: Shape of the parameter, [*S].
            num_particles: Number of particles P.
            dtype: Type of the accumulators.
            device: Device of the accumulators.
            grams: Whether Gram matrices are kept.
        """
        factors = factoring(shape)
        batch, *sides = factors.shape
        left, right = gram_shapes(shape) if grams else [(0, 1, 1)] * 2

        def new(*tail: int) -> Tensor:
            return torch.zeros(num_particles, *tail, dtype=dtype, device=device)

        return cls(
            momentum=new(3, *factors.shape),
            second=new(*factors.shape),
            row=new(3, batch, sides[factors.row_axis]),
            col=new(3, batch, sides[factors.col_axis]),
            squared_norm=new(),
            norm_limit=new(),
            local_scale=new(),
            left_gram=new(*left),
            right_gram=new(*right),
        )

    @property
    def base(self) -> BaseState:
        """Memory of the base step that an update may start from, as views; its momentum is the first one."""
        return BaseState(
            self.momentum[:, :1],
            self.squared_norm,
            self.norm_limit,
            self.local_scale,
            self.left_gram,
            self.right_gram,
        )


# Elements squared at a time: few enough that torch sums them in one thread, in an order that does not depend on how
# many there are.
SUM_BLOCK = 30_000


def factored_sums(grad: Tensor, factors: Factoring) -> tuple[Tensor, Tensor]:
    """Sum g² over d0 and over d1.

    Args:
        grad: Averaged pseudo-gradient, [P, 1, B, a, b].
        factors: Factoring of the parameter.

    Returns:
        Row sums [P, B, size of d1] and column sums [P, B, size of d0].
    """
    grid, num_particles = factors.shape, grad.shape[0]
    block = block_shape(grid, max(1, SUM_BLOCK // num_particles))
    if block == grid:
        squares = grad[:, 0].square()
        along_a, along_b = squares.sum(-1), squares.sum(-2)
        return (along_a, along_b) if factors.row_axis == -2 else (along_b, along_a)
    along_a = grad.new_zeros(num_particles, 1, *grid[:2], 1)
    along_b = grad.new_zeros(num_particles, 1, grid[0], 1, grid[2])
    parts = (split_blocks(tensor, grid, block) for tensor in (grad, along_a, along_b))
    for part, sum_a, sum_b in zip(*parts, strict=True):
        squares = part.square()
        sum_a += squares.sum(-1, keepdim=True)
        sum_b += squares.sum(-2, keepdim=True)
    row, col = along_a[:, 0, :, :, 0], along_b[:, 0, :, 0]
    return (row, col) if factors.row_axis == -2 else (col, row)


def update_factors(state: AdaState, sums: tuple[Tensor, Tensor], decays: Decays, factors: Factoring) -> None:
    r"""Advance R and C (for vectors D), in place.

    .. math:: R_i \leftarrow \phi_i R_i + (1-\phi_i)\,\mathrm{mean}_{d_0}(g^2 + 10^{-30}),\quad
        C_i \leftarrow \phi_i C_i + (1-\phi_i)\,\mathrm{mean}_{d_1}(g^2 + 10^{-30})

    Args:
        state: Accumulators of the parameter.
        sums: Result of `factored_sums`.
        decays: Complements of the decays.
        factors: Factoring of the parameter.

    Source: arXiv 2312.02204, appendix, after Shazeer & Stern 2018.
    """
    keep = decays.factored[:, :, None, None]
    sides = factors.shape[1:]
    for target, total, count in zip(
        (state.row, state.col), sums, (sides[factors.col_axis], sides[factors.row_axis]), strict=True
    ):
        target.lerp_((total / count + SQUARE_EPS).unsqueeze(1), keep)


def update_moments(momentum: Tensor, second: Tensor, grad: Tensor, decays: Decays) -> None:
    r"""Advance m and v of one block, in place.

    .. math:: m_i \leftarrow \beta_i m_i + (1-\beta_i) g,\quad v \leftarrow \beta_v v + (1-\beta_v) g^2

    Args:
        momentum: Momenta m_i, [P, 3, B, a, b].
        second: Second moment v, [P, 1, B, a, b].
        grad: Averaged pseudo-gradient g, [P, 1, B, a, b].
        decays: Complements of the decays.

    Source: arXiv 2312.02204, appendix.
    """
    if decays.shrink is not None:
        momentum[:, :1].mul_(decays.shrink[:, None, None, None, None])
    momentum.lerp_(grad, decays.momentum[:, :, None, None, None])
    second.lerp_(grad.square(), decays.rms[:, :, None, None, None])


def row_means(state: AdaState) -> Tensor:
    """Compute the means of R_i over the tensor, [P, 3]: running means of g²."""
    rows = state.row.flatten(2)
    return sum_in_blocks(rows) / rows.shape[2]


def squared_norm(tensor: Tensor) -> Tensor:
    """Sum the squares of a tensor, [P, *S] to [P], in an order that does not depend on the number of threads."""
    flat, size = tensor.reshape(tensor.shape[0], -1), max(1, SUM_BLOCK // tensor.shape[0])
    if flat.shape[1] <= size:
        return flat.square().sum(1)
    return torch.stack([part.square().sum(1) for part in flat.split(size, dim=1)]).sum(0)


def sum_in_blocks(rows: Tensor) -> Tensor:
    """Sum [P, X, n] to [P, X], each part of the sum in one thread."""
    size = max(1, SUM_BLOCK // (rows.shape[0] * rows.shape[1]))
    if rows.shape[2] <= size:
        return rows.sum(2)
    return torch.stack([part.sum(2) for part in rows.split(size, dim=2)]).sum(0)


def epsilons(state: AdaState, *, relative: bool) -> Epsilons:
    """Compute the terms added before roots and divisions from 1e-9, 1e-6, 1e-8 (and 1e-5), the published constants.

    Args:
        state: Accumulators of the parameter, already advanced.
        relative: Whether the first three are in units of the running mean of g² over the tensor, and the last one is
            the smallest normal number, so that the features do not change when all pseudo-gradients are scaled; else
            they are the published constants themselves.
    """
    if not relative:
        scale = torch.ones_like(state.row[:, -1:, :1, :1])
    else:
        scale = row_means(state)[:, -1:, None, None].clamp_(min=MIN_SCALE)
    return Epsilons(1e-9 * scale, 1e-6 * scale, 1e-8 * scale, torch.finfo(scale.dtype).tiny if relative else RMS_EPS)


def gradient_scales(state: AdaState, eps: Epsilons, factors: Factoring) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the scales of the factored features: that of m along R, that along C, and for vectors that of g.

    Args:
        state: Accumulators of the parameter, already advanced.
        eps: Terms added before roots and divisions.
        factors: Factoring of the parameter.

    Returns:
        For matrices rf [P, 3, B, size of d1], cf [P, 3, B, size of d0], and rf again: g and m are both scaled by
        rf·cf. For vectors 1/sqrt(D + eps.second), 1 and 1/sqrt(max(D + eps.factor, eps.factor)).
    """
    if not factors.factored:
        vector = (state.row + eps.factor).clamp_(min=eps.factor).rsqrt_()
        return (state.row + eps.second).rsqrt_(), torch.ones_like(state.col), vector
    rf = (state.row / (state.row.mean(-1, keepdim=True) + eps.factor)).clamp_(min=1e-9).rsqrt_()
    return rf, state.col.clamp(min=eps.factor).rsqrt_(), rf


def time_features(step: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute tanh(t/x - 1) for the eleven time scales x: [P] to [P, 11].

    Example:
        >>> time_features(torch.tensor([1]), torch.float32)[0, 0].item()
        0.0
    """
    return torch.tanh(step.to(dtype)[:, None] / _time_scales(dtype, step.device) - 1)


@lru_cache
def _time_scales(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(TIME_SCALES, dtype=dtype, device=device)
