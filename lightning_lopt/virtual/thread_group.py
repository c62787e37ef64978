"""Threads in the place of processes: the collectives of `torch.distributed` among K workers of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ThreadGroup:
    """K threads that wait for each other where K processes would communicate.

    Args:
        num_workers: Number of threads K.
        timeout: Time after which a worker that waits for the others fails; None to wait forever.

    Example:
        >>> group = ThreadGroup(2)
        >>> group.run([lambda k=k: group.join(k, 10 * k, sum) for k in range(2)])
        [10, 10]
    """

    def __init__(self, num_workers: int, timeout: timedelta | None = None) -> None:
        self._items: list[Any] = [None] * num_workers
        self._joins = [0] * num_workers  # of each worker
        self._timeout = timeout
        self._combine: Callable[[list[Any]], Any] = list
        self._result: Any = None
        self._barrier = threading.Barrier(num_workers, self._act, None if timeout is None else timeout.total_seconds())
        self._pool = ThreadPoolExecutor(num_workers - 1, "virtual worker")

    def _act(self) -> None:
        self._result = self._combine(self._items)

    def join(self, rank: int, item: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """Wait for all workers, and return the result of `combine` on their items.

        Args:
            rank: Rank of this worker.
            item: Item of this worker.
            combine: Function of all items by rank. It is called once for all, and must not keep the items themselves.
        """
        self._items[rank], self._combine = item, combine
        self._joins[rank] += 1
        self._barrier.wait()
        return self._result  # the next join replaces it when all have come, and so have read this one

    def run(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        """Call one function per worker, the first in the caller's thread, the others each in a thread of its own.

        Returns:
            Their results by rank; the first error is raised.

        Raises:
            TimeoutError: A worker did not come to a collective of the others in time.
        """
        futures = [self._pool.submit(self._guarded, function) for function in functions[1:]]
        first = self._guarded(functions[0])
        outcomes = [first, *(future.result() for future in futures)]
        errors = [error for _, error in outcomes if error is not None]
        if errors:
            late = [rank for rank, count in enumerate(self._joins) if count < max(self._joins)]
            self._joins = [0] * len(self._joins)
            self._barrier.reset()
            for error in errors:
                if not isinstance(error, threading.BrokenBarrierError):
                    raise error
            raise TimeoutError(
                f"Virtual workers {late} did not come within {self._timeout} to where the others waited for them. All "
                "must sync and evaluate after the same steps: check for what is done on some of them alone. If one is "
                "only slow, raise the timeout."
            )
        return [result for result, _ in outcomes]

    def _guarded(self, function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        try:
            return function(), None
        except BaseException as error:
            self._barrier.abort()  # or the others would wait
            return None, error


class VirtualGroup:
    """The collectives of `torch.distributed` as one of K threads sees them.

    Sums are in the order of the ranks: for two workers bitwise those of a process group.

    Args:
        rank: Rank of this worker.
        num_workers: Number of workers K.
        group: The threads of all K.
    """

    def __init__(self, rank: int, num_workers: int, group: ThreadGroup) -> None:
        self._rank, self._num_workers = rank, num_workers
        self._join = partial(group.join, rank)

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self, group: Any = None) -> int:
        return self._num_workers

    def get_rank(self, group: Any = None) -> int:
        return self._rank

    def new_group(self, ranks: Sequence[int], timeout: timedelta | None = None) -> VirtualGroup:
        return self

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        tensor.copy_(self._join(tensor, _largest if op == dist.ReduceOp.MAX else _sum))

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor, group: Any = None) -> None:
        for output, item in zip(outputs, self._join(tensor, torch.stack), strict=True):
            output.copy_(item)

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, receive: Sequence[int], send: Sequence[int], group: Any = None
    ) -> None:
        pieces = self._join(tensor.split(list(send)), _transposed)
        output.copy_(pieces[self._rank])

    def broadcast(self, tensor: Tensor, group: Any = None, group_src: int = 0) -> None:
        tensor.copy_(self._join(tensor, lambda items: items[group_src].clone()))

    def gather_object(self, item: Any, items: list[Any] | None, group: Any = None, group_dst: int = 0) -> None:
        found = self._join(item, list)
        if items is not None:
            items[:] = found

    def all_gather_object(self, items: list[Any], item: Any, group: Any = None) -> None:
        items[:] = self._join(item, list)


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def _largest(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).amax(0)


def _transposed(pieces: list[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(list(column)) for column in zip(*pieces, strict=True)]
