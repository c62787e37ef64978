"""Base of the outer optimizers that step a whole model at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import override

from lightning_lopt.functional.blended import retained_momentum
from lightning_lopt.functional.blocks import one_thread
from lightning_lopt.functional.damping import Total, local_total
from lightning_lopt.functional.model import ModelTensor
from lightning_lopt.functional.precision import state_dtype

OLD_NAMES = {"square": "squared_norm", "limit": "norm_limit", "left": "left_gram", "right": "right_gram"}  # in 0.1


class WholeModelOptimizer(Optimizer, ABC):
    """An outer optimizer whose step sees whole tensors, and norms over all of them.

    Its state keeps a type of its own, float32 (float64 for float64 parameters), and a leading dimension of size 1.
    Parameter groups may hold ``local_lr``, ``local_steps`` and ``local_momentum``, which the strategies write there
    before each step: learning rate, number of steps and heavy-ball momentum of the local training.

    Attributes:
        needs_whole_tensors: Whether the step is undefined on random coordinates of a tensor: True.
        max_update_ratio: Bound on the step in units of the averaged one, beyond which a sync averages instead.
        total: Function that adds up numbers over all shards of the model; set by a sync with `sharded=True`.
    """

    _state_class: ClassVar[type]  # a dataclass of tensors [1, *]
    needs_whole_tensors: ClassVar[bool] = True
    max_update_ratio: ClassVar[float] = 100.0

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self.total: Total = local_total
        super().__init__(params, defaults)

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold, which step for themselves: torch's leaves out attributes of our own."""
        return {**super().__getstate__(), "total": local_total}

    @abstractmethod
    def _new_state(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        """Create the state of a parameter, an instance of `_state_class`."""

    @abstractmethod
    def _step_model(self, tensors: list[ModelTensor[Any]], groups: list[dict[str, Any]]) -> None:
        """Take one step of all tensors, each of which has its parameter group."""

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one outer step on every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        shared: dict[tuple[Any, ...], Tensor] = {}
        with one_thread():
            self._step_model([self._tensor(p, group, shared) for p, group in pairs], [group for _, group in pairs])
        for p, _ in pairs:
            self.state[p]["step"] += 1
        return loss

    def _tensor(self, p: Tensor, group: dict[str, Any], shared: dict[tuple[Any, ...], Tensor]) -> ModelTensor[Any]:
        """Gather what the step of a parameter needs; equal numbers are one tensor, kept in `shared`."""
        assert p.grad is not None
        if p.grad.is_sparse or p.is_complex():
            raise ValueError(f"{type(self).__name__} takes dense real parameters and gradients only.")
        dtype, state = state_dtype(p), self.state[p]
        if not state:
            new = self._new_state(tuple(p.shape), dtype, p.device)
            state.update(vars(new), step=torch.zeros(1, dtype=torch.long))
        workers, local_steps = self._worker_grads(p), group.get("local_steps", 1)

        def number(value: float, dtype: torch.dtype) -> Tensor:
            key = (value, dtype, p.device)
            if key not in shared:
                shared[key] = torch.tensor([value], dtype=dtype, device=p.device)
            return shared[key]

        return ModelTensor(
            param=p.unsqueeze(0),
            grad=p.grad.to(dtype).unsqueeze(0),
            state=self._state_class(**{name: value for name, value in state.items() if name != "step"}),
            round_idx=number(state["step"].item(), torch.long),
            local_scale=number(group.get("local_lr", 0.0) * local_steps, p.dtype),
            retained_momentum=number(retained_momentum(group.get("local_momentum", 0.0), local_steps), p.dtype),
            worker_grads=None if workers is None else workers.to(dtype).unsqueeze(0),
        )

    def _worker_grads(self, p: Tensor) -> Tensor | None:
        """The pseudo-gradient of each worker, [K, *S], if the step needs them."""
        return None

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, whose tensors keep their own type, where torch casts them to the parameter's.

        Args:
            state_dict: Result of `state_dict`.

        Raises:
            ValueError: The state is of another version of this optimizer, or of another one.
        """
        states = {
            index: {_current_name(name): value for name, value in saved.items()}
            for index, saved in state_dict["state"].items()
        }
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(indices, params, strict=False):
            self._check_state(states.get(i, {}), tuple(p.shape))
        super().load_state_dict({**state_dict, "state": states})
        for i, p in zip(indices, params, strict=True):
            self.state[p].update(
                {
                    name: value.to("cpu" if name == "step" else p.device, copy=True)
                    for name, value in states.get(i, {}).items()
                }
            )

    def _check_state(self, saved: dict[str, Tensor], shape: tuple[int, ...]) -> None:
        """Raise a ValueError that says why a state is not that of a parameter of this shape."""
        shapes = {name: tuple(value.shape) for name, value in saved.items() if name != "step"}
        new = vars(self._new_state(shape, torch.float32, torch.device("meta")))
        if saved and saved.keys() != {*new, "step"}:
            raise ValueError(
                f"This state holds {sorted(saved)} but {type(self).__name__}'s now has {sorted({*new, 'step'})}: "
                "another version wrote it, or another optimizer. Load it with that one, or begin with a fresh state."
            )
        if saved and shapes != (expected := {name: tuple(value.shape) for name, value in new.items()}):
            raise ValueError(
                f"This state of a parameter of shape {shape} has shapes {shapes}, but {type(self).__name__}'s has "
                f"{expected}: it is of another model, or an optimizer with another kind of network wrote it. Load it "
                "with that one, or begin with a fresh state."
            )


def _current_name(name: str) -> str:
    return OLD_NAMES.get(name, name)
