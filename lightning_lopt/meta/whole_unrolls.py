"""Whole unrolls, side by side, for estimators that perturb the meta-parameters once for all rounds of an unroll."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lopt.meta.base import AbstractTask, Tensors
from lightning_lopt.meta.local import LocalTraining
from lightning_lopt.meta.outer import SimulatedOuterStep
from lightning_lopt.meta.simulation import Simulation

SAMPLE_BATCHES = 24  # on which the loss of the global weights is taken
FINAL_ROUNDS = 3
SHORTEST = 10  # rounds, however many steps they take
LOG_FLOOR = 1e-3
LOCAL_WEIGHT = 0.3


class Horizon(NamedTuple):
    """Size of an unroll.

    Attributes:
        local_steps: Number of local steps H.
        num_workers: Number of workers K.
        num_rounds: Number of rounds T.
    """

    local_steps: int
    num_workers: int
    num_rounds: int


@dataclass(frozen=True)
class Horizons:
    """Horizons that unrolls of a task draw, each choice equally likely.

    Args:
        num_rounds: Choices of the number of rounds T, each >= 1.
        step_factors: Choices of the factor of the task's own H, each >= 1.
        num_workers: Choices of K, each >= 1, for half of the unrolls, the others having the task's own; none for all.
        max_steps: Bound on T·H·max(1, K/4), to which T is lowered, but not below 10.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> fixed = Horizons(num_rounds=(25,), step_factors=(1,), num_workers=())
        >>> fixed.draw(LocalTraining(num_workers=4, local_steps=8), torch.Generator())
        Horizon(local_steps=8, num_workers=4, num_rounds=25)
    """

    num_rounds: Sequence[int] = (12, 25, 40, 60, 60, 100)
    step_factors: Sequence[int] = (1, 1, 1, 2, 4, 4)
    num_workers: Sequence[int] = (2, 4, 8)
    max_steps: int = 1000

    def __post_init__(self) -> None:
        for name in ("num_rounds", "step_factors", "num_workers"):
            values = getattr(self, name)
            if not all(value >= 1 for value in values) or not (values or name == "num_workers"):
                raise ValueError(f"{name} must be choices of at least 1, not {values}.")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, not {self.max_steps}.")

    def draw(self, training: LocalTraining, generator: torch.Generator) -> Horizon:
        """Draw the horizon of an unroll.

        Args:
            training: Local training of the task; the first of several H is its own.
            generator: Generator on the CPU.
        """

        def one_of(choices: Sequence[int]) -> int:
            return choices[int(torch.randint(len(choices), (), generator=generator))]

        local_steps = training.steps[0] * one_of(self.step_factors)
        own = not self.num_workers or one_of((0, 1))
        num_workers = training.num_workers if own else one_of(self.num_workers)
        most = max(SHORTEST, self.max_steps // (local_steps * max(1, num_workers // 4)))
        return Horizon(local_steps, num_workers, min(one_of(self.num_rounds), most))


@torch.no_grad()
def whole_unrolls(
    task: AbstractTask,
    training: LocalTraining,
    horizon: Horizon,
    local_lr: Tensor,
    copies: int,
    outer: Callable[[Tensors], SimulatedOuterStep],
    generator: torch.Generator,
) -> Tensor:
    r"""Run each of R runs several times, from the same start and on the same data.

    .. math:: L = \log(\ell_T + 10^{-3}) + 0.3 \operatorname{mean}_t \log(\ell_t + 10^{-3})

    where :math:`\ell_T` is the loss of the global parameters on a sample, over the last three rounds, and
    :math:`\ell_t` the workers' mean loss in round t.

    Args:
        task: Task that is trained on.
        training: Local training, of which the optimizer and the start are taken.
        horizon: H, K and T of all runs.
        local_lr: Local learning rate γ of each run in each round, [R, T].
        copies: Number of copies of each run.
        outer: Function that makes the outer step for anchors {[copies · R, *S]}: the first copy of all runs, then the
            second, and so on.
        generator: Generator of all that is drawn, on the CPU.

    Returns:
        Objective L, [copies, R].
    """
    count, device = len(local_lr), task.device
    starts = [training.init(task, generator) for _ in range(count)]
    anchor = {
        name: torch.cat([start[name] for start in starts]).repeat(copies, *[1] * (p.dim() - 1))
        for name, p in starts[0].items()
    }
    simulation = Simulation(task, anchor, horizon.num_workers, outer(anchor), training.optimizer)
    sample = (part.flatten(0, 1) for part in task.batch(SAMPLE_BATCHES, generator))
    sample = tuple(part.expand(copies * count, *part.shape) for part in sample)
    rates = local_lr.to(device, task.dtype).repeat(copies, 1)
    final, local = [], []
    for t in range(horizon.num_rounds):
        draws = [task.draw(count * horizon.num_workers, generator) for _ in range(horizon.local_steps)]
        batches = (task.read(drawn.repeat(copies, *[1] * (drawn.dim() - 1)).to(device)) for drawn in draws)
        local.append(simulation.round(batches, rates[:, t], torch.full((copies * count,), t, device=device)))
        if t >= horizon.num_rounds - FINAL_ROUNDS:
            final.append(task.loss(anchor, sample))

    def bounded(losses: list[Tensor]) -> Tensor:
        return torch.stack(losses).nan_to_num(nan=task.max_loss, posinf=task.max_loss).clamp(0, task.max_loss)

    objective = (bounded(final).mean(0) + LOG_FLOOR).log()
    objective += LOCAL_WEIGHT * (bounded(local) + LOG_FLOOR).log().mean(0)
    return objective.view(copies, count)
