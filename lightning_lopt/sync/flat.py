"""The slices of parameters that a sync sends, and the flat buffers that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.functional.precision import state_dtype
from lightning_lopt.sync.anchors import AnchoredParameter


@dataclass(frozen=True)
class ParameterSlice:
    """The coordinates of one parameter that a sync sends.

    Attributes:
        parameter: The parameter.
        index: Ascending flat indices of the coordinates, None for all of them.
        frozen: Whether the parameter was frozen when the sync was launched: it is averaged, not stepped.
    """

    parameter: AnchoredParameter
    index: Tensor | None = None
    frozen: bool = False

    @property
    def shape(self) -> torch.Size:
        """Shape of the values: the parameter's, or [n]."""
        return self.parameter.param.shape if self.index is None else self.index.shape

    @property
    def checksum(self) -> int:
        """An integer that differs, almost surely, for other coordinates."""
        return 0 if self.index is None else int(self.index.sum())

    def read(self, full: Tensor) -> Tensor:
        """These coordinates of a tensor of the parameter's shape: the tensor itself, or a copy [n]."""
        return full if self.index is None else full.take(self.index)

    def write(self, full: Tensor, values: Tensor) -> None:
        """Overwrite these coordinates of a tensor of the parameter's shape."""
        if self.index is None:
            full.copy_(values)
        else:
            full.put_(self.index, values.to(full.dtype))


class ReceivedSlice(NamedTuple):
    """A slice after the exchange.

    Attributes:
        slice: The coordinates.
        mean: Their mean over the workers: of anchor - y, or of y.
        worker_values: Every worker's values, [K, *S], if the exchange gathered them.
    """

    slice: ParameterSlice
    mean: Tensor
    worker_values: Tensor | None


class FlatBuffer:
    """One contiguous tensor of one type: every element of its slices once, a squared norm, and room for extras.

    Args:
        slices: Slices of parameters whose anchors have the buffer's type.
        room: Number of further elements.
        like: A tensor of the type and device.

    Attributes:
        slices: The slices, as given.
        sizes: Number of elements of each slice.
        payload: Elements of the slices, [n].
        views: The part of the payload that belongs to each slice.
        squared_norm: Squared norm of the pseudo-gradient, a scalar, with what compression has left over. A parameter
            that has no anchor yet adds 0, or NaN if it is not finite. After a compressed exchange, the mean squared
            distance of the values that were sent from their mean.
        flat: The tensor that is sent: payload, squared norm and extras.
        differences: Whether the payload holds anchor - y instead of y.
        owned: The slices that this worker steps; their parts of the payload hold means after the exchange.
        worker_payloads: Every worker's payload [K, n] of the owned slices, if the exchange gathered them.
        residual: Values of this worker's payload that compression lost, [n], if it was compressed.
        codec_states: States of the parameters for the next exchange, if a `LinearCodec` compressed it.
    """

    def __init__(self, slices: Sequence[ParameterSlice], room: int, like: Tensor) -> None:
        self.slices = slices
        self.sizes = [s.shape.numel() for s in slices]
        num = sum(self.sizes)
        self._storage = like.new_empty(num + 1 + room)
        self.payload = self._storage[:num]
        self.views = self.split(self.payload)
        self.squared_norm = self._storage[num]
        self.flat = self._storage[: num + 1]
        self.differences = False
        self.owned = slice(None)
        self.worker_payloads: Tensor | None = None
        self.residual: Tensor | None = None
        self.codec_states: Sequence[Tensor | None] | None = None

    def split(self, flat: Tensor, which: slice = slice(None)) -> list[Tensor]:
        """Cut the last dimension of `flat` into the parts of some slices, [..., n] -> [..., *S] each."""
        parts = flat.split(self.sizes[which], dim=-1)
        return [p.view((*flat.shape[:-1], *s.shape)) for p, s in zip(parts, self.slices[which], strict=True)]

    def received(self) -> list[ReceivedSlice]:
        """The slices that this worker steps, with the values that arrived."""
        slices, means = self.slices[self.owned], self.views[self.owned]
        if self.worker_payloads is None:
            workers: list[Tensor | None] = [None] * len(slices)
        else:
            workers = [*self.split(self.worker_payloads, self.owned)]
        return [ReceivedSlice(*item) for item in zip(slices, means, workers, strict=True)]

    def fill(self, *, differences: bool) -> None:
        """Write the parameters as they are now.

        Args:
            differences: Whether to write anchor - y plus the values that compression has left over, rather than y.
        """
        self.differences = differences
        self.squared_norm.zero_()
        for view, s in zip(self.views, self.slices, strict=True):
            p = s.parameter
            param = s.read(p.param)
            torch.sub(s.read(p.anchor), param, out=view)
            if p.residual is not None:
                view += s.read(p.residual)
            squares = view.square().sum()
            self.squared_norm += squares if p.has_anchor else 0 * squares
            if not differences:
                view.copy_(param)

    def append(self, extras: Sequence[Tensor]) -> list[Tensor]:
        """Append tensors of any floating-point type, and return their views."""
        start, sizes = len(self.flat), [tensor.numel() for tensor in extras]
        self.flat = self._storage[: start + sum(sizes)]
        views = [part.view(t.shape) for part, t in zip(self.flat[start:].split(sizes), extras, strict=True)]
        for view, tensor in zip(views, extras, strict=True):
            view.copy_(tensor)
        return views

    def state_dict(self) -> dict[str, Any]:
        """Copies of the values that arrived."""
        return {
            "payload": self.payload.clone(),
            "squared_norm": self.squared_norm.clone(),
            "worker_payloads": self.worker_payloads,
            "codec_states": None if self.codec_states is None else [*self.codec_states],
            "differences": self.differences,
            "owned": [self.owned.start, self.owned.stop],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`, in a buffer of the same slices."""
        self.payload.copy_(state["payload"])
        self.squared_norm.copy_(state["squared_norm"])
        self.differences, self.worker_payloads = state["differences"], state["worker_payloads"]
        self.owned = slice(*state["owned"])
        codec_states = state.get("codec_states")
        if codec_states is not None:
            codec_states = [None if s is None else s.to(self.payload.device) for s in codec_states]
        self.codec_states = codec_states


def choose(parameters: Sequence[AnchoredParameter], choices: Sequence[bool | Tensor]) -> list[ParameterSlice]:
    """The slices that a `Selection` chose, and all of each parameter that has no anchor yet.

    Args:
        parameters: The parameters in training.
        choices: Result of `Selection.pick` for them.

    Raises:
        ValueError: It is not a list of as many choices, each whether the tensor is sent or the indices that are.
    """
    if len(choices) != len(parameters):
        raise ValueError(f"The selection's pick returned {len(choices)} choices for {len(parameters)} tensors.")
    slices = []
    for i, (p, choice) in enumerate(zip(parameters, choices, strict=True)):
        if isinstance(choice, Tensor) and choice.dtype == torch.int64 and choice.dim() == 1:
            whole, indices = not p.has_anchor, choice
        elif not isinstance(choice, Tensor | list | tuple) and choice in (True, False):  # NumPy's, too
            whole, indices = bool(choice) or not p.has_anchor, None
        else:
            raise ValueError(
                f"The selection's pick returned {choice!r} for tensor {i}; it must be True, False or the ascending "
                "flat indices of the coordinates to send, a tensor of int64, [n]."
            )
        if whole:
            slices.append(ParameterSlice(p, frozen=p.frozen))
        elif indices is not None and len(indices):
            slices.append(ParameterSlice(p, indices.to(p.param.device), frozen=p.frozen))
    return slices


def pack(slices: Sequence[ParameterSlice], extras: Sequence[Tensor]) -> dict[torch.dtype, FlatBuffer]:
    """Make empty flat buffers, one per type.

    Args:
        slices: Slices of parameters that have an anchor.
        extras: Tensors for which there must be room, as far as they are of a floating-point type.
    """
    flat_buffers = {}
    for dtype in (torch.float32, torch.float64):
        of_type = [s for s in slices if s.parameter.dtype == dtype]
        extra = [e for e in extras if e.is_floating_point() and state_dtype(e) == dtype]
        if of_type or extra:
            like = of_type[0].parameter.anchor if of_type else extra[0]
            room = sum(e.numel() for e in extra)
            flat_buffers[dtype] = FlatBuffer(of_type, room, like.new_empty(0, dtype=dtype))
    return flat_buffers
