"""A worker's parameters with their anchors."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class AnchoredParameter:
    """A parameter and its anchor, which is empty until the parameter is first trained.

    Attributes:
        param: the worker's own tensor.
        anchor: its value after the last sync, the same on all workers: float32, or float64 for float64 parameters.
        known: whether there is an anchor yet.
        residual: what compression has left unsent, of the anchor's shape and type; None without compression.

    Raises:
        ValueError: the parameter is complex or sparse.
    """

    def __init__(self, param: Tensor) -> None:
        if param.is_complex() or param.is_sparse:
            raise ValueError(f"Parameters must be dense and real, not {param.dtype} ({param.layout}).")
        self.param = param
        self.dtype = flat_dtype(param)
        self.anchor = torch.empty(0, dtype=self.dtype, device=param.device)
        self.known = False
        self.residual: Tensor | None = None

    def adopt(self, value: Tensor) -> None:
        """Give the parameter its first anchor."""
        self.anchor.data = value.detach().to(self.dtype, copy=True)
        self.known = True


class AnchoredParameters:
    """All parameters of a local optimizer, in its groups.

    Args:
        optimizer: groups that it is given later are found by `follow`.

    Attributes:
        groups: the parameters of each group.

    Raises:
        ValueError: nothing to train, or parameters that are not dense and real.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.groups: list[list[AnchoredParameter]] = []
        self.follow()
        if not any(t.param.requires_grad for t in self):
            raise ValueError(
                "There is nothing to train: the local optimizer holds no parameter with requires_grad=True."
            )

    def __iter__(self) -> Iterator[AnchoredParameter]:
        for group in self.groups:
            yield from group

    def follow(self) -> list[list[AnchoredParameter]]:
        """Take up the groups that the optimizer was given since the last call; these."""
        new = [
            [AnchoredParameter(p) for p in group["params"]]
            for group in self._optimizer.param_groups[len(self.groups) :]
        ]
        self.groups += new
        return new

    def in_training(self) -> list[AnchoredParameter]:
        """Those that were ever trained.

        Newcomers have no common value yet; their anchor is 0 until their first sync, which averages them.
        """
        tracked = [t for t in self if t.known or t.param.requires_grad]
        for t in tracked:
            if not t.known:
                t.anchor.data = torch.zeros_like(t.param, dtype=t.dtype)
        return tracked

    def local_states(self, tracked: Sequence[AnchoredParameter]) -> list[Tensor]:
        """The local optimizer's states of these that belong to coordinates: momenta, second moments."""
        return [
            state
            for t in tracked
            for _, state in sorted(self._optimizer.state.get(t.param, {}).items())
            if isinstance(state, Tensor) and state.is_floating_point() and state.shape == t.param.shape
        ]

    def reset_local_states(self, tracked: Sequence[AnchoredParameter]) -> None:
        """Forget the local optimizer's states of these."""
        for t in tracked:
            self._optimizer.state.get(t.param, {}).clear()

    def restore_anchors(self) -> None:
        """Every parameter that has an anchor becomes it."""
        for t in self:
            if t.known:
                t.param.copy_(t.anchor)

    def checksum(self) -> int:
        """Differs, almost surely, for anchors that are not bitwise the same."""
        value = 0
        for t in self:
            value = zlib.crc32(t.anchor.detach().cpu().contiguous().numpy().data, value)
        return value

    def anchor_state(self) -> list[Tensor | None]:
        """Copies of the anchors."""
        return [t.anchor.clone() if t.known else None for t in self]

    def load_anchor_state(self, anchors: Sequence[Tensor | None]) -> None:
        """Restore what `anchor_state` returned.

        Raises:
            ValueError: of parameters of other shapes.
        """
        for i, (t, anchor) in enumerate(zip(self, anchors, strict=True)):
            if anchor is not None:
                if anchor.shape != t.param.shape:
                    raise ValueError(
                        f"The checkpoint's parameter {i} has the shape {tuple(anchor.shape)}, here it is "
                        f"{tuple(t.param.shape)}: build the model that was saved."
                    )
                t.adopt(anchor.to(t.param.device))

    def own_state(self) -> dict[str, Any]:
        """Copies of this worker's values and residuals."""
        return {
            "params": [t.param.detach().clone() if t.known else None for t in self],
            "residuals": [None if t.residual is None else t.residual.clone() for t in self],
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore what `own_state` returned."""
        for t, param, residual in zip(self, state["params"], state["residuals"], strict=True):
            if param is not None:
                t.param.copy_(param)
            t.residual = None if residual is None else residual.to(t.param.device)


def size(tracked: Sequence[AnchoredParameter]) -> int:
    """Number of coordinates."""
    return sum(t.param.numel() for t in tracked)


def flat_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which a tensor travels."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
