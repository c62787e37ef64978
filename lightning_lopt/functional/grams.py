"""Blocks of a tensor's Gram matrices that are kept."""

from __future__ import annotations

import math
from functools import lru_cache

MAX_SIDE = 512  # of a block of a Gram matrix: what is made of it costs its side cubed
LONG = 4096  # longest side with blocks; of a longer one, as of a vocabulary, the diagonal is kept
MAX_RATIO = 4  # of that side to the other side of the matrix: bounds the memory, in numbers per parameter


@lru_cache(maxsize=4096)
def gram_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Choose the blocks of the two Gram matrices of a tensor, seen as a matrix of its first dimension by the rest.

    A vector has blocks of one element on the left, and none on the right; so has the side of a vocabulary, whose
    neighbours have nothing in common.

    Returns:
        Sizes (number, side, side) on the left and on the right.

    Example:
        >>> gram_shapes((128, 784)), gram_shapes((3000, 2)), gram_shapes((7,))
        (((1, 128, 128), (2, 392, 392)), ((375, 8, 8), (1, 2, 2)), ((7, 1, 1), (0, 1, 1)))
        >>> gram_shapes((30522, 384))
        ((30522, 1, 1), (1, 384, 384))
    """

    def blocks(side: int, other: int) -> tuple[int, int, int]:
        most = max(1, min(MAX_SIDE, MAX_RATIO * other)) if side <= LONG else 1
        size = -(-side // -(-side // most)) if side else 1
        return -(-side // size), size, size

    rows, columns = (math.prod(shape), 0) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))
    return blocks(rows, columns), blocks(columns, rows)
