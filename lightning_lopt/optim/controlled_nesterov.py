"""The blended Nesterov step under a meta-learned controller, as a `torch.optim.Optimizer`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_lopt.controller import Controller
from lightning_lopt.functional import blended
from lightning_lopt.functional.blended import BlendedSettings
from lightning_lopt.functional.control import ControlledState, ControllerWeights, LocalPhase, controlled, observe
from lightning_lopt.functional.model import ModelTensor
from lightning_lopt.functional.phase import LocalDecay
from lightning_lopt.optim.whole_model import WholeModelOptimizer


class ControlledNesterov(WholeModelOptimizer):
    r"""`BlendedNesterov` whose learning rate, momentum and blend a linear controller sets, in each round and tensor.

    .. math:: u = 1.5 \tanh\Big(\frac{W x + b}{1.5}\Big),\qquad 1 - \beta' = (1 - \beta)\, e^{u_2},\qquad
        \frac{\mathrm{lr}'}{1 - \beta'} = \frac{\mathrm{lr}}{1 - \beta}\, e^{u_1},\qquad
        w' \propto (w_1, w_2 e^{u_3}, w_3 e^{u_4})

    with 17 inputs x (`lightning_lopt.functional.control`): the phase of the local learning rate, local steps, momentum
    and round, and the tensor's pseudo-gradient beside its momentum, its past and its parameter. A controller of zeros
    gives the steps of `BlendedNesterov`, bit for bit.

    Args:
        params: Anchors, or groups of them.
        controller: Controller, or a path to its file; None for the bundled one.
        lr: Outer learning rate > 0 without control.
        momentum: Momentum β in [0, 1) without control.
        blend: Weights w of the step as it is, orthogonalised and whitened, without control; each at least 0, of sum 1.

    Attributes:
        needs_whole_tensors: Whether the step is undefined on random coordinates of a tensor: True.
        total: Function that adds up numbers over all shards of the model; set by a sync with `sharded=True`.
        max_update_ratio: Bound on the step in units of the averaged one, beyond which a sync averages instead.

    Raises:
        ValueError: An argument out of its range, sparse or complex parameters, or a gradient of another shape.

    Memory: that of `BlendedNesterov`, and three numbers per tensor.

    Source: made here; an optimizer of settings instead of steps, as LHOPT (arXiv 2106.00958).

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> outer = ControlledNesterov([p], Controller(), lr=0.5, blend=(0.5, 0.3, 0.2))
        >>> p.grad = torch.tensor([1.0, -2.0])
        >>> outer.step()
        >>> [round(x, 3) for x in p.tolist()]
        [-0.558, 0.959]
    """

    _state_class = ControlledState

    def __init__(
        self,
        params: ParamsT,
        controller: Controller | str | Path | None = None,
        lr: float = blended.LR,
        momentum: float = blended.MOMENTUM,
        blend: Sequence[float] = blended.BLEND,
    ) -> None:
        blended.check_settings(lr, momentum, blend)
        if controller is None:
            controller = Controller.bundled()
        self.controller = controller if isinstance(controller, Controller) else Controller.load(controller)
        defaults = {"lr": lr, "momentum": momentum, "blend": tuple(blend)}
        super().__init__(params, {**defaults, "local_decay": tuple(LocalDecay())})

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "controller": self.controller}

    @property
    def fingerprint(self) -> str:
        """Digest that differs for controllers that differ in any weight."""
        tensors = self.controller.state_dict().values()
        return hashlib.sha256(b"".join(t.double().cpu().numpy().tobytes() for t in tensors)).hexdigest()

    @override
    def _new_state(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> ControlledState:
        return ControlledState.zeros(shape, 1, dtype, device)

    @override
    def _step_model(self, tensors: list[ModelTensor[ControlledState]], groups: list[dict[str, Any]]) -> None:
        before: dict[int, LocalDecay] = {}
        for group in self.param_groups:  # those without a pseudo-gradient in this round, too
            before[id(group)] = LocalDecay(*group["local_decay"])
            group["local_decay"] = tuple(before[id(group)].after(group.get("local_lr", math.nan)))
        settings = []
        for tensor, group in zip(tensors, groups, strict=True):
            like, now = tensor.grad, LocalDecay(*group["local_decay"])
            phase = LocalPhase.of([before[id(group)]], [now], group.get("local_steps", 1), like)
            base = BlendedSettings(*(like.new_tensor([group[name]]) for name in BlendedSettings._fields))
            weights = ControllerWeights(*(tensor.to(like) for tensor in self.controller.weights()))
            settings.append(controlled(observe(tensor, phase), weights, base))
        blended.step_model(tensors, settings, self.total)
