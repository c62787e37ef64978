"""Comparison of a network with averaging and DiLoCo on a task, from the same starts and on the same data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_lopt.meta.base import AbstractTask, Tensors
from lightning_lopt.meta.local import LocalTraining, half_cosine
from lightning_lopt.meta.outer import (
    SimulatedOuterStep,
    average_anchors,
    base_step,
    learned_step,
    optimizer_step,
    views,
)
from lightning_lopt.meta.particles import seeded
from lightning_lopt.meta.simulation import Simulation
from lightning_lopt.network import AdaMLP

SAMPLE_BATCHES = 32  # on which the loss of the global weights is taken
FINAL_ROUNDS = 5


@dataclass(frozen=True)
class Evaluation:
    """Runs of a task, whose starts, data and local learning rates are fixed by the seed.

    Args:
        name: Name in the log, where each evaluation needs its own.
        task: Task that is trained on.
        training: Local training; of several H the middle one is taken.
        num_rounds: Number of rounds of each run, >= 1.
        num_runs: Number of runs N >= 1, which differ in all that is drawn.
        seed: Seed of everything drawn.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> from lightning_lopt.meta import ImageMLP
        >>> task = ImageMLP(torch.rand(50, 4, 4), torch.arange(50) % 5, hidden=(8,), batch_size=10)
        >>> evaluation = Evaluation("small", task, LocalTraining(2, 4, 0.1), num_rounds=6, num_runs=2)
        >>> evaluation.losses(AdaMLP.bundled()).shape
        torch.Size([7, 2])
    """

    name: str
    task: AbstractTask
    training: LocalTraining
    num_rounds: int = 100
    num_runs: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_rounds < 1 or self.num_runs < 1:
            raise ValueError(
                f"An evaluation needs at least one round and one run, not {self.num_rounds} and {self.num_runs}."
            )

    @property
    def _local_steps(self) -> int:
        return self.training.steps[len(self.training.steps) // 2]

    def losses(self, network: AdaMLP) -> Tensor:
        """Compute the loss of the global weights on a fixed sample before the first round and after each.

        Args:
            network: Network that makes the outer step.

        Returns:
            Losses, [rounds + 1, N].
        """
        return self.losses_with(lambda anchor: learned_step(anchor, [network]))

    @cached_property
    def baselines(self) -> dict[str, Tensor]:
        """Losses with averaging (Local SGD) and with DiLoCo's Nesterov momentum (0.7, 0.9)."""

        def diloco(anchor: Tensors) -> SimulatedOuterStep:
            groups = [{"params": params} for params in views(anchor)]
            return optimizer_step(torch.optim.SGD(groups, lr=0.7, momentum=0.9, nesterov=True))

        return {"averaging": self.losses_with(lambda anchor: average_anchors), "diloco": self.losses_with(diloco)}

    @cached_property
    def base_step(self) -> Tensor:
        """Losses with the blended Nesterov step made by hand."""
        return self.losses_with(base_step)

    def final(self, losses: Tensor) -> float:
        """Average over the last 5 rounds and the runs; a diverged one counts as the task's `max_loss`."""
        return self.finals(losses).mean().item()

    def finals(self, losses: Tensor) -> Tensor:
        """Average over the last 5 rounds, [N]."""
        limit = self.task.max_loss
        return losses[-FINAL_ROUNDS:].nan_to_num(nan=limit).clamp(max=limit).mean(0)

    @torch.no_grad()
    def losses_with(self, outer: Callable[[Tensors], SimulatedOuterStep]) -> Tensor:
        """Compute the same losses with any outer step.

        Args:
            outer: Function that makes the step for the anchors {[N, *S]} of the runs.
        """
        task, training = self.task, self.training
        generators = [seeded(self.seed, "evaluation", index) for index in range(self.num_runs)]
        starts = [training.init(task, generator) for generator in generators]
        anchor = {name: torch.cat([start[name] for start in starts]) for name in starts[0]}
        base_lr, decays = torch.tensor([training.draw_lr(generator) for generator in generators]).T
        sample = task.batch(SAMPLE_BATCHES, seeded(self.seed, "sample"))
        sample = tuple(part.flatten(0, 1).expand(self.num_runs, -1, *part.shape[2:]) for part in sample)
        simulation = Simulation(task, anchor, training.num_workers, outer(anchor), training.optimizer)
        losses = [task.loss(anchor, sample)]
        for round_idx in range(self.num_rounds):
            cosine = half_cosine(round_idx, self.num_rounds)
            rates = (base_lr * torch.where(decays.bool(), cosine, 1.0)).to(task.device, task.dtype)
            drawn = torch.stack([task.draw(self._local_steps * training.num_workers, g) for g in generators])
            places = drawn.unflatten(1, (self._local_steps, -1)).unbind(1)
            batches = (task.read(place.flatten(0, 1).to(task.device)) for place in places)
            simulation.round(batches, rates, torch.full((self.num_runs,), round_idx, device=task.device))
            losses.append(task.loss(anchor, sample))
        return torch.stack(losses)
