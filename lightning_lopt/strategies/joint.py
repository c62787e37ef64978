"""Several local optimizers, seen as one by a round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer


class JointOptimizer:
    """The parameter groups and states of several optimizers, in an order that stays when groups are added.

    Args:
        optimizers: Optimizers of one module, for example of a GAN; groups that they are given later are found.

    Example:
        >>> import torch
        >>> a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
        >>> first, second = torch.optim.SGD([a], lr=0.1), torch.optim.SGD([b], lr=0.2)
        >>> joint = JointOptimizer([first, second])
        >>> [group["lr"] for group in joint.param_groups]
        [0.1, 0.2]
        >>> first.add_param_group({"params": [c], "lr": 0.3})
        >>> [group["lr"] for group in joint.param_groups]
        [0.1, 0.2, 0.3]
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._order: list[tuple[int, int]] = []  # positions, not the groups: loading a state replaces those

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups; new ones come last."""
        present = [(i, j) for i, o in enumerate(self._optimizers) for j in range(len(o.param_groups))]
        self._order += [place for place in present if place not in self._order]
        return [self._optimizers[i].param_groups[j] for i, j in self._order]

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """Every parameter's state, in the optimizers' own dictionaries."""
        return {p: state for optimizer in self._optimizers for p, state in optimizer.state.items()}

    def state_dict(self) -> dict[str, Any]:
        """The states of all optimizers, in their order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self._optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        for optimizer, own in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
