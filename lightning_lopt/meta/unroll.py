"""One round, simulated: K workers take H local steps from the anchor, then the outer step; all particles at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_lopt.functional import learned
from lightning_lopt.functional.ada import AdaState
from lightning_lopt.functional.damping import damping
from lightning_lopt.functional.learned import Network
from lightning_lopt.functional.updates import UPDATES
from lightning_lopt.meta.base import AbstractTask, Batch, Tensors
from lightning_lopt.meta.local import LocalOptimizer, LocalState

SGD = LocalOptimizer("sgd")


@torch.no_grad()
def local_round(
    task: AbstractTask,
    anchor: Tensors,
    batches: Iterable[Batch],
    local_lr: Tensor,
    num_workers: int,
    optimizer: LocalOptimizer = SGD,
    state: LocalState | None = None,
) -> tuple[Tensors, Tensor]:
    """Let K workers take H local steps from the anchor.

    Args:
        task: the model and its loss.
        anchor: global parameters, {[P, *S]}; not changed.
        batches: H batches, each tensor [P * K, B, *], the workers of a particle side by side.
        local_lr: γ of each particle, [P].
        num_workers: K >= 1.
        optimizer: of the workers.
        state: that of the optimizer, of P * K replicas, changed in place; None starts it anew in this round.

    Returns:
        The workers' parameters {[P, K, *S]}, and the loss, mean over workers and steps, each before its step, [P].
    """
    workers = {name: p.repeat_interleave(num_workers, 0) for name, p in anchor.items()}
    worker_lr = local_lr.repeat_interleave(num_workers)
    state = optimizer.init(workers) if state is None else state
    losses = [optimizer.step(task, workers, batch, worker_lr, state) for batch in batches]
    loss = torch.stack(losses).mean(0).unflatten(0, (-1, num_workers)).mean(1)
    return {name: w.unflatten(0, (-1, num_workers)) for name, w in workers.items()}, loss


def zero_states(anchor: Tensors, update: str) -> dict[str, AdaState]:
    """Accumulators before the first round, one per tensor, for a kind of update."""
    grams = UPDATES[update].relative
    return {name: AdaState.zeros(tuple(p.shape[1:]), len(p), p.dtype, p.device, grams) for name, p in anchor.items()}


@torch.no_grad()
def outer_step(
    anchor: Tensors,
    workers: Tensors,
    states: dict[str, AdaState],
    network: Network,
    round_idx: Tensor,
    local_scale: Tensor | None = None,
    skipped: Sequence[int] = (),
    carried: float = 0.0,
) -> None:
    r"""Apply the learned optimizer to the workers' pseudo-gradients, in place on `anchor` and `states`.

    .. math:: g = a - \mathrm{mean}_k\, y_k, \qquad a \leftarrow \mathrm{Outer}(a, g)

    Args:
        anchor: {[P, *S]}.
        workers: {[P, K, *S]}.
        states: the accumulators of `anchor`.
        network: meta-parameters of each particle.
        round_idx: [P], from 0.
        local_scale: γH of the round, [P]; None where it does not change.
        skipped: particles that take no step.
        carried: the share of their momentum that the workers keep over a round.
    """
    tensors = [*anchor.values(), *(part for state in states.values() for part in vars(state).values())]
    kept = [tensor[list(skipped)] for tensor in tensors] if skipped else []
    grads = {name: a - workers[name].mean(1) for name, a in anchor.items()}
    factor = None
    if UPDATES[network.update].relative:
        scale = torch.zeros_like(round_idx, dtype=torch.float) if local_scale is None else local_scale
        own = [states[name] for name in grads]
        factor = damping([*grads.values()], own, [round_idx] * len(grads), [scale] * len(grads))
    kept_by_workers = torch.full(round_idx.shape, carried, dtype=torch.float64, device=round_idx.device)
    for name, a in anchor.items():
        worker_grads = a.unsqueeze(1) - workers[name] if network.num_inputs > 1 else None
        learned.step(a, grads[name], states[name], network, round_idx, worker_grads, factor, kept_by_workers)
    if skipped:
        for tensor, before in zip(tensors, kept, strict=True):
            tensor[list(skipped)] = before
