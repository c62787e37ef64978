"""Temporary replacement of the values in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor


class Swap:
    """Tensors of a model that show other values for a while; their own values are set aside.

    Args:
        copying: Whether to write into the memory of the tensors, which others may share, rather than to point them to
            another one.
        after: Function that is called after each change.

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

    def __init__(self, *, copying: bool = False, after: Callable[[], object] = lambda: None) -> None:
        self._copying, self._after = copying, after
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
                self._aside.append((target, self._own(target)))
            self._show(target, value.to(target.dtype))
        self._after()

    def _own(self, target: Tensor) -> Tensor:
        return target.data.clone() if self._copying else target.data

    def _show(self, target: Tensor, value: Tensor) -> None:
        if self._copying:
            target.data.copy_(value)
        else:
            target.data = value

    def exchange(self) -> None:
        """Exchange the values that are shown and those that are set aside."""
        for i, (target, aside) in enumerate(self._aside):
            self._aside[i] = target, self._own(target)
            self._show(target, aside)
        self._after()

    def undo(self) -> None:
        """Give the tensors their own values back."""
        self.exchange()
        self._aside.clear()
