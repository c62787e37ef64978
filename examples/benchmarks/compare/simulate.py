"""Training runs in one process: K simulated workers, with many settings and seeds side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from examples.benchmarks.compare.clients import Shared
from examples.benchmarks.compare.methods import PARALLEL, Method, Parallel, Setting, outer
from examples.benchmarks.report import UsageError
from lightning_lopt.controller import Controller
from lightning_lopt.meta.base import Batch, DataTask, Tensors
from lightning_lopt.meta.local import LocalOptimizer, half_cosine
from lightning_lopt.meta.simulation import Simulation
from lightning_lopt.meta.unroll import SGD
from lightning_lopt.network import AdaMLP

LOSS_SAMPLES = 1024
LOSS_RUNS = 64  # runs whose losses are computed together, which bounds the memory
GROUP_BYTES = 1 << 27  # largest data of one local step, and parameters of the workers, of runs side by side


@dataclass(frozen=True)
class Experiment:
    """Settings that all methods share.

    Attributes:
        num_workers: Number of workers, K >= 1.
        local_steps: Number of local steps per round, H >= 1.
        num_rounds: Number of rounds of each run, >= 1.
        optimizer: Local optimizer of the workers.
        decay: Whether γ falls to 0 along a cosine.

    Raises:
        ValueError: An argument is out of its range.
    """

    num_workers: int = 8
    local_steps: int = 4
    num_rounds: int = 200
    optimizer: LocalOptimizer = SGD
    decay: bool = False

    def __post_init__(self) -> None:
        for name in ("num_workers", "local_steps", "num_rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}.")

    def factor(self, round_idx: int) -> float:
        """Factor of γ in a round."""
        return half_cosine(round_idx, self.num_rounds) if self.decay else 1.0


class Runs(NamedTuple):
    """Measurements of `simulate`, for all settings and seeds.

    Attributes:
        losses: Loss of the global weights on a fixed sample of the training data, in nats, before the first round and
            after each, [settings, seeds, num_rounds + 1].
        left_out: Number of workers that the rounds left out, [settings, seeds].
        test_losses: Losses on a fixed sample of the test data, of the same shape; None without test data.
    """

    losses: Tensor
    left_out: Tensor
    test_losses: Tensor | None = None


def _method(
    particles: Sequence[Setting], task: DataTask, anchor: Tensors, experiment: Experiment, weights: AdaMLP | Controller
) -> Method:
    name = particles[0].method
    if name in PARALLEL:
        return Parallel(task, anchor, PARALLEL[name])
    return Simulation(task, anchor, experiment.num_workers, outer(particles, anchor, weights), experiment.optimizer)


@torch.no_grad()
def simulate(
    data: Shared,
    group: Sequence[Setting],
    seeds: Sequence[int],
    experiment: Experiment,
    weights: AdaMLP | Controller,
    test: DataTask | None = None,
) -> Runs:
    """Train with every setting and seed; a seed fixes the initial weights and the data for all settings.

    Args:
        data: Task and data of the workers.
        group: Settings of one method.
        seeds: Seeds of the runs.
        experiment: Settings that all methods share.
        weights: Network of the method ``"learned"``, or controller of the method ``"controlled"``.
        test: Test data of the task.
    """
    task, num_workers = data.task, experiment.num_workers
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    starts = [task.init(1, generator) for generator in generators]
    anchor = {name: _tile([start[name] for start in starts], len(group)) for name in starts[0]}
    particles = [setting for setting in group for _ in seeds]
    rates = torch.tensor([setting.local_lr for setting in particles], dtype=task.dtype, device=task.device)
    method = _method(particles, task, anchor, experiment, weights)

    def batches() -> Iterator[Batch]:
        drawn = [data.draw(experiment.local_steps, num_workers, generator) for generator in generators]
        for places in torch.stack(drawn, 1):  # of a local step, [seeds, K]
            batch = task.read(places.flatten())
            yield tuple(part.repeat(len(group), *[1] * (part.dim() - 1)) for part in batch)

    tasks = [data.whole, test] if test else [data.whole]
    losses = [[_losses(each, anchor) for each in tasks]]
    for round_idx in range(experiment.num_rounds):
        rounds = torch.full((len(particles),), round_idx, device=task.device)
        method.round(batches(), rates * experiment.factor(round_idx), rounds)
        losses.append([_losses(each, anchor) for each in tasks])
    shape = (len(group), len(seeds))
    curves = [torch.stack(of_task, 1).unflatten(0, shape) for of_task in zip(*losses, strict=True)]
    return Runs(curves[0], torch.tensor(method.left_out).unflatten(0, shape), curves[1] if test else None)


def _losses(task: DataTask, anchor: Tensors) -> Tensor:
    """Loss of each run on the same sample, [P]."""
    count = len(next(iter(anchor.values())))
    sample = task.windows(torch.zeros(1, dtype=torch.long), min(LOSS_SAMPLES, len(task.data[0])))
    losses = []
    for start in range(0, count, LOSS_RUNS):
        params = {name: a[start : start + LOSS_RUNS] for name, a in anchor.items()}
        size = min(LOSS_RUNS, count - start)
        losses.append(task.loss(params, tuple(part.expand(size, *part.shape[1:]) for part in sample)))
    return torch.cat(losses)


def _tile(tensors: Sequence[Tensor], times: int) -> Tensor:
    """Repeat the tensors of all seeds, each [n, *], for every setting, [settings * seeds * n, *]."""
    joined = torch.cat(list(tensors))
    return joined.repeat(times, *[1] * (joined.dim() - 1))


def groups(task: DataTask, all_settings: Sequence[Setting], num_runs: int) -> Iterator[Sequence[Setting]]:
    """Split settings of one method into groups that fit into memory; `num_runs` is workers times seeds."""
    batch = task.read(torch.zeros(1, dtype=torch.long))
    params = task.init(1, torch.Generator())
    largest = max(sum(part.nbytes for part in batch), sum(p.nbytes for p in params.values()))
    size = max(1, GROUP_BYTES // (num_runs * largest))
    for start in range(0, len(all_settings), size):
        yield all_settings[start : start + size]
