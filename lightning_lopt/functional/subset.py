"""Random subsets of coordinates, the same for everybody who draws them."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def shared_indices(numel: int, count: int, seed: int, round_idx: int) -> Tensor:
    """Draw a uniformly random subset of `count` of `numel` coordinates, ascending, the same for everybody who asks.

    Costs time and memory of the order of `count` up to half of the coordinates: nothing is sorted, and no mask made.

    Args:
        numel: Number of coordinates.
        count: Size of the subset, in [0, numel].
        seed: Seed of the whole run.
        round_idx: Index of the round; each has another subset.

    Example:
        >>> shared_indices(10, 3, seed=0, round_idx=0).tolist() == shared_indices(10, 3, seed=0, round_idx=0).tolist()
        True
    """
    key = hashlib.sha256(f"{seed},{round_idx}".encode()).digest()
    return _subset(numel, count, torch.Generator().manual_seed(int.from_bytes(key[:4], "big")))


def _subset(numel: int, count: int, generator: torch.Generator) -> Tensor:
    if 2 * count > numel:
        return _complement(numel, _subset(numel, numel - count, generator))
    if numel <= 1 << 12:
        return torch.randperm(numel, generator=generator)[:count].sort().values
    # Coordinates chosen independently, by their geometric gaps, and a few too many; then a random few are dropped.
    probability = (count + 4 * math.sqrt(count)) / numel
    mean = numel * probability
    chosen = torch.empty(0, dtype=torch.int64)
    while len(chosen) < count:
        uniform = torch.rand(math.ceil(mean + 8 * math.sqrt(mean)) + 1, generator=generator, dtype=torch.float64)
        gaps = uniform.neg_().log1p_().div_(math.log1p(-probability)).long().add_(1)
        positions = gaps.cumsum_(0).sub_(1)
        chosen = positions[: int(torch.searchsorted(positions, numel))]
        if len(chosen) == len(positions):  # the end was not reached: draw again
            chosen = chosen[:0]
    return chosen[_complement(len(chosen), _subset(len(chosen), len(chosen) - count, generator))]


def _complement(numel: int, index: Tensor) -> Tensor:
    """List all coordinates but these ascending ones; several times faster than a mask."""
    jumps = torch.ones(numel - len(index), dtype=torch.int64)
    before = index - torch.arange(len(index))  # how many of the others come before each
    inside = before[before < len(jumps)]
    jumps.index_add_(0, inside, torch.ones_like(inside))
    return jumps.cumsum_(0).sub_(1)
