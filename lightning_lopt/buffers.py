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

    def changed(self) -> list[bool]:
        """Which buffers this worker changed since the last sync."""
        return [not torch.equal(b, self._synced[name]) for name, b in self._own.items()]

    def select(self, flags: Sequence[bool]) -> list[Tensor]:
        """The buffers whose flag is set."""
        return [b for b, flag in zip(self._own.values(), flags, strict=True) if flag]

    def remember(self) -> None:
        """Take the present values as those of the last sync."""
        for name, b in self._own.items():
            self._synced[name].copy_(b)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each buffer with its value at the last sync."""
        for name, b in self._own.items():
            yield b, self._synced[name]

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


def maxima(buffers: Sequence[Tensor], comm: Communicator) -> list[tuple[Tensor, Tensor]]:
    """The buffers of integers or booleans among these, each with its maximum over the workers; one collective."""
    integers = [b for b in buffers if not b.is_floating_point()]
    if not integers:
        return []
    flat = torch.cat([b.flatten().to(torch.int64) for b in integers])
    comm.max_(flat)
    values = flat.split([b.numel() for b in integers])
    return [(b, v.view_as(b).to(b.dtype)) for b, v in zip(integers, values, strict=True)]
