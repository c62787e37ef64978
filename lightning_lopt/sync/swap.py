"""Temporary replacement of the values in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn


class Swap:
    """Tensors of a model that show other values for a while; their own values are set aside.

    A buffer that is written meanwhile keeps what was written, as one does that the module reassigns.

    Args:
        copying: Whether to write into the memory of the tensors, which others may share, rather than to point them to
            another one.
        after: Function that is called after each change.

    Attributes:
        active: Whether values were put in and not undone.

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
        self.active = False
        self._aside: list[tuple[Tensor, Tensor]] = []
        self._versions: list[int] = []  # of the tensors as they show the other values; none while they show their own

    def put(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Let each tensor show a value of its shape; nothing is copied where the types are the same.

        A tensor that already shows another value shows the new one, and keeps its own aside.
        """
        shown = {id(target) for target, _ in self._aside}
        for target, value in pairs:
            if id(target) not in shown:
                self._aside.append((target, self._own(target)))
            self._show(target, value.to(target.dtype))
        self.active = True  # also on a rank that holds none of the tensors
        self._note_versions()
        self._after()

    def _own(self, target: Tensor) -> Tensor:
        return target.data.clone() if self._copying else target.data

    def _show(self, target: Tensor, value: Tensor) -> None:
        if self._copying:
            target.data.copy_(value)
        else:
            target.data = value

    def exchange(self) -> None:
        """Exchange the values that are shown and those that are set aside; do nothing where there are none."""
        if not self.active:
            return
        showed, self._versions = self._versions, []
        if showed and not self._copying:
            pairs = zip(self._aside, showed, strict=True)
            self._aside = [p for p, seen in pairs if isinstance(p[0], nn.Parameter) or p[0]._version == seen]
        for i, (target, aside) in enumerate(self._aside):
            self._aside[i] = target, self._own(target)
            self._show(target, aside)
        if not showed:
            self._note_versions()
        self._after()

    def _note_versions(self) -> None:
        self._versions = [target._version for target, _ in self._aside]

    def undo(self) -> None:
        """Give the tensors their own values back."""
        self.exchange()
        self.active, self._aside, self._versions = False, [], []
