"""Simulated training: many runs at once, each of K workers that train from an anchor, and of an outer step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_lopt.functional.outliers import Norms, OutlierFilter
from lightning_lopt.meta.base import AbstractTask, Batch, Tensors
from lightning_lopt.meta.local import LocalOptimizer, LocalOptimizerState
from lightning_lopt.meta.outer import SimulatedOuterStep, SimulatedRound
from lightning_lopt.meta.unroll import SGD, local_round, repeat_for_workers


class Simulation:
    """Rounds of P runs of a task, side by side; workers that diverge are left out, whatever the outer step.

    Args:
        task: Task that the workers train on.
        anchor: Global parameters of each run, {[P, *S]}, moved in place.
        num_workers: Number of workers K >= 1 of each run.
        outer: Outer step that moves the anchors.
        optimizer: Optimizer of the workers; its state is kept from round to round.

    Attributes:
        anchor: Global parameters of each run, {[P, *S]}.
        local: State of the workers' optimizers, of P * K replicas.
        filters: Choice of the workers that each run leaves out.

    Example:
        >>> from lightning_lopt.meta import ImageMLP
        >>> from lightning_lopt.meta.outer import average_anchors
        >>> task = ImageMLP(torch.rand(50, 4, 4), torch.arange(50) % 5, hidden=(8,), batch_size=10)
        >>> generator = torch.Generator().manual_seed(0)
        >>> simulation = Simulation(task, task.init(3, generator), num_workers=2, outer=average_anchors)
        >>> batches = [task.batch(3 * 2, generator) for _ in range(4)]
        >>> simulation.round(batches, local_lr=torch.full((3,), 0.1), round_idx=torch.zeros(3)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        task: AbstractTask,
        anchor: Tensors,
        num_workers: int,
        outer: SimulatedOuterStep,
        optimizer: LocalOptimizer = SGD,
    ) -> None:
        self.task = task
        self.anchor = anchor
        self.num_workers = num_workers
        self.outer = outer
        self.optimizer = optimizer
        self.local = optimizer.init(repeat_for_workers(anchor, num_workers))
        self.filters = [self._new_filter() for _ in range(len(self))]

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(next(iter(self.anchor.values())))

    @property
    def left_out(self) -> list[int]:
        """Number of workers that the rounds of each run left out so far."""
        return [each.num_left_out for each in self.filters]

    @torch.no_grad()
    def round(self, batches: Iterable[Batch], local_lr: Tensor, round_idx: Tensor) -> Tensor:
        """Simulate one round of every run.

        Args:
            batches: Batches of the H local steps, each tensor [P * K, B, *], the workers of a run side by side.
            local_lr: Local learning rate γ of each run in this round, [P].
            round_idx: Index of the round, from 0, [P].

        Returns:
            Loss of each run, mean over workers and local steps, each before its step, [P].
        """
        workers, losses = local_round(
            self.task, self.anchor, batches, local_lr, self.num_workers, self.optimizer, self.local
        )
        skipped = leave_out(self.filters, self.anchor, workers, self.local)
        retained = self.optimizer.retained_momentum(len(losses))
        self.outer(self.anchor, SimulatedRound(workers, round_idx, local_lr, len(losses), retained, skipped))
        return losses.mean(0).mean(1)

    def restart(self, runs: Sequence[int], starts: Tensors) -> None:
        """Begin some runs anew, but for the memory of the outer step.

        Args:
            runs: Indices of the runs.
            starts: Their global parameters, {[len(runs), *S]}.
        """
        for name, start in starts.items():
            self.anchor[name][list(runs)] = start
        self.local.forget([run * self.num_workers + k for run in runs for k in range(self.num_workers)])
        for run in runs:
            self.filters[run] = self._new_filter()

    @property
    def norms(self) -> dict[str, Tensor]:
        """Norms that the filters remember, float64: ``"last"`` [P, K] and ``"peak"`` [P]; may be set."""
        last, peak = zip(*(each.norms for each in self.filters), strict=True)
        return {name: torch.tensor(norms, dtype=torch.float64) for name, norms in (("last", last), ("peak", peak))}

    @norms.setter
    def norms(self, norms: dict[str, Tensor]) -> None:
        for each, last, peak in zip(self.filters, norms["last"].tolist(), norms["peak"].tolist(), strict=True):
            each.norms = Norms(last, peak)

    def _new_filter(self) -> OutlierFilter:
        return OutlierFilter(Norms([0.0] * self.num_workers))


def leave_out(
    filters: Sequence[OutlierFilter], anchor: Tensors, workers: Tensors, local: LocalOptimizerState
) -> list[int]:
    """Leave outliers out of a round, as the strategies do: mend its workers and their optimizers' states in place.

    They take the value of the others' mean and forget their optimizer's state. If a run leaves out all of its workers,
    they get the anchor.

    Args:
        filters: Choice of the workers that each run leaves out.
        anchor: Global parameters, {[P, *S]}.
        workers: Parameters of the workers, {[P, K, *S]}.
        local: State of the workers' optimizers, of P * K replicas.

    Returns:
        Runs all of whose workers are left out, whose outer step is to be skipped.
    """
    squared = [_squared_norms(a.unsqueeze(1) - workers[name]) for name, a in anchor.items()]
    skipped = []
    for run, norms in enumerate(torch.stack(squared).sum(0).sqrt().tolist()):
        left_out = filters[run].outliers(norms)
        filters[run].update(norms, left_out)
        kept = [k for k in range(len(norms)) if k not in left_out]
        if not kept:
            skipped.append(run)
        if left_out:
            for name, w in workers.items():
                w[run, left_out] = w[run, kept].mean(0) if kept else anchor[name][run]
            local.forget([run * len(norms) + k for k in left_out])
    return skipped


def _squared_norms(tensor: Tensor) -> Tensor:
    """[P, K, *S] to [P, K]."""
    return torch.linalg.vector_norm(tensor.reshape(*tensor.shape[:2], -1), dim=2).square()
