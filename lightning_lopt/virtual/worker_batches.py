"""The batches of one loader, distributed to workers that share it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler


class Wrapper:
    """Base of objects that stand for another one, whose attributes they show besides their own.

    Args:
        wrapped: The other object.
    """

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "wrapped":  # copying and pickling ask before it is there
            raise AttributeError(name)
        return getattr(self.wrapped, name)


class Interleaved(Wrapper):
    """The batches of K workers in turn, each from a `DistributedSampler` of its own rank.

    Args:
        sampler: Worker 0's `DistributedSampler`, or a batch sampler around it.
        num_workers: K.
    """

    def __init__(self, sampler: Any, num_workers: int) -> None:
        super().__init__(sampler)
        self._num_workers = num_workers

    def __len__(self) -> int:
        return len(self.wrapped) * self._num_workers

    def __iter__(self) -> Iterator[Any]:
        for turn in zip(*[iter(self._of(rank)) for rank in range(self._num_workers)], strict=True):
            yield from turn

    def _of(self, rank: int) -> Any:
        own = copy.copy(self.wrapped)
        if isinstance(own, DistributedSampler):
            own.rank = rank
        else:
            own.sampler = copy.copy(own.sampler)
            own.sampler.rank = rank
        return own


def interleave(loader: Any, num_workers: int) -> None:
    """Let a loader that was given worker 0's `DistributedSampler` go through the batches of all workers.

    Args:
        loader: Loader of any kind; only a `DataLoader` with a `DistributedSampler` for K replicas is changed.
        num_workers: K.

    Raises:
        ValueError: A batch sampler that hides its sampler.
    """
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, DistributedSampler):
        return
    if loader.sampler.num_replicas != num_workers:
        return
    sampler = index_sampler(loader)
    if loader.batch_sampler is not None and getattr(sampler, "sampler", None) is not loader.sampler:
        raise ValueError(
            f"{type(sampler).__name__} has no attribute `sampler` that is the loader's: virtual workers cannot "
            "get shards from it. Give it one, or set Trainer(use_distributed_sampler=False): batches then go "
            "to the workers in turn."
        )
    set_index_sampler(loader, Interleaved(sampler, num_workers))


def index_sampler(loader: DataLoader) -> Any:
    """Return the object that a loader takes its indices from: the batch sampler if it makes batches, else the sampler.

    Args:
        loader: Loader of a map-style dataset.
    """
    return getattr(loader, _index_sampler_name(loader))


def set_index_sampler(loader: DataLoader, sampler: Any) -> None:
    """Replace the object that a loader takes its indices from; `DataLoader` refuses a plain assignment.

    Args:
        loader: Loader of a map-style dataset.
        sampler: New batch sampler, or sampler where the loader makes no batches.
    """
    vars(loader)[_index_sampler_name(loader)] = sampler


def _index_sampler_name(loader: DataLoader) -> str:
    return "sampler" if loader.batch_sampler is None else "batch_sampler"


class FirstWorkerLoader(Wrapper):
    """A loader as worker 0 sees it: every K-th batch of the loader; those in between are kept for the other workers.

    Fewer than K last batches are dropped.

    Args:
        loader: Any iterable of batches.
        num_workers: K.

    Attributes:
        others: The batches of workers 1, 2, ... for each batch that worker 0 took.

    Example:
        >>> loader = FirstWorkerLoader([10, 11, 12, 13, 14], num_workers=2)
        >>> len(loader), list(loader), list(loader.others)
        (2, [10, 12], [[11], [13]])
    """

    def __init__(self, loader: Any, num_workers: int) -> None:
        super().__init__(loader)
        self._num_workers = num_workers
        self.others: deque[list[Any]] = deque()

    def __len__(self) -> int:
        return len(self.wrapped) // self._num_workers

    def __iter__(self) -> Iterator[Any]:
        self.others.clear()
        return self._every_kth(iter(self.wrapped))  # made here, as it may draw a seed

    def _every_kth(self, batches: Iterator[Any]) -> Iterator[Any]:
        for first in batches:
            others = list(islice(batches, self._num_workers - 1))
            if len(others) < self._num_workers - 1:
                return
            self.others.append(others)
            yield first
