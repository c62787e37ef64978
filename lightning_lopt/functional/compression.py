"""Lossy codes of tensors: rounding and selection, as tensors of codes and back, and factors of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 12  # coordinates among which the largest are kept


def round_to_int8(values: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    r"""Round to 255 levels, symmetric, with a scale s per piece.

    .. math:: q = \mathrm{round}(x / s), \qquad s = \max|x| / 127

    Args:
        values: Values x, [n].
        sizes: Sizes of the pieces that the values are made of.

    Returns:
        Scales, one for each piece, in the type of the values, and levels q, int8 [n].

    Example:
        >>> round_to_int8(torch.tensor([1.0, -0.3, 127.0]), [3])
        (tensor([1.]), tensor([  1,   0, 127], dtype=torch.int8))
    """
    scales, levels = values.new_zeros(len(sizes)), values.new_empty(len(values), dtype=torch.int8)
    for i, (piece, level) in enumerate(zip(values.split(list(sizes)), levels.split(list(sizes)), strict=True)):
        if len(piece):
            scales[i] = piece.abs().amax() / 127
            level.copy_((piece / scales[i]).nan_to_num_().round_())
    return scales, levels


def from_int8(scales: Tensor, levels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Compute the values of scales and levels as `round_to_int8` returns them, float32 [n]."""
    values = levels.float()
    for piece, scale in zip(values.split(list(sizes)), scales, strict=True):
        piece.mul_(scale)
    return values


def top_k_chunks(numel: int, density: float) -> list[tuple[int, int, int]]:
    """Divide coordinates into chunks of equal length: all whole ones, then the rest.

    Args:
        numel: Number of coordinates.
        density: Share of the coordinates of a chunk that are kept, rounded up.

    Returns:
        Number of chunks, their length, and the number of coordinates that each keeps.

    Example:
        >>> top_k_chunks(10_000, 0.02)
        [(2, 4096, 82), (1, 1808, 37)]
    """
    chunks = [(numel // CHUNK, CHUNK), (1, numel % CHUNK)]
    return [(num, length, math.ceil(density * length)) for num, length in chunks if num * length]


def select_top_k(values: Tensor, density: float) -> tuple[list[Tensor], list[Tensor]]:
    """Select the largest coordinates by magnitude of every chunk.

    Args:
        values: Values, [n].
        density: Share of the coordinates to keep.

    Returns:
        Values that are kept and their places in their chunks, int16, flat, for each entry of `top_k_chunks`.
    """
    kept, places, start = [], [], 0
    for num, length, keep in top_k_chunks(len(values), density):
        chunks = values[start : start + num * length].view(num, length)
        place = chunks.abs().topk(keep, sorted=False).indices
        kept.append(chunks.gather(1, place).flatten())
        places.append(place.flatten().to(torch.int16))
        start += num * length
    return kept, places


def from_top_k(kept: Tensor, places: Tensor, numel: int, density: float) -> Tensor:
    """Put values that were kept back into their places, with 0 elsewhere.

    Args:
        kept: Values that `select_top_k` kept, joined.
        places: Their places, joined, int64.
        numel: Number of coordinates n.
        density: Share of the coordinates that were kept.

    Returns:
        Values, float32 [n].
    """
    values, start, first = kept.new_zeros(numel, dtype=torch.float32), 0, 0
    for num, length, keep in top_k_chunks(numel, density):
        part = slice(first, first + num * keep)
        chunks = values[start : start + num * length].view(num, length)
        chunks.scatter_(1, places[part].view(num, keep), kept[part].view(num, keep))
        start, first = start + num * length, first + num * keep
    return values


def is_worth_factors(shape: Sequence[int], rank: int) -> bool:
    """Whether two factors of a matrix are fewer numbers than the matrix.

    Args:
        shape: Shape of a tensor; its first dimension is the rows, all others together are the columns.
        rank: Number of columns of each factor.

    Example:
        >>> is_worth_factors([8, 4, 2], rank=3), is_worth_factors([8, 4, 2], rank=4), is_worth_factors([64], rank=1)
        (True, False, False)
    """
    if len(shape) < 2:
        return False
    rows, columns = shape[0], math.prod(shape[1:])
    return rank * (rows + columns) < rows * columns


def orthonormal_basis(columns: Tensor) -> Tensor:
    """Orthonormal columns that span those of a matrix, completed where these are dependent or 0.

    Args:
        columns: Matrix, [n, r] with r <= n.

    Returns:
        Basis, [n, r].

    Example:
        >>> orthonormal_basis(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0]])).abs()
        tensor([[0., 1.],
                [1., 0.],
                [0., 0.]])
    """
    return torch.linalg.qr(columns).Q
