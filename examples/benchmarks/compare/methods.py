"""Methods that are compared: their grids of hyperparameters and their rounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from lightning_lopt.meta.base import AbstractTask, Batch, Tensors
from lightning_lopt.meta.guard import Guard
from lightning_lopt.meta.local import LocalOptimizer
from lightning_lopt.meta.outer import Outer, averaging, learning, stepping, views
from lightning_lopt.meta.unroll import local_round
from lightning_lopt.network import AdaMLP
from lightning_lopt.optim import SlowMomentum

RATES = (1, 0.5, 0.1, 0.05, 0.01, 0.005, 0.001, 5e-4, 1e-4, 5e-5, 1e-5)


@dataclass(frozen=True)
class Setting:
    """A method with its hyperparameters.

    Attributes:
        method: Name of the method, a key of `GRIDS`.
        local_lr: Local learning rate γ; for data-parallel methods the learning rate.
        options: Hyperparameters of the outer optimizer.
    """

    method: str
    local_lr: float
    options: Mapping[str, float] = field(default_factory=dict)


def _slowmo(local_lr: float) -> Iterator[dict[str, float]]:
    """Grid of arXiv 2312.02204, for η = α·γ."""
    for rate, momentum in product(RATES, (0.99, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)):
        yield {"lr": rate / local_lr, "momentum": momentum}


def _diloco(local_lr: float) -> Iterator[dict[str, float]]:
    for lr, momentum in product((0.1, 0.3, 0.5, 0.7, 1.0), (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)):
        yield {"lr": lr, "momentum": momentum}


def _fedadam(local_lr: float) -> Iterator[dict[str, float]]:
    return ({"lr": lr} for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2))


def _base_step(local_lr: float) -> Iterator[dict[str, float]]:
    for lr, momentum in product((0.3, 0.5, 0.7, 1.0, 1.4), (0.5, 0.7, 0.8, 0.9)):
        yield {"lr": lr, "momentum": momentum}


GRIDS: dict[str, Callable[[float], Iterator[dict[str, float]]]] = {
    "local_sgd": lambda local_lr: iter([{}]),
    "learned": lambda local_lr: iter([{}]),
    "slowmo": _slowmo,
    "diloco": _diloco,
    "fedadam": _fedadam,
    "base_step": _base_step,
    "parallel_sgd": lambda local_lr: iter([{}]),
    "parallel_adam": lambda local_lr: iter([{}]),
}
PARALLEL = {"parallel_sgd": LocalOptimizer("sgd"), "parallel_adam": LocalOptimizer("adamw")}


def settings(method: str, local_lrs: Sequence[float]) -> list[Setting]:
    """All settings in a method's grid; data-parallel methods have learning rates of their own.

    Example:
        >>> len(settings("slowmo", [1.0, 0.5, 0.3, 0.1])), len(settings("parallel_adam", [1.0, 0.5]))
        (440, 11)
    """
    rates = RATES if method in PARALLEL else local_lrs
    return [Setting(method, lr, options) for lr in rates for options in GRIDS[method](lr)]


class Method(ABC):
    """Rounds of one method on the anchors {[P, *S]} of all its settings.

    Attributes:
        left_out: Number of workers that the rounds of each run have left out so far.
    """

    left_out: list[int]

    @abstractmethod
    def round(self, batches: Iterator[Batch], rates: Tensor, round_idx: int) -> None:
        """Move the anchors by one round.

        Args:
            batches: H batches, each tensor [P * K, B, *].
            rates: Local learning rate γ of each particle in this round, [P].
            round_idx: Index of the round, from 0.
        """


class Parallel(Method):
    """Data-parallel training: one step per round on its K·H batches together, with as many bytes as the others send."""

    def __init__(self, task: AbstractTask, anchor: Tensors, optimizer: LocalOptimizer) -> None:
        self._task, self._anchor, self._optimizer = task, anchor, optimizer
        self._state = optimizer.init(anchor)
        self.left_out = [0] * len(next(iter(anchor.values())))

    def round(self, batches: Iterator[Batch], rates: Tensor, round_idx: int) -> None:
        gradients = []
        for batch in batches:
            whole = tuple(part.unflatten(0, (len(rates), -1)).flatten(1, 2) for part in batch)
            gradients.append(self._task.loss_and_grad(self._anchor, whole)[1])
        mean = {name: torch.stack([grads[name] for grads in gradients]).mean(0) for name in self._anchor}
        self._optimizer.apply(self._anchor, mean, rates, self._state)


class Local(Method):
    """Local training and an outer step; workers that diverge are left out, with every method."""

    def __init__(
        self, task: AbstractTask, anchor: Tensors, num_workers: int, optimizer: LocalOptimizer, outer: Outer
    ) -> None:
        self._task, self._anchor, self._num_workers = task, anchor, num_workers
        self._optimizer, self._outer = optimizer, outer
        self._guard = Guard(len(next(iter(anchor.values()))), num_workers)
        self.left_out = self._guard.left_out
        self._state = optimizer.init({name: a.repeat_interleave(num_workers, 0) for name, a in anchor.items()})

    def round(self, batches: Iterator[Batch], rates: Tensor, round_idx: int) -> None:
        workers, _ = local_round(
            self._task, self._anchor, batches, rates, self._num_workers, self._optimizer, self._state
        )
        self._outer(workers, rates, round_idx, self._guard.check(self._anchor, workers, self._state))


def outer(particles: Sequence[Setting], anchor: Tensors, network: AdaMLP, retained_momentum: float = 0.0) -> Outer:
    """Make the outer step of a method.

    Args:
        particles: Settings of the method, one per particle.
        anchor: Anchors that the step moves in place, {[P, *S]}.
        network: Network of the method ``"learned"``.
        retained_momentum: Fraction of their momentum that the workers keep over a round, in [0, 1].
    """
    method = particles[0].method
    if method == "local_sgd":
        return averaging(anchor)
    if method == "learned":
        return learning(anchor, [network], retained_momentum)
    if method == "base_step":
        options = [setting.options for setting in particles]
        return learning(anchor, [AdaMLP.base_step(each["lr"], each["momentum"]) for each in options], retained_momentum)
    groups = [
        {"params": params, "local_lr": setting.local_lr, **setting.options}
        for params, setting in zip(views(anchor), particles, strict=True)
    ]
    if method == "slowmo":
        optimizer: Optimizer = SlowMomentum(groups)
    elif method == "diloco":
        optimizer = SGD(groups, nesterov=True, momentum=0.9)
    else:
        optimizer = Adam(groups, betas=(0.9, 0.99))
    return stepping(anchor, optimizer)
