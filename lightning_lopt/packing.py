"""Parameters with their anchors, and the flat buffers in which they travel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Tracked:
    """A parameter and its anchor, which is empty until the parameter is first trained.

    Attributes:
        param: the worker's own tensor.
        anchor: its value after the last sync, the same on all workers: float32, or float64 for float64 parameters.
        known: whether there is an anchor yet.

    Raises:
        ValueError: the parameter is complex or sparse.
    """

    def __init__(self, param: Tensor) -> None:
        if param.is_complex() or param.is_sparse:
            raise ValueError(f"Parameters must be dense and real, not {param.dtype} ({param.layout}).")
        self.param = param
        self.dtype = _wire_dtype(param)
        self.anchor = torch.empty(0, dtype=self.dtype, device=param.device)
        self.known = False

    def adopt(self, value: Tensor) -> None:
        """Give the parameter its first anchor."""
        self.anchor.data = value.detach().to(self.dtype, copy=True)
        self.known = True


class Wire:
    """One flat buffer of one type: every element of its parameters and buffers once, and one scalar.

    Attributes:
        flat: what travels, [n].
        views: the part of each parameter.
        buffer_views: the part of each buffer.
        square: the scalar, for the squared distance between a worker and the anchor.
    """

    def __init__(self, tracked: Sequence[Tracked], buffers: Sequence[Tensor], like: Tensor) -> None:
        tensors = [*(t.param for t in tracked), *buffers]
        self.flat = like.new_empty(sum(t.numel() for t in tensors) + 1)
        self.tracked, self.buffers = tracked, buffers
        self._shapes = [t.shape for t in tensors]
        *views, self.square = self.split(self.flat)
        self.views, self.buffer_views = views[: len(tracked)], views[len(tracked) :]

    def split(self, flat: Tensor) -> list[Tensor]:
        """The tensors that lie in the last dimension of `flat`, [..., n] -> [..., *S] each, and the scalar."""
        *pieces, scalar = flat.split([*(s.numel() for s in self._shapes), 1], dim=-1)
        lead = flat.shape[:-1]
        return [*(p.view((*lead, *s)) for p, s in zip(pieces, self._shapes, strict=True)), scalar]

    def fill(self, *, differences: bool) -> None:
        """Write anchor - y, or y itself, and the buffers."""
        self.square.zero_()
        for view, t in zip(self.views, self.tracked, strict=True):
            torch.sub(t.anchor, t.param, out=view)
            self.square += view.square().sum()
            if not differences:
                view.copy_(t.param)
        for view, buffer in zip(self.buffer_views, self.buffers, strict=True):
            view.copy_(buffer)


def pack(tracked: Sequence[Tracked], buffers: Sequence[Tensor], *, differences: bool) -> list[Wire]:
    """Filled wires, one per type, for these parameters and the floating-point ones among these buffers.

    Args:
        tracked: parameters with an anchor.
        buffers: of any type; integers do not travel here.
        differences: send anchor - y instead of y.
    """
    wires = []
    floating = [b for b in buffers if b.is_floating_point()]
    for dtype in (torch.float32, torch.float64):
        params = [t for t in tracked if t.dtype == dtype]
        of_type = [b for b in floating if _wire_dtype(b) == dtype]
        if params or of_type:
            like = params[0].anchor if params else of_type[0]
            wires.append(Wire(params, of_type, like.new_empty(0, dtype=dtype)))
            wires[-1].fill(differences=differences)
    return wires


def size(tracked: Sequence[Tracked]) -> int:
    """Number of coordinates."""
    return sum(t.param.numel() for t in tracked)


def _wire_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
