"""Temporary replacement of the values in a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class Swap:
    """Tensors of a model that show other values for a while; their own values are set aside.

    Example:
        >>> import torch
        >>> p, swap = torch.zeros(1), Swap()
        >>> swap.put([(p, torch.ones(1))])
        >>> p.item(), swap.active
        (1.0, True)
        >>> swap.undo()
        >>> p.item(), swap.active
        (0.0, False)
    """

    def __init__(self) -> None:
        self._aside: list[tuple[Tensor, Tensor]] = []

    @property
    def active(self) -> bool:
        """Whether values were put in and not undone."""
        return bool(self._aside)

    def put(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Let each tensor show a value of its shape; nothing is copied where the types are the same.

        A tensor that already shows another value shows the new one, and keeps its own aside.
        """
        shown = {id(target) for target, _ in self._aside}
        for target, value in pairs:
            if id(target) not in shown:
                self._aside.append((target, target.data))
            target.data = value.to(target.dtype)

    def exchange(self) -> None:
        """Exchange the values that are shown and those that are set aside."""
        for i, (target, aside) in enumerate(self._aside):
            self._aside[i] = target, target.data
            target.data = aside

    def undo(self) -> None:
        """Give the tensors their own values back."""
        self.exchange()
        self._aside.clear()
