"""Orthogonalised steps: a matrix with its singular vectors kept and its singular values made nearly equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lopt.functional.ada import MIN_SCALE, SUM_BLOCK
from lightning_lopt.functional.blocks import over

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x³ and x⁵: the slope at 0 is as large as it can be
ITERATIONS = 5
TILE = (64, 512)  # of a product


def orthogonalise(step: Tensor) -> Tensor:
    r"""Make the singular values of a matrix nearly equal, and keep its norm.

    .. math:: X_0 = S/|S|,\quad X_{i+1} = (a I + b X_i X_i^T + c (X_i X_i^T)^2) X_i,\quad
        O = X_5 \frac{|S|}{|X_5|}

    Five such Newton-Schulz iterations carry singular values between 1 and about 0.01 of |S| to between 0.7 and 1.2.

    Args:
        step: S, [P, 1, B, a, b]; its B matrices are taken side by side as one of shape [a, B b].

    Returns:
        O, of the same shape; 0 where S is 0.

    Source: Jordan et al. 2024, "Muon"; the norm is grafted as in Agarwal et al. 2020, arXiv 2002.11803.

    Example:
        >>> step = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).view(1, 1, 1, 2, 2)
        >>> result = orthogonalise(step)
        >>> bool(result[..., 1, 1] > 0.8 * result[..., 0, 0]), round(result.norm().item() ** 2, 4)
        (True, 10.0)
    """
    num_particles, _, batch, a, b = step.shape
    x = step.squeeze(1).transpose(1, 2).reshape(num_particles, a, batch * b)
    tall = a > batch * b
    x = (x.mT if tall else x).contiguous()
    norm = _norm(x)
    x = x / (norm + MIN_SCALE)
    for _ in range(ITERATIONS):
        gram = _product(x, x.mT)
        x = torch.add(COEFFICIENTS[0] * x, _product(COEFFICIENTS[1] * gram + COEFFICIENTS[2] * _product(gram, gram), x))
    x.mul_(norm / (_norm(x) + MIN_SCALE))
    x = (x.mT if tall else x).reshape(num_particles, a, batch, b)
    return x.transpose(1, 2).unsqueeze(1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right; on a CPU in tiles, so that the result does not depend on the number of threads."""
    if left.device.type != "cpu":
        return torch.bmm(left, right)
    height, width = TILE
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

    over(tiles, work, left.device)
    return result


def _norm(matrices: Tensor) -> Tensor:
    """[P, a, b] -> [P, 1, 1], summed in blocks that one thread takes."""
    flat = matrices.flatten(1)
    parts = flat.split(max(1, SUM_BLOCK // len(flat)), dim=1)
    return torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts]).square().sum(0).sqrt()[:, None, None]
