"""The outer optimizer of SlowMo."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import override

from lightning_lopt.functional.integers import as_number
from lightning_lopt.functional.slow_momentum import slow_momentum


class SlowMomentum(Optimizer):
    r"""Slow momentum over averaged pseudo-gradients g = global - local.

    .. math:: u \leftarrow \beta u + g / \gamma,\qquad a \leftarrow a - \alpha \gamma u

    γ is the group key ``local_lr``, the learning rate of the local optimizer's group, which a sync writes before each
    step; it is 1 until someone does. With γ constant this is BMUF (Chen & Huo 2016) with block momentum β and block
    learning rate α; β = 0 and α = 1 is plain averaging; with one worker it is Lookahead.

    Args:
        params: Anchors, or groups of them.
        lr: Outer learning rate α > 0.
        momentum: Decay β of the slow momentum, in [0, 1). SlowMo's authors suggest .2 for 4 workers, .5 for 8, .6
            for 16.

    Raises:
        ValueError: An argument out of its range.

    Memory: one number per coordinate, u.

    Source: arXiv 1910.00643, algorithm 1.

    Example:
        >>> a = torch.nn.Parameter(torch.tensor([1.0]))
        >>> outer = SlowMomentum([a], momentum=0.5)
        >>> for _ in range(2):  # u = 0.2, then 0.3 : 1 -> 0.8 -> 0.5
        ...     a.grad = torch.tensor([0.2])
        ...     outer.step()
        >>> a.data
        tensor([0.5000])
    """

    def __init__(self, params: ParamsT, lr: float = 1.0, momentum: float = 0.5) -> None:
        if not 0 < as_number(lr) < math.inf:
            raise ValueError(f"SlowMomentum needs a finite lr > 0, not {lr!r}.")
        if not 0 <= as_number(momentum) < 1:
            raise ValueError(f"SlowMomentum needs momentum in [0, 1), not {momentum!r}.")
        super().__init__(params, {"lr": lr, "momentum": momentum, "local_lr": 1.0})

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one outer step on every parameter that has a gradient.

        Raises:
            ValueError: The local learning rate γ of a group is unknown, negative or infinite; nothing is changed then.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            _check_local_lr(group)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                slow_momentum(
                    p,
                    p.grad,
                    state["momentum_buffer"],
                    outer_lr=group["lr"],
                    momentum=group["momentum"],
                    local_lr=group["local_lr"],
                )
        return loss


def _check_local_lr(group: dict[str, Any]) -> None:
    if not 0 <= group["local_lr"] < math.inf and any(p.grad is not None for p in group["params"]):
        raise ValueError(
            f"SlowMomentum needs the local learning rate, but that of a parameter group is {group['local_lr']}. Use a "
            "local optimizer that has a finite `lr` >= 0 in each group, or an outer optimizer that does not need it: "
            "torch.optim.SGD with momentum."
        )
