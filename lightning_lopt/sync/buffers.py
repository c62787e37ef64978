"""The buffers of a model, BatchNorm statistics for example, and their values at the last sync."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lopt.comm import Communicator


@dataclass(frozen=True)
class BufferSnapshot:
    """One worker's buffers at the launch of a sync.

    Attributes:
        values: Value of each buffer.
        changed: Whether the worker changed each of them since the last sync.
    """

    values: list[Tensor]
    changed: list[bool]


class Buffers:
    """All buffers of a model, and their values at the last sync.

    A sync sends only those that some worker changed: of floating-point buffers it takes the mean, of integers and
    booleans the maximum.

    Args:
        named: Buffers by name, which are followed from here on.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self._own = dict(named)
        self._synced = {name: b.detach().clone() for name, b in self._own.items()}

    def __len__(self) -> int:
        return len(self._own)

    def adopt(self) -> None:
        """Take the present values as those of the last sync."""
        for b, synced in self.pairs():
            synced.copy_(b)

    def snapshot(self) -> BufferSnapshot:
        """The present values, of which later changes are not seen; unchanged buffers are not copied."""
        changed = [not torch.equal(b, synced) for b, synced in self.pairs()]
        pairs = zip(self.pairs(), changed, strict=True)
        return BufferSnapshot([b.detach().clone() if flag else synced for (b, synced), flag in pairs], changed)

    def merge(self, snapshot: Sequence[Tensor], arrived: Mapping[int, Tensor]) -> None:
        """Take the values that arrived as those of the last sync, and add the worker's changes since the snapshot.

        Args:
            snapshot: Values of all buffers when the sync was launched.
            arrived: Global values by position.
        """
        before = [snapshot[i].clone() for i in arrived]  # some of them are the synced values themselves
        for (i, value), old in zip(arrived.items(), before, strict=True):
            name = list(self._own)[i]
            own = self._own[name]
            self._synced[name].copy_(value)
            wide = value.to(torch.int64) if value.dtype == torch.bool else value
            own.copy_(torch.where(own == old, wide, wide + (own.to(wide.dtype) - old.to(wide.dtype))))

    def select(self, values: Mapping[int, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Each buffer for which a value is given, by position, with that value."""
        own = list(self._own.values())
        return [(own[i], value) for i, value in values.items()]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each buffer with its value at the last sync."""
        for name, b in self._own.items():
            yield b, self._synced[name]

    def restore(self) -> None:
        """Give every buffer its value at the last sync."""
        for b, synced in self.pairs():
            b.copy_(synced)

    def own_state(self) -> dict[str, Tensor]:
        """Copies of this worker's values."""
        return {name: b.detach().clone() for name, b in self._own.items()}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `own_state`."""
        for name, value in state.items():
            self._own[name].copy_(value)

    def synced_state(self) -> dict[str, Tensor]:
        """Copies of the values at the last sync."""
        return {name: b.clone() for name, b in self._synced.items()}

    def load_synced_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `synced_state`."""
        for name, value in state.items():
            self._synced[name].copy_(value)


def maxima(buffers: Sequence[Tensor], comm: Communicator) -> list[Tensor]:
    """The maximum over the workers of each of these integer or boolean tensors, in one collective."""
    if not buffers:
        return []
    flat = torch.cat([b.flatten().to(torch.int64) for b in buffers])
    comm.max_(flat)
    values = flat.split([b.numel() for b in buffers])
    return [v.view_as(b).to(b.dtype) for b, v in zip(buffers, values, strict=True)]
