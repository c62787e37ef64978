"""What is sent of the parameters, and the flat buffers in which it travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.sync.anchors import AnchoredParameter, flat_dtype


@dataclass(frozen=True)
class ParameterSlice:
    """What a sync sends of one parameter.

    Attributes:
        tracked: the parameter.
        index: ascending flat indices of the coordinates, None for all of them.
    """

    tracked: AnchoredParameter
    index: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.tracked.param.shape if self.index is None else self.index.shape

    @property
    def checksum(self) -> int:
        """Differs, almost surely, for other coordinates."""
        return 0 if self.index is None else int(self.index.sum())

    def of(self, full: Tensor) -> Tensor:
        """These coordinates of a tensor of the parameter's shape: itself, or a copy [n]."""
        return full if self.index is None else full.take(self.index)

    def put(self, full: Tensor, values: Tensor) -> None:
        """Overwrite these coordinates of a tensor of the parameter's shape."""
        if self.index is None:
            full.copy_(values)
        else:
            full.put_(self.index, values.to(full.dtype))


class FlatBuffer:
    """One flat buffer of one type: every element of its parts once, a scalar, and room for passengers.

    Args:
        parts: pieces of parameters whose anchors have the wire's type.
        room: number of further elements.
        like: has the type and device.

    Attributes:
        parts: as given.
        body: the elements of the parts, [n].
        views: the piece of each part in it.
        square: the scalar, for the squared distance between a worker and the anchor.
        flat: what travels: body, scalar and passengers.
        differences: whether the parts hold anchor - y instead of y.
        own: which parts this worker steps; their pieces hold means after the exchange.
        workers: every worker's body [K, n] of these parts, if the exchange gathered them.
        residual: what compression lost of this worker's body, [n], if it was compressed.
    """

    def __init__(self, parts: Sequence[ParameterSlice], room: int, like: Tensor) -> None:
        self.parts = parts
        self.sizes = [part.shape.numel() for part in parts]
        num = sum(self.sizes)
        self._buffer = like.new_empty(num + 1 + room)
        self.body = self._buffer[:num]
        self.views = self.split(self.body)
        self.square = self._buffer[num]
        self.flat = self._buffer[: num + 1]
        self.differences = False
        self.own = slice(None)
        self.workers: Tensor | None = None
        self.residual: Tensor | None = None

    def split(self, flat: Tensor, parts: slice = slice(None)) -> list[Tensor]:
        """The pieces of some parts that lie in the last dimension of `flat`, [..., n] -> [..., *S] each."""
        pieces = flat.split(self.sizes[parts], dim=-1)
        return [p.view((*flat.shape[:-1], *part.shape)) for p, part in zip(pieces, self.parts[parts], strict=True)]

    def arrived(self) -> list[tuple[ParameterSlice, Tensor, Tensor | None]]:
        """The parts that this worker steps: their means, and every worker's values [K, *S] if gathered."""
        parts, means = self.parts[self.own], self.views[self.own]
        workers = [None] * len(parts) if self.workers is None else self.split(self.workers, self.own)
        return list(zip(parts, means, workers, strict=True))

    def fill(self, *, differences: bool) -> None:
        """Write anchor - y plus what compression has left over, or y itself."""
        self.differences = differences
        self.square.zero_()
        for view, part in zip(self.views, self.parts, strict=True):
            t = part.tracked
            param = part.of(t.param)
            torch.sub(part.of(t.anchor), param, out=view)
            if t.residual is not None:
                view += part.of(t.residual)
            self.square += view.square().sum()
            if not differences:
                view.copy_(param)

    def board(self, passengers: Sequence[Tensor]) -> list[Tensor]:
        """Append tensors of any floating-point type; their views."""
        views = []
        for tensor in passengers:
            start = len(self.flat)
            self.flat = self._buffer[: start + tensor.numel()]
            views.append(self.flat[start:].view(tensor.shape))
            views[-1].copy_(tensor)
        return views

    def state_dict(self) -> dict[str, Any]:
        """What arrived."""
        return {
            "body": self.body.clone(),
            "square": self.square.clone(),
            "workers": self.workers,
            "differences": self.differences,
            "own": [self.own.start, self.own.stop],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, in a wire of the same parts."""
        self.body.copy_(state["body"])
        self.square.copy_(state["square"])
        self.differences, self.workers, self.own = state["differences"], state["workers"], slice(*state["own"])


def cut(tracked: Sequence[AnchoredParameter], choices: Sequence[bool | Tensor]) -> list[ParameterSlice]:
    """What a `Selection` chose; all of those that have no anchor yet."""
    parts = []
    for t, choice in zip(tracked, choices, strict=True):
        if choice is True or not t.known:
            parts.append(ParameterSlice(t))
        elif isinstance(choice, Tensor) and len(choice):
            parts.append(ParameterSlice(t, choice.to(t.param.device)))
    return parts


def pack(parts: Sequence[ParameterSlice], passengers: Sequence[Tensor]) -> dict[torch.dtype, FlatBuffer]:
    """Empty wires, one per type.

    Args:
        parts: what to send of the parameters, which have an anchor.
        passengers: there must be room for the floating-point ones among these.
    """
    wires = {}
    for dtype in (torch.float32, torch.float64):
        of_type = [part for part in parts if part.tracked.dtype == dtype]
        extra = [p for p in passengers if p.is_floating_point() and flat_dtype(p) == dtype]
        if of_type or extra:
            like = of_type[0].tracked.anchor if of_type else extra[0]
            wires[dtype] = FlatBuffer(of_type, sum(p.numel() for p in extra), like.new_empty(0, dtype=dtype))
    return wires
