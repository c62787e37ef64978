"""The buffers of a model (BatchNorm statistics, say): which changed, what they were at the last sync."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_lopt.comm import Communicator


class Buffers:
    """All buffers of a model, and their values at the last sync.

    Only those that some worker changed travel: of floating-point ones the mean, of integers and booleans the maximum.

    Args:
        model: the buffers it has now are followed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = dict(model.named_buffers())
        self._synced = {name: b.detach().clone() for name, b in self._own.items()}

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self._own)

    def changed(self) -> list[bool]:
        """Which buffers this worker changed since the last sync."""
        return [not torch.equal(b, self._synced[name]) for name, b in self._own.items()]

    def snapshot(self, changed: Sequence[bool]) -> list[Tensor]:
        """This worker's values, which stay as they are when it goes on; those that did not change are not copied."""
        pairs = zip(self._own.items(), changed, strict=True)
        return [b.detach().clone() if flag else self._synced[name] for (name, b), flag in pairs]

    def land(self, snapshot: Sequence[Tensor], arrived: dict[int, Tensor]) -> None:
        """Take up what arrived, by position, and keep what changed since the snapshot; remember it as synced."""
        before = [snapshot[i].clone() for i in arrived]  # some of them are the synced values themselves
        for (i, value), old in zip(arrived.items(), before, strict=True):
            name = list(self._own)[i]
            own = self._own[name]
            self._synced[name].copy_(value)
            wide = value.to(torch.int64) if value.dtype == torch.bool else value
            own.copy_(torch.where(own == old, wide, wide + (own.to(wide.dtype) - old.to(wide.dtype))))

    def named(self, values: dict[int, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Each of these buffers, by position, with the given value."""
        own = list(self._own.values())
        return [(own[i], value) for i, value in values.items()]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each buffer with its value at the last sync."""
        for name, b in self._own.items():
            yield b, self._synced[name]

    def restore(self) -> None:
        """Every buffer becomes what it was at the last sync."""
        for b, synced in self.pairs():
            b.copy_(synced)

    def own_state(self) -> dict[str, Tensor]:
        """Copies of this worker's values."""
        return {name: b.detach().clone() for name, b in self._own.items()}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `own_state` returned."""
        for name, value in state.items():
            self._own[name].copy_(value)

    def synced_state(self) -> dict[str, Tensor]:
        """Copies of the values at the last sync."""
        return {name: b.clone() for name, b in self._synced.items()}

    def load_synced_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `synced_state` returned."""
        for name, value in state.items():
            self._synced[name].copy_(value)


def maxima(buffers: Sequence[Tensor], comm: Communicator) -> list[Tensor]:
    """The maximum over the workers of each of these integer or boolean tensors; one collective."""
    if not buffers:
        return []
    flat = torch.cat([b.flatten().to(torch.int64) for b in buffers])
    comm.max_(flat)
    values = flat.split([b.numel() for b in buffers])
    return [v.view_as(b).to(b.dtype) for b, v in zip(buffers, values, strict=True)]
