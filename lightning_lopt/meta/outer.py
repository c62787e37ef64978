"""Outer steps on the anchors of many runs: averaging, torch's optimizers, the learned one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lopt.functional import blended
from lightning_lopt.functional.ada import BaseState
from lightning_lopt.functional.blended import BlendedSettings
from lightning_lopt.functional.control import ControlledState, ControllerWeights, LocalPhase, controlled, observe
from lightning_lopt.functional.learned import Network
from lightning_lopt.functional.model import ModelTensor
from lightning_lopt.functional.phase import LocalDecay, settings_in_phase
from lightning_lopt.meta.base import Tensors
from lightning_lopt.meta.unroll import outer_step, step_anchors, zero_states
from lightning_lopt.network import AdaMLP


class SimulatedRound(NamedTuple):
    """A round of local training as an outer step sees it.

    Attributes:
        workers: Parameters of the workers, {[P, K, *S]}.
        round_idx: Index of the round, from 0, [P].
        local_lr: Local learning rate γ of each run, [P].
        local_steps: Number of local steps H.
        retained_momentum: Share of their momentum that the workers retain over the round.
        skipped: Runs that take no outer step, whose workers hold the anchor.
    """

    workers: Tensors
    round_idx: Tensor
    local_lr: Tensor
    local_steps: int
    retained_momentum: float
    skipped: Sequence[int]

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `outer_step` and `step_anchors` that do not depend on the step."""
        return {
            "local_scale": self.local_lr * self.local_steps,
            "skipped": self.skipped,
            "retained_momentum": self.retained_momentum,
        }


SimulatedOuterStep = Callable[[Tensors, SimulatedRound], None]
"""A step that moves anchors {[P, *S]} in place after a round of local training."""


def average_anchors(anchor: Tensors, training: SimulatedRound) -> None:
    """Move the anchors to the means of their workers: Local SGD."""
    for name, a in anchor.items():
        a.copy_(training.workers[name].mean(1))


class LearnedStep:
    """The step of the learned optimizer.

    Args:
        anchor: Global parameters of the runs, {[P, *S]}.
        update: Kind of update of the networks.
        network: Meta-parameters of each run, with a leading dimension P; None if they are set before the first round.

    Attributes:
        network: Meta-parameters of each run; they may be replaced between rounds.
        states: Accumulators of the anchors.
    """

    def __init__(self, anchor: Tensors, update: str, network: Network | None = None) -> None:
        self.network = network
        self.states = zero_states(anchor, update)

    def forget(self, runs: Sequence[int]) -> None:
        """Begin anew for some runs."""
        for state in self.states.values():
            for tensor in vars(state).values():
                tensor[list(runs)] = 0

    def __call__(self, anchor: Tensors, training: SimulatedRound) -> None:
        assert self.network is not None
        outer_step(anchor, training.workers, self.states, self.network, training.round_idx, **training.settings)


def learned_step(anchor: Tensors, networks: Sequence[AdaMLP]) -> LearnedStep:
    """Create the step of one network for all runs, or of one for each.

    Args:
        anchor: Global parameters of the runs, {[P, *S]}.
        networks: Networks of one kind, one or P.
    """
    some = next(iter(anchor.values()))
    named = [dict(network.named_parameters()) for network in networks]
    stacked = {name: torch.stack([each[name].detach() for each in named]).to(some.device) for name in named[0]}
    expanded = {name: p.expand(len(some), *p.shape[1:]) for name, p in stacked.items()}
    return LearnedStep(anchor, networks[0].update, networks[0].functional(expanded))


class BlendedStep:
    """The blended Nesterov step.

    Args:
        anchor: Global parameters of the runs, {[P, *S]}.
        settings: Hyperparameters of each run, [P] and [P, 3].
        phases: Exponent of `settings_in_phase` for each run; by default 0.

    Attributes:
        states: Memory of the anchors.
    """

    def __init__(self, anchor: Tensors, settings: BlendedSettings, phases: Sequence[float] = ()) -> None:
        self._settings, self._phases = settings, phases
        self._decays = [LocalDecay()] * len(phases)
        self.states = {n: BaseState.zeros(tuple(a.shape[1:]), len(a), a.dtype, a.device) for n, a in anchor.items()}

    def __call__(self, anchor: Tensors, training: SimulatedRound) -> None:
        settings = self._in_phase(training.local_lr, training.local_steps)

        def step(tensors: list[ModelTensor[BaseState]]) -> None:
            blended.step_model(tensors, [settings] * len(tensors))

        step_anchors(anchor, training.workers, self.states, step, training.round_idx, **training.settings)

    def _in_phase(self, local_lr: Tensor, local_steps: int) -> BlendedSettings:
        """Settings of the round."""
        settings = self._settings
        if not any(self._phases):
            return settings
        self._decays = [decay.after(lr) for decay, lr in zip(self._decays, local_lr.tolist(), strict=True)]
        of_runs = zip(settings.lr.tolist(), settings.momentum.tolist(), self._decays, self._phases, strict=True)
        pairs = [settings_in_phase(lr, beta, decay.share, local_steps, e) for lr, beta, decay, e in of_runs]
        lr, momentum = settings.lr.new_tensor(pairs).unbind(1)
        return BlendedSettings(lr, momentum, settings.blend)


class ControlledStep:
    """The blended Nesterov step under a controller.

    Args:
        anchor: Global parameters of the runs, {[P, *S]}.
        settings: Hyperparameters without control, [P] and [P, 3].
        weights: Meta-parameters of the controller of each run, or of one for all.

    Attributes:
        states: Memory of the anchors.
    """

    def __init__(self, anchor: Tensors, settings: BlendedSettings, weights: ControllerWeights) -> None:
        self._settings = settings
        self._weights = ControllerWeights(*(tensor.to(settings.lr) for tensor in weights))
        self._decays = [LocalDecay()] * len(settings.lr)
        self.states = {
            n: ControlledState.zeros(tuple(a.shape[1:]), len(a), a.dtype, a.device) for n, a in anchor.items()
        }

    def __call__(self, anchor: Tensors, training: SimulatedRound) -> None:
        before, rates = self._decays, training.local_lr.tolist()
        self._decays = [decay.after(lr) for decay, lr in zip(before, rates, strict=True)]
        phase = LocalPhase.of(before, self._decays, training.local_steps, self._settings.lr)

        def step(tensors: list[ModelTensor[ControlledState]]) -> None:
            inputs = [self.observe(tensor, phase) for tensor in tensors]
            blended.step_model(tensors, [controlled(each, self._weights, self._settings) for each in inputs])

        step_anchors(anchor, training.workers, self.states, step, training.round_idx, **training.settings)

    def observe(self, tensor: ModelTensor[ControlledState], phase: LocalPhase) -> Tensor:
        """Compute the inputs of a tensor; arguments are those of `functional.control.observe`."""
        return observe(tensor, phase)


def base_step(anchor: Tensors) -> BlendedStep:
    """Create the blended Nesterov step with the hyperparameters made by hand, from which a controller starts."""
    some = next(iter(anchor.values()))
    return BlendedStep(anchor, BlendedSettings.by_hand(len(some), some))


def controlled_step(anchor: Tensors, weights: ControllerWeights) -> ControlledStep:
    """Create that step under a controller.

    Args:
        anchor: Global parameters of the runs, {[P, *S]}.
        weights: Meta-parameters of the controller of each run, or of one for all.
    """
    some = next(iter(anchor.values()))
    return ControlledStep(anchor, BlendedSettings.by_hand(len(some), some), weights)


def optimizer_step(optimizer: Optimizer) -> SimulatedOuterStep:
    """Create the step of an optimizer that has one parameter group for each run, as `views` gives them."""

    def step(anchor: Tensors, training: SimulatedRound) -> None:
        grads = [a - training.workers[name].mean(1) for name, a in anchor.items()]
        for i, (group, rate) in enumerate(zip(optimizer.param_groups, training.local_lr.tolist(), strict=True)):
            group["local_lr"] = rate
            for p, grad in zip(group["params"], grads, strict=True):
                p.grad = None if i in training.skipped else grad[i]
        optimizer.step()

    return step


def views(anchor: Tensors) -> list[list[Tensor]]:
    """List the anchors of each run, as views."""
    return [[a[i] for a in anchor.values()] for i in range(len(next(iter(anchor.values()))))]
