"""Tensors of a model as an outer step sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

State = TypeVar("State", covariant=True)


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
