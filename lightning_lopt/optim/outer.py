"""The contract between a sync and its outer optimizer.

An outer optimizer is any `torch.optim.Optimizer` whose step needs no closure. Its parameters are the anchors (the
global parameters), their ``.grad`` is the averaged pseudo-gradient, anchor - mean of the workers, which has a
gradient's sign.
Before each step a sync writes into every parameter group, which mirrors a group of the local optimizer:

* ``round_idx``: index of the round, from 0;
* ``local_steps``: H, the largest number of local steps that a worker took in the round;
* ``local_lr``: learning rate of the local optimizer's group, NaN if it has none;
* ``local_momentum``: heavy-ball momentum of that group which lasts from one sync of a tensor to the next, 0 if none; if
  it has ``betas``, the square of the first one.

Where random coordinates are sent (`density` < 1), the step sees these alone, as 1-D tensors. States of a parameter's
shape must then begin with 0, or be made in the constructor. All else is optional: see `OuterOptimizer`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

OuterFactory = Callable[[Any], Optimizer]
"""Function that makes an outer optimizer from parameter groups, as `partial(torch.optim.SGD, lr=0.7)` does."""

WORKER_GRADS = "worker_grads"
"""Attribute of a parameter that holds the pseudo-gradient of each worker while an optimizer that needs them steps."""


class OuterOptimizer(Protocol):
    """Optional attributes of an outer optimizer; all are read by `read_contract`, but for `total`, which is set.

    Attributes:
        needs_worker_grads: Whether each parameter must also have ``.worker_grads``, every worker's pseudo-gradient
            [K, *S]. Default False. A sync then gathers them instead of their mean.
        num_workers: The only K for which the optimizer works, or None for any. Default None. Checked when a sync is
            made.
        needs_whole_tensors: Whether a step needs whole tensors, as one with statistics of rows and columns does.
            Default False. Such an optimizer is refused where random coordinates are sent.
        max_update_ratio: Largest norm of a step, in units of the norm of the averaged one; a sync replaces a larger
            step by averaging. Default None, no limit.
        fingerprint: Text that differs for optimizers that step differently with the same settings, the digest of a
            network for example. Default None. Compared between the workers when a sync is made.
        total: Function that adds up numbers [n] over all shards of the model. A sync with `sharded=True` sets it where
            the attribute exists; until then it is the identity. An optimizer without it must not combine several
            tensors.

    Example:
        >>> class SignSGD(torch.optim.Optimizer):
        ...     max_update_ratio = 10.0
        ...     def __init__(self, params, lr=1e-3):
        ...         super().__init__(params, {"lr": lr})
        ...     @torch.no_grad()
        ...     def step(self, closure=None):
        ...         for group in self.param_groups:
        ...             for p in group["params"]:
        ...                 if p.grad is not None:
        ...                     p -= group["lr"] * p.grad.sign()
        >>> read_contract(SignSGD([torch.zeros(1)])).max_update_ratio
        10.0
    """

    needs_worker_grads: bool
    num_workers: int | None
    needs_whole_tensors: bool
    max_update_ratio: float | None
    fingerprint: str | None
    total: Callable[[Tensor], Tensor]


@runtime_checkable
class HasTotal(Protocol):
    """An outer optimizer that combines several tensors; see `OuterOptimizer`."""

    total: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OuterContract:
    """The attributes of `OuterOptimizer` that one optimizer has, with defaults for the others, but for `total`.

    Attributes:
        needs_worker_grads: Whether each parameter must also have ``.worker_grads``.
        num_workers: The only K for which it works, or None for any.
        needs_whole_tensors: Whether a step needs whole tensors.
        max_update_ratio: Limit of the step, None without.
        fingerprint: Text that differs for other kinds, settings or fingerprints.
    """

    needs_worker_grads: bool
    num_workers: int | None
    needs_whole_tensors: bool
    max_update_ratio: float | None
    fingerprint: str


def read_contract(optimizer: Optimizer) -> OuterContract:
    """Read the attributes of `OuterOptimizer`, or their defaults.

    Raises:
        TypeError: It is no torch optimizer.
        ValueError: Its step needs more than dense gradients.

    Example:
        >>> read_contract(torch.optim.SGD([torch.zeros(1)], lr=0.7)).needs_whole_tensors
        False
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"outer_optimizer must return a torch.optim.Optimizer, not {optimizer!r}.")
    _check_step(optimizer)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return OuterContract(
        needs_worker_grads=getattr(optimizer, "needs_worker_grads", False),
        num_workers=getattr(optimizer, "num_workers", None),
        needs_whole_tensors=getattr(optimizer, "needs_whole_tensors", False),
        max_update_ratio=getattr(optimizer, "max_update_ratio", None),
        fingerprint=repr((type(optimizer).__name__, settings, getattr(optimizer, "fingerprint", None))),
    )


def check_factory(factory: OuterFactory | None) -> None:
    """Refuse an outer optimizer that is not a function that makes one; None is none.

    Raises:
        TypeError: The argument is something else, an optimizer of the user's own parameters for example.
    """
    if factory is not None and (not callable(factory) or isinstance(factory, Optimizer | torch.nn.Module)):
        raise TypeError(
            "outer_optimizer must make an optimizer from parameters, as partial(torch.optim.SGD, lr=0.7) does, not "
            f"{factory!r}."
        )


def check_coordinatewise(factory: OuterFactory) -> None:
    """Refuse an outer optimizer that must see whole tensors.

    Args:
        factory: Function that makes the optimizer; it is tried on a parameter of its own.

    Raises:
        ValueError: Its contract says so, it has a state of another shape than the parameter's, or it begins a state
            with other values than 0, which coordinates that are sent later would not get.
    """
    probe = torch.zeros(2, 3)
    probe.grad = torch.zeros(2, 3)
    optimizer = factory([{"params": [probe]}])
    if read_contract(optimizer).needs_whole_tensors:
        raise ValueError(_undefined(optimizer, "its statistics of rows, columns and whole tensors"))
    before = set(optimizer.state[probe])
    optimizer.step()
    for key, value in optimizer.state[probe].items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != probe.shape:
            raise ValueError(_undefined(optimizer, f"its state {key!r}"))
        if isinstance(value, Tensor) and value.shape == probe.shape and key not in before and value.any():
            raise ValueError(_undefined(optimizer, f"its state {key!r}, which does not begin with 0,"))


def check_needs_mean_alone(factory: OuterFactory, codec: object) -> None:
    """Refuse an outer optimizer that needs every worker's pseudo-gradient, where a codec sends their mean alone.

    Args:
        factory: Function that makes the optimizer; it is tried on a parameter of its own.
        codec: The codec, for the error message.

    Raises:
        ValueError: The optimizer has `needs_worker_grads`.
    """
    optimizer = factory([{"params": [torch.zeros(2, 3)]}])
    if read_contract(optimizer).needs_worker_grads:
        raise ValueError(
            f"{type(optimizer).__name__} needs every worker's pseudo-gradient, and compression={codec!r} sends their "
            "mean alone. Use compression='int8', 'bf16' or TopK(...), or an outer optimizer that needs the mean only."
        )


def _check_step(optimizer: Optimizer) -> None:
    needed = [
        parameter.name
        for parameter in inspect.signature(optimizer.step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if isinstance(optimizer, torch.optim.SparseAdam):
        needed = ["sparse gradients"]
    if needed:
        raise ValueError(
            f"{type(optimizer).__name__} cannot be the outer optimizer: its step needs {', '.join(needed)}, but a sync "
            "has one dense pseudo-gradient to give. Use SGD, SlowMomentum, Adam, or another that needs no more."
        )


def _undefined(optimizer: Optimizer, what: str) -> str:
    return (
        f"{type(optimizer).__name__} cannot step random coordinates of a tensor: {what} would be undefined. Send whole "
        "tensors (density=1, or selection=Fragments(...)), or use an outer optimizer that treats each coordinate by "
        "itself: averaging, SGD, SlowMomentum, Adam."
    )
