"""The hand-made step that the default network starts from, as a `torch.optim.Optimizer`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_lopt.functional import blended
from lightning_lopt.functional.ada import BaseState
from lightning_lopt.functional.blended import BlendedSettings
from lightning_lopt.functional.model import ModelTensor
from lightning_lopt.functional.phase import LocalDecay, settings_in_phase
from lightning_lopt.optim.whole_model import WholeModelOptimizer


class BlendedNesterov(WholeModelOptimizer):
    r"""A Nesterov step, blended with its orthogonalised (Muon) and its whitened (Shampoo) form.

    The equations are those of `lightning_lopt.functional.blended.step_model`. A pseudo-gradient that has grown by more
    than half is damped first, unless ``local_lr`` times ``local_steps`` has grown as much, and the share of the
    momentum that the workers' ``local_momentum`` retains over a round is not counted again. Without a phase the step
    equals that of ``LearnedOptimizer(params, AdaMLP.base_step(lr, momentum, blend))`` up to rounding, without a network
    and with less state.

    With a phase e, of which 0.5 is measured, the outer step grows while the local learning rate γ decays: in round t
    after H local steps

    .. math:: \mathrm{lr}_t = \mathrm{lr}\, \min(q^{-e},\, 2.5),\qquad
        1 - \beta_t = \min\big(1 - \beta,\; \max((1 - \beta)\, d^e,\; 0.05)\big),\qquad
        d = \frac{\gamma_t}{\gamma_{\mathrm{start}}},\quad q = 1 - (1 - d)^H

    where γ_start is that from which the present decay started: any rise, as in a warm-up or at a restart, begins anew.
    The rule is made by hand. It gains on the small tasks on which it was tuned; in the mean of ten held-out tasks it is
    neither ahead nor behind, and behind on those with AdamW: examples/records/2026-11-30_phase.

    Args:
        params: Anchors, or groups of them.
        lr: Outer learning rate > 0.
        momentum: Momentum β in [0, 1).
        blend: Weights w of the step as it is, orthogonalised and whitened, each at least 0, of sum 1.
        phase: Exponent e >= 0; 0 leaves `lr` and `momentum` as they are. Where a group's ``local_lr`` has not fallen
            since it last rose, or is not known, the step is that of 0, bit for bit.

    Attributes:
        needs_whole_tensors: Whether the step is undefined on random coordinates of a tensor: True.
        total: Function that adds up numbers over all shards of the model; set by a sync with `sharded=True`.
        max_update_ratio: Bound on the step in units of the averaged one, beyond which a sync averages instead.

    Raises:
        ValueError: An argument out of its range, sparse or complex parameters, or a gradient of another shape.

    Memory: momentum (1 per coordinate) and the Gram matrices (at most 5 per coordinate).

    Source: `lightning_lopt.functional`: `blended`, `orthogonal`, `whitening`, `damping`, `phase`.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> outer = BlendedNesterov([p], lr=0.5, blend=(0.5, 0.3, 0.2))
        >>> p.grad = torch.tensor([1.0, -2.0])
        >>> outer.step()
        >>> [round(x, 3) for x in p.tolist()]  # in the first round there is no momentum yet
        [-0.558, 0.959]
    """

    _state_class = BaseState

    def __init__(
        self,
        params: ParamsT,
        lr: float = blended.LR,
        momentum: float = blended.MOMENTUM,
        blend: Sequence[float] = blended.BLEND,
        phase: float = 0.0,
    ) -> None:
        blended.check_settings(lr, momentum, blend)
        if not 0 <= phase < math.inf:
            raise ValueError(f"BlendedNesterov needs a finite phase >= 0, not {phase}.")
        defaults = {"lr": lr, "momentum": momentum, "blend": tuple(blend), "phase": phase}
        super().__init__(params, {**defaults, "local_decay": tuple(LocalDecay())})

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a state from before there was a phase
            group.setdefault("phase", 0.0)
            group.setdefault("local_decay", tuple(LocalDecay()))

    @override
    def _new_state(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> BaseState:
        return BaseState.zeros(shape, 1, dtype, device)

    @override
    def _step_model(self, tensors: list[ModelTensor[BaseState]], groups: list[dict[str, Any]]) -> None:
        for group in self.param_groups:  # those without a pseudo-gradient in this round, too
            group["local_decay"] = tuple(LocalDecay(*group["local_decay"]).after(group.get("local_lr", math.nan)))
        settings = []
        for tensor, group in zip(tensors, groups, strict=True):
            share, local_steps = LocalDecay(*group["local_decay"]).share, group.get("local_steps", 1)
            of_round = settings_in_phase(group["lr"], group["momentum"], share, local_steps, group["phase"])
            settings.append(BlendedSettings(*(tensor.grad.new_tensor([x]) for x in (*of_round, group["blend"]))))
        blended.step_model(tensors, settings, self.total)
