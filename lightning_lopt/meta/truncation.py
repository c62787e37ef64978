"""Lengths of unrolls."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogUniform:
    r"""Unroll lengths drawn anew for each unroll; low = high is a fixed length.

    .. math:: \log T \sim U(\log \text{low}, \log \text{high})

    Args:
        low: Length of the shortest unroll in rounds, >= 1.
        high: Length of the longest, >= low.

    Raises:
        ValueError: The bounds are not in order.

    Source: Metz et al. 2022 (VeLO), arXiv 2211.09760; with 100 and 1,000 in arXiv 2312.02204.

    Example:
        >>> LogUniform(100, 100).draw(2, torch.Generator())
        tensor([100, 100])
    """

    low: int = 100
    high: int = 1_000

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"Unroll lengths need 1 <= low <= high, not {self.low} and {self.high}.")

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw lengths of `count` unrolls, int64 [count]."""
        span = math.log(self.high / self.low)
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        return (self.low * torch.exp(span * uniform)).round().long()

    def draw_first(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw lengths of the first unrolls, shortened at random so that the particles are out of phase."""
        lengths = self.draw(count, generator)
        return (torch.rand(count, generator=generator, dtype=torch.float64) * lengths).ceil().long().clamp(min=1)
