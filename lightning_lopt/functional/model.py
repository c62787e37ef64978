"""Tensors of a model as an outer step sees them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

State = TypeVar("State", covariant=True)
GROUP = {"cpu": 1 << 18, "other": 1 << 22}  # elements of tensors that are copied into one: tens of MB with their states


@dataclass(frozen=True)
class ModelTensor(Generic[State]):
    """A parameter tensor of a model with all that its outer step reads and writes.

    Attributes:
        param: Anchor, [P, *S], moved in place; of any floating type.
        grad: Averaged pseudo-gradient (global - local), [P, *S], in the type of the state.
        state: Memory of the optimizer, changed in place.
        round_idx: Number of steps already taken, from 0, [P].
        local_scale: Local learning rate times local steps, γH, [P]; 0 or nan where it is not known.
        retained_momentum: Share of their momentum that the workers retain over a round, [P].
        worker_grads: Pseudo-gradient of each worker in fixed order, [P, K, *S], in the type of the state; None where
            the step needs their mean alone.
    """

    param: Tensor
    grad: Tensor
    state: State
    round_idx: Tensor
    local_scale: Tensor
    retained_momentum: Tensor
    worker_grads: Tensor | None = None


def groups_of_one_shape(tensors: Sequence[ModelTensor[Any]], kinds: Sequence[Hashable]) -> list[list[int]]:
    """Divide tensors into groups that may be stacked: of one shape and kind, and few enough elements.

    Operations on small tensors cost more in dispatch than in arithmetic; large tensors stay alone.

    Args:
        tensors: Tensors of the model.
        kinds: Anything in which the tensors of a group must be equal, for each.

    Returns:
        Indices of the tensors of each group; empty tensors are in none.

    Example:
        >>> like = [torch.zeros(1, 3), torch.zeros(1, 2), torch.zeros(1, 3)]
        >>> tensors = [ModelTensor(p, p, None, p, p, p) for p in like]
        >>> groups_of_one_shape(tensors, ["a"] * 3), groups_of_one_shape(tensors, ["a", "a", "b"])
        ([[0, 2], [1]], [[0], [1], [2]])
    """
    groups: dict[Hashable, list[list[int]]] = {}
    for i, (tensor, kind) in enumerate(zip(tensors, kinds, strict=True)):
        grad = tensor.grad
        if not grad.numel():
            continue
        most = max(1, GROUP.get(grad.device.type, GROUP["other"]) // grad.numel())
        own = groups.setdefault((grad.shape, grad.dtype, grad.device, tensor.param.dtype, kind), [[]])
        if len(own[-1]) == most:
            own.append([])
        own[-1].append(i)
    return [group for own in groups.values() for group in own]


def step_together(tensors: Sequence[ModelTensor[State]], step: Callable[[ModelTensor[State]], None]) -> None:
    """Take a step of several tensors of one shape as one tensor, whose particles are those of all of them.

    Args:
        tensors: Tensors [P, *S]; one is passed on as it is.
        step: Step of one tensor, in place on its parameter and its state.
    """
    if len(tensors) == 1:
        return step(tensors[0])
    states = [vars(tensor.state) for tensor in tensors]
    joined = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    workers = [tensor.worker_grads for tensor in tensors if tensor.worker_grads is not None]
    whole = ModelTensor(
        param=torch.cat([tensor.param for tensor in tensors]),
        grad=torch.cat([tensor.grad for tensor in tensors]),
        state=type(tensors[0].state)(**joined),
        round_idx=torch.cat([tensor.round_idx for tensor in tensors]),
        local_scale=torch.cat([tensor.local_scale for tensor in tensors]),
        retained_momentum=torch.cat([tensor.retained_momentum for tensor in tensors]),
        worker_grads=torch.cat(workers) if workers else None,
    )
    step(whole)
    params = [tensor.param for tensor in tensors]
    for target, source in ((params, whole.param), *(([s[name] for s in states], joined[name]) for name in joined)):
        torch.ops.aten._foreach_copy_(target, source.chunk(len(tensors)))


def repeated(tensor: Tensor, count: int) -> Tensor:
    """Repeat what belongs to the particles of one tensor for a group of several: [P, *] to [count * P, *]."""
    return (
        tensor.expand(count, *tensor.shape[1:]) if len(tensor) == 1 else tensor.repeat(count, *[1] * (tensor.dim() - 1))
    )
