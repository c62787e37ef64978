"""Ordinary DataLoaders that go on within an epoch where a checkpoint left them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import has_iterable_dataset
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lopt.strategies import host
from lightning_lopt.virtual.worker_batches import Wrapper, index_sampler, set_index_sampler


class IndexSampler(Wrapper):
    """A loader's index sampler that remembers the random states at its epoch's start, and can skip the first indices.

    Args:
        loader: `DataLoader` of a map-style dataset.
        at_once: Indices that are consumed together.

    Attributes:
        wrapped: The loader's own index sampler.
        rows: Rows that all workers together take in a step; None where the loader does not show it.
        batch_ratio: Batches of this loader for one of the checkpoint's, where other workers wrote that; else None.
    """

    def __init__(self, loader: DataLoader, at_once: int = 1) -> None:
        super().__init__(index_sampler(loader))
        self.at_once = at_once
        size, sampler = loader.batch_size, loader.sampler
        self.rows: int | None = None
        if isinstance(sampler, DistributedSampler) and size is not None:
            self.rows = size * sampler.num_replicas
        self.batch_ratio: Fraction | None = None
        generators = [loader.generator, getattr(loader.sampler, "generator", None)]
        self._generators = [g for i, g in enumerate(generators) if g is not None and g not in generators[:i]]
        self._start: dict[str, Any] | None = None
        self._skip = 0

    def __len__(self) -> int:
        return len(self.wrapped)

    def __iter__(self) -> Iterator[Any]:  # runs at the first index, when samplers draw their seeds
        skip, self._skip = self._skip, 0
        now = self._random_state()
        if skip and self._start is not None:
            self._set_random_state(self._start)
        else:
            self._start = now
        indices = iter(self.wrapped)
        next(islice(indices, skip, skip), None)
        if skip:
            self._set_random_state(now)
        yield from indices

    def _random_state(self) -> dict[str, Any]:
        return {"global": host.random_state(), "generators": [g.get_state() for g in self._generators]}

    def _set_random_state(self, state: Mapping[str, Any]) -> None:
        host.set_random_state(state["global"])
        self.set_generators(state["generators"])

    def set_generators(self, states: list[torch.Tensor]) -> None:
        """Set the generators that the user gave to the loader."""
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """Return the state with which `load_state_dict` goes on after the consumed indices of this epoch."""
        generators = [g.get_state() for g in self._generators]
        return {"consumed": consumed, "rows": self.rows, "start": self._start, "generators": generators}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next epoch after the consumed indices, or, with `batch_ratio`, where other workers were."""
        self.batch_ratio, rows = state.get("batch_ratio"), state.get("rows")
        if self.batch_ratio is not None and rows and self.rows:
            self.batch_ratio = Fraction(rows, self.rows)
        consumed = int(state["consumed"] * (1 if self.batch_ratio is None else self.batch_ratio))
        self._skip, self._start = consumed * self.at_once, state["start"]


class ResumableLoaders:
    """The training loaders of one fit, in order; those that cannot be rewound are None.

    A loader can be rewound if it is a `DataLoader` of a map-style dataset. Loaders with a `state_dict` of their own
    rewind themselves.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any] | None] = []
        self._loaders: list[tuple[DataLoader, IndexSampler] | None] = []

    def wrap(self, loader: Any, epoch: int, at_once: int = 1) -> None:
        """Follow the next loader, and put it where its state says.

        Args:
            loader: Loader of batches.
            epoch: Epoch that begins or goes on.
            at_once: Batches that make one step.
        """
        state = self._states[len(self._loaders)] if len(self._loaders) < len(self._states) else None
        if host.is_stateful(loader) or not isinstance(loader, DataLoader) or has_iterable_dataset(loader):
            self._loaders.append(None)
            return
        sampler = IndexSampler(loader, at_once)
        set_index_sampler(loader, sampler)
        if state is not None:
            host.set_sampler_epoch(loader, epoch)
            sampler.load_state_dict(state)
        self._loaders.append((loader, sampler))

    def load_state_dicts(self, states: list[dict[str, Any] | None], epoch: int) -> None:
        """Put the loaders where `state_dicts` says, also those that are yet to be wrapped; make new iterators then.

        Args:
            states: One state per loader.
            epoch: Epoch that goes on.
        """
        self._states = states
        for entry, state in zip(self._loaders, states, strict=False):
            if entry is not None and state is not None:
                host.set_sampler_epoch(entry[0], epoch)
                entry[1].load_state_dict(state)

    def batch_ratio(self, otherwise: Fraction) -> Fraction:
        """Batches of the first loader that can be rewound for one of the checkpoint's, which other workers wrote."""
        ratios = [entry[1].batch_ratio for entry in self._loaders if entry is not None]
        return next((ratio for ratio in ratios if ratio is not None), otherwise)

    def start(self) -> None:
        """Give the users' generators the states that they had: making an iterator has drawn from them."""
        for entry, state in zip(self._loaders, self._states, strict=False):
            if entry is not None and state is not None:
                entry[1].set_generators(state["generators"])
        self._states = []  # loaders that are made later begin their epochs

    def state_dicts(self, trainer: pl.Trainer) -> list[dict[str, Any] | None]:
        """Return one state per loader, at the place where the Trainer is in its epoch."""
        batches, cycle = host.batches_done(trainer), host.restarts_short_loaders(trainer)
        consumed, states = batches if batches < trainer.num_training_batches else 0, []
        for entry in self._loaders:
            if entry is None:
                states.append(None)
                continue
            loader, sampler = entry
            length = max(len(loader) // sampler.at_once, 1)
            position = (consumed - 1) % length + 1 if cycle and consumed else min(consumed, length)
            states.append(sampler.state_dict(position))
        return states

    def unwrap(self) -> None:
        """Leave the loaders as they were, and follow no more."""
        for entry in self._loaders:
            if entry is not None:
                loader, sampler = entry
                set_index_sampler(loader, sampler.wrapped)
        self._loaders.clear()

    def forget(self) -> None:
        """Follow no loader, and put the next ones nowhere."""
        self._loaders, self._states = [], []
