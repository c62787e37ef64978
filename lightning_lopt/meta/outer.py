"""Outer steps on the anchors of many runs: averaging, torch's optimizers, the learned one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lopt.meta.base import Tensors
from lightning_lopt.meta.unroll import outer_step, zero_states
from lightning_lopt.network import AdaMLP

Outer = Callable[[Tensors, Tensor, int, Sequence[int]], None]
"""Moves anchors in place: of the workers {[P, K, *S]}, γ of each run in this round [P], the round, from 0, and the runs
that take no step in it, whose workers hold the anchor."""


def averaging(anchor: Tensors) -> Outer:
    """The mean of the workers: Local SGD."""

    def step(workers: Tensors, rates: Tensor, round_idx: int, skipped: Sequence[int]) -> None:
        for name, a in anchor.items():
            a.copy_(workers[name].mean(1))

    return step


def learning(anchor: Tensors, networks: Sequence[AdaMLP], carried: float = 0.0) -> Outer:
    """The step of a network: of one for all runs, or of one for each; `carried` is that of `unroll.outer_step`."""
    some = next(iter(anchor.values()))
    named = [dict(network.named_parameters()) for network in networks]
    stacked = {name: torch.stack([own[name].detach() for own in named]).to(some.device) for name in named[0]}
    whole = {name: p.expand(len(some), *p.shape[1:]) for name, p in stacked.items()}
    theta, states = networks[0].functional(whole), zero_states(anchor, networks[0].update)
    rounds = some.new_zeros(len(some), dtype=torch.long)
    return lambda workers, rates, round_idx, skipped: outer_step(
        anchor, workers, states, theta, rounds + round_idx, rates, skipped, carried
    )


def stepping(anchor: Tensors, optimizer: Optimizer) -> Outer:
    """The step of an optimizer that has one parameter group for each run, as `views` gives them."""

    def step(workers: Tensors, rates: Tensor, round_idx: int, skipped: Sequence[int]) -> None:
        grads = [a - workers[name].mean(1) for name, a in anchor.items()]
        for i, (group, rate) in enumerate(zip(optimizer.param_groups, rates.tolist(), strict=True)):
            group["local_lr"] = rate
            for p, grad in zip(group["params"], grads, strict=True):
                p.grad = None if i in skipped else grad[i]
        optimizer.step()

    return step


def views(anchor: Tensors) -> list[list[Tensor]]:
    """The anchors of each run."""
    return [[a[i] for a in anchor.values()] for i in range(len(next(iter(anchor.values()))))]
