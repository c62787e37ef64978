"""Meta-gradients of one task: particles that live on from window to window."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.functional import pes
from lightning_lopt.functional.learned import Network
from lightning_lopt.meta.tasks import ImageMLP, Tensors
from lightning_lopt.meta.truncation import LogUniform
from lightning_lopt.meta.unroll import local_round, outer_step, zero_states
from lightning_lopt.network import AdaMLP

MAX_LOSS = 1.5  # losses are clipped to this multiple of ln(classes), the loss of a uniform guess
DECAY_SHARE = 0.5  # of the unrolls whose local learning rate falls to 0, where it is drawn from a range


class Window(NamedTuple):
    """Result of one window: the meta-gradient {[*S]}, the mean loss, and the rounds simulated, all replicas counted."""

    gradient: Tensors
    loss: float
    rounds: int


def seeded(*counters: int | str) -> torch.Generator:
    """A generator that depends on nothing but its arguments, so that no random state has to be saved."""
    digest = hashlib.sha256(repr(counters).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class PESEstimator:
    """The particles of one task, and PES windows over them.

    Args:
        task: what is trained.
        num_workers: K >= 1.
        local_steps: H >= 1, or several, of which each window draws one.
        local_lr: γ > 0, or (low, high): drawn log-uniformly for each unroll, and half of the unrolls decay it to 0
            along a cosine.
        num_particles: P >= 1 antithetic pairs.
        truncation: W >= 1, rounds per window.
        unroll_length: T, drawn at each start of an unroll.
        sigma: σ > 0, standard deviation of the perturbations.
        seed: of everything drawn.

    Raises:
        ValueError: an argument out of its range, or a checkpoint of another task.
    """

    def __init__(
        self,
        task: ImageMLP,
        num_workers: int,
        local_steps: int | Sequence[int],
        local_lr: float | tuple[float, float],
        num_particles: int,
        truncation: int,
        unroll_length: LogUniform,
        sigma: float,
        seed: int,
    ) -> None:
        self.task = task
        self.num_workers = num_workers
        self.local_steps = [local_steps] if isinstance(local_steps, int) else list(local_steps)
        self.local_lr = (local_lr, local_lr) if isinstance(local_lr, (int, float)) else tuple(local_lr)
        self.num_particles = num_particles
        self.truncation = truncation
        self.unroll_length = unroll_length
        self.sigma = sigma
        self.seed = seed
        self._check()
        generator = seeded(seed, "start")
        lengths = unroll_length.draw_first(num_particles, generator)
        self._anchor = self._both_signs(task.init(num_particles, generator))
        self._states = zero_states(self._anchor)
        self._round_idx = torch.zeros(num_particles, dtype=torch.long)
        self._length = lengths
        self._base_lr, self._decays = self._draw_lr(num_particles, generator)
        self._accumulator: Tensors = {}

    def _check(self) -> None:
        for name in ("num_workers", "num_particles", "truncation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not self.local_steps or min(self.local_steps) < 1:
            raise ValueError(f"local_steps must be at least 1, not {self.local_steps}.")
        if len(self.local_lr) != 2 or not 0 < self.local_lr[0] <= self.local_lr[1] < math.inf:
            raise ValueError(f"local_lr must be positive, or a range (low, high), not {self.local_lr}.")
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma must be positive, not {self.sigma}.")

    @staticmethod
    def _both_signs(tensors: Tensors) -> Tensors:
        return {name: torch.cat([t, t]) for name, t in tensors.items()}

    def _draw_lr(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Starting γ, and whether it decays, of `count` unrolls."""
        low, high = self.local_lr
        uniform = torch.rand(2, count, generator=generator, dtype=torch.float64)
        decays = (uniform[1] < DECAY_SHARE) if low < high else torch.zeros(count, dtype=torch.bool)
        return low * (high / low) ** uniform[0], decays

    def _current_lr(self) -> Tensor:
        progress = self._round_idx / self._length
        factor = torch.where(self._decays, 0.5 * (1 + torch.cos(math.pi * progress)), 1.0)
        return self._base_lr * factor

    def window(self, network: AdaMLP, iteration: int) -> Window:
        """Advance all particles by one window under fresh perturbations of the network.

        Args:
            network: meta-parameters θ; not changed.
            iteration: counts the windows; what is drawn depends on it and the seed alone.

        Returns:
            The meta-gradient, with 0 where it is not finite.
        """
        generator = seeded(self.seed, iteration)
        theta = {name: p.detach() for name, p in network.named_parameters()}
        noise = pes.perturbations(theta, self.num_particles, self.sigma, generator)
        perturbed = network.functional(pes.antithetic(theta, noise))
        local_steps = self.local_steps[int(torch.randint(len(self.local_steps), (), generator=generator))]
        losses, done = [], []
        for _ in range(self.truncation):
            losses.append(self._round(perturbed, local_steps, generator))
            done.append(self._restart_finished(generator))
        loss = self._clip(torch.stack(losses))
        accumulator = self._accumulator or {name: torch.zeros_like(eps) for name, eps in noise.items()}
        flags = torch.stack(done).to(loss.device)
        loss_pos, loss_neg = loss.chunk(2, dim=1)
        estimate = pes.pes_gradient(loss_pos, loss_neg, flags, noise, accumulator, self.sigma)
        self._accumulator = estimate.accumulator
        gradient = {name: g.nan_to_num(0, 0, 0) for name, g in estimate.gradient.items()}
        return Window(gradient, loss.mean().item(), loss.numel())

    def _round(self, network: Network, local_steps: int, generator: torch.Generator) -> Tensor:
        """One round of every replica; both signs of a particle see the same data. Returns the losses [2P]."""
        device = self.task.images.device
        local_lr = self._current_lr().to(self.task.images).repeat(2)
        count = self.num_particles * self.num_workers
        batches = (self._doubled(self.task.batch(count, generator)) for _ in range(local_steps))
        workers, loss = local_round(self.task, self._anchor, batches, local_lr, self.num_workers)
        outer_step(self._anchor, workers, self._states, network, self._round_idx.to(device).repeat(2))
        self._round_idx += 1
        return loss

    @staticmethod
    def _doubled(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return torch.cat([images, images]), torch.cat([labels, labels])

    def _clip(self, losses: Tensor) -> Tensor:
        limit = MAX_LOSS * math.log(self.task.num_classes)
        return losses.nan_to_num(nan=limit).clamp(0, limit)

    def _restart_finished(self, generator: torch.Generator) -> Tensor:
        """Start a new unroll where one is complete; returns where, [P] bool."""
        done = self._round_idx >= self._length
        count = int(done.sum())
        if count:
            replicas = done.repeat(2).to(self.task.images.device)
            for name, fresh in self._both_signs(self.task.init(count, generator)).items():
                self._anchor[name][replicas] = fresh
                state = self._states[name]
                for accumulator in (state.momentum, state.second, state.row, state.col):
                    accumulator[replicas] = 0
            self._round_idx[done] = 0
            self._length[done] = self.unroll_length.draw(count, generator)
            self._base_lr[done], self._decays[done] = self._draw_lr(count, generator)
        return done

    def state_dict(self) -> dict[str, Any]:
        """All that the next window depends on, besides the network and the iteration."""
        return {
            "task": repr(self.task),
            "anchor": self._anchor,
            "states": {name: vars(state) for name, state in self._states.items()},
            "accumulator": self._accumulator,
            **{name: getattr(self, f"_{name}") for name in ("round_idx", "length", "base_lr", "decays")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        if state["task"] != repr(self.task) or len(state["length"]) != self.num_particles:
            raise ValueError(
                f"The checkpoint is of {state['task']} with {len(state['length'])} particles, but this run is of "
                f"{self.task} with {self.num_particles}. Resume with the arguments of that run, or start anew."
            )
        device = self.task.images.device

        def moved(tensors: Tensors) -> Tensors:
            return {name: t.to(device, copy=True) for name, t in tensors.items()}

        self._anchor = moved(state["anchor"])
        for name, accumulators in state["states"].items():
            vars(self._states[name]).update(moved(accumulators))
        self._accumulator = moved(state["accumulator"])
        for name in ("round_idx", "length", "base_lr", "decays"):
            setattr(self, f"_{name}", state[name].clone().cpu())
