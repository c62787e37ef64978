"""Division of items into parts of about equal size."""

from __future__ import annotations

from collections.abc import Sequence


def even_bounds(length: int, num_parts: int) -> list[int]:
    """Bounds of consecutive parts of about equal length.

    Args:
        length: Number of items.
        num_parts: Number of parts, at least 1; some are empty if it exceeds the length.

    Returns:
        Begin of each part and the end of the last.

    Example:
        >>> even_bounds(10, 4)
        [0, 2, 5, 7, 10]
    """
    return [length * part // num_parts for part in range(num_parts + 1)]


def least_loaded(sizes: Sequence[int], loads: list[int]) -> list[int]:
    """Give each item, the largest first, to the owner that is least loaded.

    Args:
        sizes: Size of each item; one of size 0 counts as 1.
        loads: Load of each owner so far, to which the sizes are added.

    Returns:
        The owner of each item.

    Example:
        >>> least_loaded([5, 4, 2], loads := [0, 0]), loads
        ([0, 1, 1], [5, 6])
    """
    owners = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = min(range(len(loads)), key=loads.__getitem__)
        loads[owners[i]] += max(1, sizes[i])
    return owners
