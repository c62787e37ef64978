"""One loader's batches, dealt to workers that share it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler


class Interleaved:
    """The batches of K workers in turn, each from a `DistributedSampler` of its own rank.

    Args:
        sampler: worker 0's: a `DistributedSampler`, or a batch sampler around one.
        num_workers: K.
    """

    def __init__(self, sampler: Any, num_workers: int) -> None:
        self._sampler, self._num_workers = sampler, num_workers

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_sampler":  # copying and pickling ask before there is a sampler
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __len__(self) -> int:
        return len(self._sampler) * self._num_workers

    def __iter__(self) -> Iterator[Any]:
        for turn in zip(*[iter(self._of(rank)) for rank in range(self._num_workers)], strict=True):
            yield from turn

    def _of(self, rank: int) -> Any:
        own = copy.copy(self._sampler)
        if isinstance(own, DistributedSampler):
            own.rank = rank
        else:
            own.sampler = copy.copy(own.sampler)
            own.sampler.rank = rank
        return own


def interleave(loader: Any, num_workers: int) -> None:
    """Let a loader that was given worker 0's `DistributedSampler` go through the batches of all workers.

    Raises:
        ValueError: a batch sampler that hides its sampler.
    """
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, DistributedSampler):
        return
    if loader.sampler.num_replicas != num_workers:
        return
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    index_sampler: Any = getattr(loader, name)
    if name == "batch_sampler" and getattr(index_sampler, "sampler", None) is not loader.sampler:
        raise ValueError(
            f"{type(index_sampler).__name__} has no attribute `sampler` that is the loader's: virtual workers cannot "
            "get shards from it. Give it one, or set Trainer(use_distributed_sampler=False): batches are then dealt "
            "to the workers in turn."
        )
    vars(loader)[name] = Interleaved(index_sampler, num_workers)  # DataLoader refuses the assignment


class Dealt:
    """A loader as worker 0 sees it: its batches are every K-th of the loader's; the others lie ready.

    Fewer than K last batches are dropped.

    Args:
        loader: any iterable of batches.
        num_workers: K.

    Attributes:
        others: of each batch that was taken, those of workers 1, 2, ...

    Example:
        >>> loader = Dealt([10, 11, 12, 13, 14], num_workers=2)
        >>> len(loader), list(loader), list(loader.others)
        (2, [10, 12], [[11], [13]])
    """

    def __init__(self, loader: Any, num_workers: int) -> None:
        self.loader, self._num_workers = loader, num_workers
        self.others: deque[list[Any]] = deque()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader) // self._num_workers

    def __iter__(self) -> Iterator[Any]:
        self.others.clear()
        return self._deal(iter(self.loader))  # made here, as it may draw a seed

    def _deal(self, batches: Iterator[Any]) -> Iterator[Any]:
        for first in batches:
            others = list(islice(batches, self._num_workers - 1))
            if len(others) < self._num_workers - 1:
                return
            self.others.append(others)
            yield first
