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
    return tensor.reshape(len(tensor), -1, 1) if tensor.dim() < 3 else tensor.flatten(2)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply [P, a, b] and [P, b, c]; on a CPU in tiles, each of which one thread takes."""
    if left.device.type != "cpu":
        return torch.bmm(left, right)
    height, width = TILE
    if torch.get_num_threads() == 1 and left.shape[1] <= height and right.shape[2] <= width:
        return torch.bmm(left, right)
    result = left.new_empty(*left.shape[:2], right.shape[2])
    tiles = [
        (rows, columns, tile)
        for rows, band in zip(left.split(height, 1), result.split(height, 1), strict=True)
        for columns, tile in zip(right.split(width, 2), band.split(width, 2), strict=True)
    ]

    def work(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[None]:
        for rows, columns, tile in parts:
            torch.bmm(rows, columns, out=tile)
        return []

    in_threads(work, tiles, left.device)
    return result


def norm(matrices: Tensor) -> Tensor:
    """Compute the Frobenius norm, [P, *S] to [P, 1, ...], summed in blocks that one thread takes.

    It is right for anything that float32 can hold: squares are of what is left after a division by the largest element.
    """
    flat = matrices.reshape(len(matrices), -1)
    largest = flat.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(flat.dtype).tiny)
    parts = flat.split(max(1, SUM_BLOCK // len(flat)), dim=1)
    sums = torch.stack([torch.linalg.vector_norm(part / largest, dim=1) for part in parts]).square().sum(0)
    return (sums.sqrt() * largest[:, 0]).view(-1, *[1] * (matrices.dim() - 1))


def grafted(step: Tensor, like: Tensor) -> Tensor:
    """Scale a step to the norm of another one, [P, *S] each; 0 where the step is 0."""
    return step * (norm(like) / norm(step).clamp_(min=torch.finfo(step.dtype).tiny))
