"""Blocks of bounded size of tensors [P, X, B, a, b], and their computation in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

Grid = tuple[int, int, int]
Job = TypeVar("Job")
Result = TypeVar("Result")
_threads: ContextVar[int] = ContextVar("threads", default=0)  # that `in_threads` may use; 0: as many as torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch's operations to one thread each, and let `in_threads` alone use as many as torch may.

    Where other processes share the cores, an operation on some thousands of elements waits a thousand times as long for
    its threads as it computes.
    """
    threads = torch.get_num_threads()
    token = _threads.set(threads)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _threads.reset(token)


def block_shape(grid: Grid, size: int) -> Grid:
    """Choose the shape of the blocks that cover [B, a, b]: matrices, rows or parts of a row, about equal in size.

    Args:
        grid: Sizes (B, a, b).
        size: Largest number of elements of a block, >= 1.

    Returns:
        Sizes (B, a, b) of a block; those at an end may be smaller.

    Example:
        >>> block_shape((9, 10, 10), 250), block_shape((9, 10, 10), 60), block_shape((1, 10, 10), 7)
        ((2, 10, 10), (1, 5, 10), (1, 1, 5))
    """
    block = list(grid)
    for dim, side in enumerate(grid):
        inner = block[1] * block[2] if dim == 0 else block[2] if dim == 1 else 1
        pieces = -(-side // max(1, size // inner))
        block[dim] = -(-side // pieces)
    return block[0], block[1], block[2]


def split_blocks(tensor: Tensor, grid: Grid, block: Grid) -> list[Tensor]:
    """Split [P, X, B, a, b] into views, one for each block, in row-major order.

    Args:
        tensor: Tensor to split; dimensions of size 1 stand for all blocks along them.
        grid: Sizes (B, a, b) that the blocks cover.
        block: Sizes (B, a, b) of a block.

    Example:
        >>> column = torch.arange(3).view(1, 1, 1, 3, 1)
        >>> [view.flatten().tolist() for view in split_blocks(column, (1, 3, 4), (1, 2, 2))]
        [[0, 1], [0, 1], [2], [2]]
    """
    views = [tensor]
    for dim, (whole, side) in enumerate(zip(grid, block, strict=True), start=2):
        if side == whole:
            continue
        if tensor.shape[dim] == 1:
            views = [view for view in views for _ in range(0, whole, side)]
        else:
            views = [part for view in views for part in view.split(side, dim)]
    return views


def in_threads(
    work: Callable[[Sequence[Job]], list[Result]], jobs: Sequence[Job], device: torch.device
) -> list[Result]:
    """Call `work` on all jobs, on a CPU in as many threads as torch may use.

    Each thread runs whole jobs: the operations on a block are too small to be worth splitting, and waiting for each
    other after each of them is slow beyond measure when other processes share the cores. Results do not depend on
    the number of threads.

    Args:
        work: Function of several jobs; returns one result for each, or none at all.
        jobs: Jobs, each of which one thread does.
        device: Device on which the jobs compute.

    Returns:
        Results in the order of the jobs.
    """
    before = torch.get_num_threads()
    threads = _threads.get() or before
    if threads == 1 or device.type != "cpu":
        return work(jobs)
    try:
        torch.set_num_threads(1)
        if len(jobs) < 2 * threads:
            return work(jobs)
        bounds = [round(i * len(jobs) / threads) for i in range(threads + 1)]
        parts = [jobs[start:stop] for start, stop in pairwise(bounds)]
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return [result for results in pool.map(torch.no_grad()(work), parts) for result in results]
    finally:
        torch.set_num_threads(before)
