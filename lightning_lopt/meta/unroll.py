"""The two halves of a simulated round: K workers take H local steps from the anchor, then the learned outer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_lopt.functional import learned
from lightning_lopt.functional.ada import AdaState
from lightning_lopt.functional.learned import Network
from lightning_lopt.functional.model import ModelTensor
from lightning_lopt.functional.updates import UPDATES
from lightning_lopt.meta.base import AbstractTask, Batch, Tensors
from lightning_lopt.meta.local import LocalOptimizer, LocalOptimizerState

State = TypeVar("State")
SGD = LocalOptimizer("sgd")


def repeat_for_workers(anchor: Tensors, num_workers: int) -> Tensors:
    """Give each of K workers a copy of its particle's anchor: {[P, *S]} to {[P * K, *S]}."""
    return {name: a.repeat_interleave(num_workers, 0) for name, a in anchor.items()}


@torch.no_grad()
def local_round(
    task: AbstractTask,
    anchor: Tensors,
    batches: Iterable[Batch],
    local_lr: Tensor,
    num_workers: int,
    optimizer: LocalOptimizer = SGD,
    state: LocalOptimizerState | None = None,
) -> tuple[Tensors, Tensor]:
    """Let K workers take H local steps from the anchor.

    Args:
        task: Task that the workers train on.
        anchor: Global parameters, {[P, *S]}; not changed.
        batches: Batches of the H steps, each tensor [P * K, B, *], the workers of a particle side by side.
        local_lr: Local learning rate γ of each particle, [P].
        num_workers: Number of workers K >= 1.
        optimizer: Optimizer of the workers.
        state: State of the optimizer, of P * K replicas, changed in place; None starts it anew in this round.

    Returns:
        Parameters of the workers, {[P, K, *S]}, and the loss of each before each of its steps, [H, P, K].
    """
    workers = repeat_for_workers(anchor, num_workers)
    worker_lr = local_lr.repeat_interleave(num_workers)
    state = optimizer.init(workers) if state is None else state
    losses = torch.stack([optimizer.step(task, workers, batch, worker_lr, state) for batch in batches])
    shape = (-1, num_workers)
    return {name: w.unflatten(0, shape) for name, w in workers.items()}, losses.unflatten(1, shape)


def zero_states(anchor: Tensors, update: str) -> dict[str, AdaState]:
    """Create the accumulators of anchors before the first round.

    Args:
        anchor: Global parameters, {[P, *S]}.
        update: Kind of update of the networks, a key of `UPDATES`.
    """
    init = UPDATES[update].init_state
    return {name: init(tuple(a.shape[1:]), len(a), a.dtype, a.device) for name, a in anchor.items()}


@torch.no_grad()
def outer_step(
    anchor: Tensors,
    workers: Tensors,
    states: dict[str, AdaState],
    network: Network,
    round_idx: Tensor,
    local_scale: Tensor | None = None,
    skipped: Sequence[int] = (),
    retained_momentum: float = 0.0,
) -> None:
    r"""Apply the learned optimizer to the workers' pseudo-gradients, in place on `anchor` and `states`.

    .. math:: g = a - \mathrm{mean}_k\, y_k, \qquad a \leftarrow \mathrm{Outer}(a, g)

    Args:
        anchor: Global parameters, {[P, *S]}.
        workers: Parameters of the workers, {[P, K, *S]}.
        states: Accumulators of the anchors.
        network: Meta-parameters of each particle.
        round_idx: Index of the round, from 0, [P].
        local_scale: Local learning rate times local steps, γH, [P]; None where it does not change.
        skipped: Particles that take no step.
        retained_momentum: Share of their momentum that the workers retain over a round.
    """

    def step(tensors: list[ModelTensor[AdaState]]) -> None:
        learned.step_model(tensors, [network] * len(tensors), network.update)

    scale = torch.zeros_like(round_idx, dtype=torch.float) if local_scale is None else local_scale
    several = network.num_inputs > 1
    step_anchors(anchor, workers, states, step, round_idx, scale, skipped, retained_momentum, worker_grads=several)


@torch.no_grad()
def step_anchors(
    anchor: Tensors,
    workers: Tensors,
    states: Mapping[str, State],
    step: Callable[[list[ModelTensor[State]]], None],
    round_idx: Tensor,
    local_scale: Tensor,
    skipped: Sequence[int] = (),
    retained_momentum: float = 0.0,
    worker_grads: bool = False,
) -> None:
    """Apply a step of whole models to the workers' pseudo-gradients, in place on `anchor` and `states`.

    Args:
        anchor: Global parameters, {[P, *S]}.
        workers: Parameters of the workers, {[P, K, *S]}.
        states: Memory of each anchor.
        step: Step of the models, in place.
        round_idx: Index of the round, from 0, [P].
        local_scale: Local learning rate times local steps, γH, [P].
        skipped: Particles that take no step.
        retained_momentum: Share of their momentum that the workers retain over a round.
        worker_grads: Whether the step needs the pseudo-gradient of each worker.
    """
    memory = [*anchor.values(), *(tensor for state in states.values() for tensor in vars(state).values())]
    before = [tensor[list(skipped)] for tensor in memory] if skipped else []
    retained = torch.full(round_idx.shape, retained_momentum, dtype=torch.float64, device=round_idx.device)
    tensors = [
        ModelTensor(
            param=a,
            grad=a - workers[name].mean(1),
            state=states[name],
            round_idx=round_idx,
            local_scale=local_scale,
            retained_momentum=retained,
            worker_grads=a.unsqueeze(1) - workers[name] if worker_grads else None,
        )
        for name, a in anchor.items()
    ]
    step(tensors)
    if skipped:
        for tensor, values in zip(memory, before, strict=True):
            tensor[list(skipped)] = values
