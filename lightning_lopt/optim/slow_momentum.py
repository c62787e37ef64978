"""The outer optimizer of SlowMo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_lopt.functional.momentum import slow_momentum


class SlowMomentum(Optimizer):
    r"""Slow momentum over averaged pseudo-gradients g = global - local.

    .. math:: u \leftarrow \beta u + g / \gamma,\qquad a \leftarrow a - \alpha \gamma u

    γ is the group key ``local_lr``, which a sync writes before each step; it is 1 until someone does. With γ
    constant this is BMUF (Chen & Huo 2016) with block momentum β and block learning rate α; β = 0 and α = 1 is
    plain averaging; with one worker it is Lookahead.

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
        if not lr > 0:
            raise ValueError(f"SlowMomentum needs lr > 0, not {lr}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"SlowMomentum needs momentum in [0, 1), not {momentum}.")
        super().__init__(params, {"lr": lr, "momentum": momentum, "local_lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one outer step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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
