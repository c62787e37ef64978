"""Methods that are compared: their grids of hyperparameters and their rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from lightning_lopt.controller import Controller
from lightning_lopt.functional.blended import BlendedSettings
from lightning_lopt.meta.base import AbstractTask, Batch, Tensors
from lightning_lopt.meta.local import LocalOptimizer
from lightning_lopt.meta.outer import (
    BlendedStep,
    ControlledStep,
    SimulatedOuterStep,
    average_anchors,
    learned_step,
    optimizer_step,
    views,
)
from lightning_lopt.network import AdaMLP
from lightning_lopt.optim import BlendedNesterov, SlowMomentum

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
NAMES = {  # as users know them
    "local_sgd": "Local SGD",
    "learned": "LearnedLocalSGD",
    "slowmo": "SlowMo",
    "diloco": "DiLoCo",
    "fedadam": "FedAdam",
    "base_step": "BlendedNesterov",
    "controlled": "ControlledNesterov",
    "parallel_sgd": "data-parallel SGD",
    "parallel_adam": "data-parallel Adam",
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


class Method(Protocol):
    """Rounds of one method on the anchors {[P, *S]} of all its settings, as `Simulation` makes them.

    Attributes:
        left_out: Number of workers that the rounds of each run have left out so far.
    """

    @property
    def left_out(self) -> list[int]: ...

    def round(self, batches: Iterator[Batch], local_lr: Tensor, round_idx: Tensor) -> object:
        """Simulate one round; arguments are those of `Simulation.round`."""
        ...


class Parallel:
    """Data-parallel training: one step per round on its K·H batches together, with as many bytes as the others send."""

    def __init__(self, task: AbstractTask, anchor: Tensors, optimizer: LocalOptimizer) -> None:
        self._task, self._anchor, self._optimizer = task, anchor, optimizer
        self._state = optimizer.init(anchor)
        self.left_out = [0] * len(next(iter(anchor.values())))

    def round(self, batches: Iterator[Batch], local_lr: Tensor, round_idx: Tensor) -> None:
        gradients = []
        for batch in batches:
            whole = tuple(part.unflatten(0, (len(local_lr), -1)).flatten(1, 2) for part in batch)
            gradients.append(self._task.loss_and_grad(self._anchor, whole)[1])
        mean = {name: torch.stack([grads[name] for grads in gradients]).mean(0) for name in self._anchor}
        self._optimizer.apply(self._anchor, mean, local_lr, self._state)


def outer(particles: Sequence[Setting], anchor: Tensors, weights: AdaMLP | Controller) -> SimulatedOuterStep:
    """Make the outer step of a method.

    Args:
        particles: Settings of the method, one per particle.
        anchor: Anchors that the step moves in place, {[P, *S]}.
        weights: Network of the method ``"learned"``, or controller of the method ``"controlled"``.
    """
    method = particles[0].method
    if method == "local_sgd":
        return average_anchors
    if method == "learned":
        assert isinstance(weights, AdaMLP)
        return learned_step(anchor, [weights])
    if method in ("base_step", "controlled"):
        like = next(iter(anchor.values()))
        options: list[dict[str, Any]] = [dict(setting.options) for setting in particles]
        own = [BlendedNesterov([torch.empty(0)], **each).param_groups[0] for each in options]
        chosen = BlendedSettings(*(like.new_tensor([each[name] for each in own]) for name in BlendedSettings._fields))
        if method == "controlled":
            assert isinstance(weights, Controller)
            return ControlledStep(anchor, chosen, weights.to(like).weights())
        return BlendedStep(anchor, chosen, [each["phase"] for each in own])
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
    return optimizer_step(optimizer)
