"""Ordinary DataLoaders that go on in mid-epoch where a checkpoint left them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch, has_iterable_dataset
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.fabric.utilities.types import _Stateful
from torch.utils.data import DataLoader


def random_state() -> dict[str, Any]:
    """The states of torch, CUDA, numpy and Python, as types that `torch.load(weights_only=True)` accepts."""
    states = _collect_rng_states()
    if "numpy" in states:
        states["numpy"] = [x.tolist() if isinstance(x, np.ndarray) else x for x in states["numpy"]]
    return states


def set_random_state(states: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned."""
    _set_rng_states(dict(states))


class IndexSampler:
    """A loader's index sampler that remembers the random states of its epoch's start, and can skip the first indices.

    Args:
        loader: a `DataLoader` of a map-style dataset.
        at_once: indices that are consumed together.
    """

    def __init__(self, loader: DataLoader, at_once: int = 1) -> None:
        self.at_once = at_once
        self._sampler: Any = loader._index_sampler
        generators = [loader.generator, getattr(loader.sampler, "generator", None)]
        self._generators = [g for i, g in enumerate(generators) if g is not None and g not in generators[:i]]
        self._start: dict[str, Any] | None = None
        self._skip = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask before there is a sampler
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:  # runs at the first index, when samplers draw their seeds
        skip, self._skip = self._skip, 0
        now = self._random_state()
        if skip and self._start is not None:
            self._set_random_state(self._start)
        else:
            self._start = now
        indices = iter(self._sampler)
        for _ in range(skip):
            next(indices)
        if skip:
            self._set_random_state(now)
        yield from indices

    def _random_state(self) -> dict[str, Any]:
        return {"global": random_state(), "generators": [g.get_state() for g in self._generators]}

    def _set_random_state(self, state: Mapping[str, Any]) -> None:
        set_random_state(state["global"])
        self.set_generators(state["generators"])

    def set_generators(self, states: list[torch.Tensor]) -> None:
        """Set the generators that the user gave to the loader."""
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after `consumed` indices of this epoch."""
        generators = [g.get_state() for g in self._generators]
        return {"consumed": consumed, "start": self._start, "generators": generators}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next epoch after the consumed indices."""
        self._skip, self._start = state["consumed"] * self.at_once, state["start"]


class ResumableLoaders:
    """The training loaders of one fit, in order; those that cannot be rewound are None.

    A loader can be rewound if it is a `DataLoader` of a map-style dataset. Loaders with a `state_dict` of their own
    rewind themselves.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any] | None] = []
        self._loaders: list[tuple[DataLoader, str, IndexSampler] | None] = []

    def wrap(self, loader: Any, epoch: int, at_once: int = 1) -> None:
        """Follow the next loader; put it where its state says.

        Args:
            loader: of batches.
            epoch: that begins or goes on.
            at_once: batches that make one step.
        """
        state = self._states[len(self._loaders)] if len(self._loaders) < len(self._states) else None
        stateful = isinstance(loader, _Stateful)
        if stateful or not isinstance(loader, DataLoader) or has_iterable_dataset(loader):
            self._loaders.append(None)
            return
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        sampler = IndexSampler(loader, at_once)
        vars(loader)[name] = sampler  # DataLoader refuses the assignment
        if state is not None:
            _set_sampler_epoch(loader, epoch)  # loader processes fetch before Lightning sets it
            sampler.load_state_dict(state)
        self._loaders.append((loader, name, sampler))

    def load_state_dicts(self, states: list[dict[str, Any] | None], epoch: int) -> None:
        """Put the loaders, those that are yet to be wrapped too, where `state_dicts` says; make new iterators then."""
        self._states = states
        for entry, state in zip(self._loaders, states, strict=False):
            if entry is not None and state is not None:
                _set_sampler_epoch(entry[0], epoch)
                entry[2].load_state_dict(state)

    def start(self) -> None:
        """Give the users' generators the states that they had: making an iterator has drawn from them."""
        for entry, state in zip(self._loaders, self._states, strict=False):
            if entry is not None and state is not None:
                entry[2].set_generators(state["generators"])
        self._states = []  # loaders that are made later begin their epochs

    def state_dicts(self, consumed: int, *, cycle: bool) -> list[dict[str, Any] | None]:
        """One state per loader, after `consumed` batches of the epoch.

        Args:
            consumed: batches.
            cycle: whether loaders shorter than that began anew, rather than ended.
        """
        states = []
        for entry in self._loaders:
            if entry is None:
                states.append(None)
                continue
            length = max(len(entry[0]) // entry[2].at_once, 1)
            position = (consumed - 1) % length + 1 if cycle and consumed else min(consumed, length)
            states.append(entry[2].state_dict(position))
        return states

    def unwrap(self) -> None:
        """Leave the loaders as they were."""
        for entry in self._loaders:
            if entry is not None:
                loader, name, sampler = entry
                vars(loader)[name] = sampler._sampler
        self._loaders.clear()
