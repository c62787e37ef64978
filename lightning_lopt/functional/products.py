"""Products and norms of matrices whose bits do not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lopt.functional.ada import SUM_BLOCK
from lightning_lopt.functional.blocks import in_threads

TILE = (64, 512)  # of a product


def as_matrix(tensor: Tensor) -> Tensor:
    """View [P, *S] as [P, n, m], its first dimension by the rest; a vector or scalar is a column."""
    return tensor.reshape(tensor.shape[0], -1, 1) if tensor.dim() < 3 else tensor.flatten(2)


def product(left: Tensor, right: Tensor, plus: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    r"""Compute :math:`\beta P + \alpha L R`; on a CPU in tiles, each of which one thread takes.

    Args:
        left: Left factors L, [P, a, b].
        right: Right factors R, [P, b, c].
        plus: Summands P, [P, a, c]; None for 0.
        beta: Factor β of the summands.
        alpha: Factor α of the products.
    """
    height, width = TILE
    one_tile = torch.get_num_threads() == 1 and left.shape[1] <= height and right.shape[2] <= width
    if left.device.type != "cpu" or one_tile:
        return _product(left, right, plus, beta, alpha)
    result = left.new_empty(*left.shape[:2], right.shape[2])
    tiles = [
        (
            left[:, row : row + height],
            right[..., column : column + width],
            None if plus is None else plus[:, row : row + height, column : column + width],
            result[:, row : row + height, column : column + width],
        )
        for row in range(0, left.shape[1], height)
        for column in range(0, right.shape[2], width)
    ]
    _fill(tiles, beta, alpha)
    return result


def symmetric_product(
    left: Tensor, right: Tensor, plus: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Compute `product` where the result is symmetric, as of matrices that commute, from little more than half of it.

    Args:
        left: Left factors, [P, a, b].
        right: Right factors, [P, b, a].
        plus: Symmetric summands, [P, a, a]; None for 0.
        beta: Factor of the summands.
        alpha: Factor of the products.
    """
    height, side = TILE[0], left.shape[1]
    if left.device.type != "cpu" or side <= height:
        return product(left, right, plus, beta, alpha)
    result = left.new_empty(left.shape[0], side, side)
    starts = range(0, side, height)
    _fill(
        [
            (
                left[:, row : row + height],
                right[..., row:],
                None if plus is None else plus[:, row : row + height, row:],
                result[:, row : row + height, row:],
            )
            for row in starts
        ],
        beta,
        alpha,
    )
    for row in starts:
        result[:, row + height :, row : row + height] = result[:, row : row + height, row + height :].mT
    return result


_Tile = tuple[Tensor, Tensor, "Tensor | None", Tensor]


def _fill(tiles: Sequence[_Tile], beta: float, alpha: float) -> None:
    """Compute tiles of products, given with their factors and summands."""

    def work(parts: Sequence[_Tile]) -> list[None]:
        for left, right, plus, tile in parts:
            _product(left, right, plus, beta, alpha, out=tile)
        return []

    in_threads(work, tiles, tiles[0][0].device)


def _product(
    left: Tensor, right: Tensor, plus: Tensor | None, beta: float, alpha: float, out: Tensor | None = None
) -> Tensor:
    if plus is None:
        assert alpha == 1
        return torch.bmm(left, right, out=out)
    return torch.baddbmm(plus, left, right, beta=beta, alpha=alpha, out=out)


def norm(matrices: Tensor) -> Tensor:
    """Compute the Frobenius norm, [P, *S] to [P, 1, ...], summed in float64 and in blocks that one thread takes.

    It is right for anything that float32 can hold.
    """
    flat = matrices.reshape(matrices.shape[0], -1)
    size = max(1, SUM_BLOCK // flat.shape[0])
    if flat.shape[1] <= size:
        total = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
    else:
        sums = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in flat.split(size, dim=1)]
        total = torch.linalg.vector_norm(torch.stack(sums), dim=0)
    return total.to(flat.dtype).view(-1, *[1] * (matrices.dim() - 1))


def grafted(step: Tensor, size: Tensor) -> Tensor:
    """Scale a step [P, *S] to a norm [P, 1, ...]; 0 where the step is 0."""
    return step * (size / norm(step).clamp_(min=torch.finfo(step.dtype).tiny))
