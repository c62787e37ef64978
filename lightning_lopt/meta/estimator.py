"""Meta-gradients of one task: windows over its particles."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_lopt.functional import pes
from lightning_lopt.meta.base import Tensors
from lightning_lopt.meta.particles import Particles, seeded
from lightning_lopt.network import AdaMLP

EstimatorKind = Literal["pes", "published_pes", "truncated_es"]


class Window(NamedTuple):
    """Result of one window.

    Attributes:
        gradient: Meta-gradient, {[*S]}.
        loss: Mean loss.
        rounds: Number of rounds simulated, those of all replicas added up.
    """

    gradient: Tensors
    loss: float
    rounds: int


class Estimator:
    """Windows over the particles of one task.

    Args:
        particles: Particles, whose unrolls go on from window to window.
        kind: Name ``"pes"`` (unbiased), ``"published_pes"`` (the reference code's window formula) or
            ``"truncated_es"`` (without memory of earlier windows; the baseline).
        truncation: Number of rounds per window W >= 1.
        sigma: Standard deviation σ > 0 of the perturbations.
        log_floor: Floor > 0 to minimise the mean of log(loss + log_floor) over rounds instead of that of the loss, so
            that late progress counts too; None for the loss.
        seed: Seed of the choice of H.

    Raises:
        ValueError: An argument out of its range.
    """

    def __init__(
        self,
        particles: Particles,
        kind: EstimatorKind,
        truncation: int,
        sigma: float,
        log_floor: float | None,
        seed: int,
    ) -> None:
        if kind not in get_args(EstimatorKind):
            raise ValueError(f"The estimator must be one of {get_args(EstimatorKind)}, not {kind!r}.")
        if truncation < 1:
            raise ValueError(f"truncation must be at least 1, not {truncation}.")
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma must be positive, not {sigma}.")
        if log_floor is not None and not log_floor > 0:
            raise ValueError(f"log_floor must be positive or None, not {log_floor}.")
        self.particles = particles
        self.kind: EstimatorKind = kind
        self.truncation = truncation
        self.sigma = sigma
        self.log_floor = log_floor
        self._seed = seed
        self._accumulator: Tensors = {}

    @torch.no_grad()
    def window(self, network: AdaMLP, iteration: int) -> Window:
        """Advance all particles by one window under fresh perturbations of the network.

        Args:
            network: Network with the meta-parameters θ; not changed.
            iteration: Index of the window; what is drawn depends on it and the seed alone.

        Returns:
            Result of the window; its gradient is 0 where it is not finite.
        """
        particles, choices = self.particles, self.particles.training.steps
        generators = particles.generators(iteration)
        theta = {name: p.detach() for name, p in network.named_parameters()}
        drawn = [pes.perturbations(theta, 1, self.sigma, generator) for generator in generators]
        noise = {name: torch.cat([each[name] for each in drawn]) for name in theta}
        perturbed = network.functional(pes.antithetic(theta, noise))
        chosen = torch.randint(len(choices), (), generator=seeded(self._seed, iteration))
        losses, done = [], []
        for _ in range(self.truncation):
            losses.append(particles.round(perturbed, choices[int(chosen)], generators))
            done.append(particles.restart_finished(generators))
        loss = self._clip(torch.stack(losses))
        objective = loss if self.log_floor is None else (loss + self.log_floor).log()
        estimate = self._estimate(objective, torch.stack(done).to(loss.device), noise)
        self._accumulator = estimate.accumulator
        gradient = {name: g.nan_to_num(0, 0, 0) for name, g in estimate.gradient.items()}
        return Window(gradient, loss.mean().item(), loss.numel())

    def _estimate(self, objective: Tensor, done: Tensor, noise: Tensors) -> pes.Estimate:
        loss_pos, loss_neg = objective.chunk(2, dim=1)
        if self.kind == "truncated_es":
            self.particles.join_signs()
            return pes.truncated_es_gradient(loss_pos, loss_neg, noise, self.sigma)
        accumulator = self._accumulator or {name: torch.zeros_like(eps) for name, eps in noise.items()}
        if self.kind == "pes":
            return pes.pes_gradient(loss_pos, loss_neg, done, noise, accumulator, self.sigma)
        mask = torch.ones_like(done)  # a reset takes no round of its own
        return pes.published_pes_gradient(loss_pos, loss_neg, mask, done, noise, accumulator, self.sigma)

    def _clip(self, losses: Tensor) -> Tensor:
        limit = self.particles.task.max_loss
        return losses.nan_to_num(nan=limit).clamp(0, limit)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next window depends on, besides the network and the iteration."""
        return {**self.particles.state_dict(), "accumulator": self._accumulator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the `state_dict` of all particles."""
        particles = self.particles
        particles.load_state_dict(state)
        device = particles.task.device
        self._accumulator = {n: particles.part_here(t).to(device, copy=True) for n, t in state["accumulator"].items()}
