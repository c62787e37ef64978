"""Simulation equals reality: two simulated workers against two processes that synchronise over gloo."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_lopt import AdaMLP, LearnedOptimizer, Rounds
from lightning_lopt.functional.learned import UPDATES
from lightning_lopt.meta.tasks import ImageMLP
from lightning_lopt.meta.unroll import local_round, outer_step, zero_states
from tests.processes import run_workers

NUM_WORKERS, LOCAL_STEPS, NUM_ROUNDS, LOCAL_LR = 2, 3, 5, 0.3


def make(update: str, inputs):
    """The task, the network, the start and all batches; the same wherever it is called."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(64, 10, generator=generator, dtype=torch.float64)
    task = ImageMLP(images, torch.arange(64) % 3, hidden=(7, 7), batch_size=4)
    network = AdaMLP(inputs=inputs, update=update, step_mult=0.1, exp_mult=0.1, seed=2).double()
    anchor = task.init(1, generator)
    batches = [[task.batch(NUM_WORKERS, generator) for _ in range(LOCAL_STEPS)] for _ in range(NUM_ROUNDS)]
    return task, network, anchor, batches


def simulated(update: str, inputs) -> dict[str, torch.Tensor]:
    task, network, anchor, batches = make(update, inputs)
    states, meta = zero_states(anchor), network.functional()
    for t, batches_of_round in enumerate(batches):
        local_lr = torch.tensor([LOCAL_LR], dtype=torch.float64)
        workers, _ = local_round(task, anchor, batches_of_round, local_lr, NUM_WORKERS)
        outer_step(anchor, workers, states, meta, torch.tensor([t]))
    return anchor


def real(rank: int, update: str, inputs) -> list[torch.Tensor]:
    task, network, anchor, batches = make(update, inputs)
    layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in pairwise(task.sizes)]
    for i, layer in enumerate(layers):
        layer.load_state_dict({"weight": anchor[f"layers.{i}.weight"][0], "bias": anchor[f"layers.{i}.bias"][0]})
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=LOCAL_LR)
    rounds = Rounds(model, optimizer, LOCAL_STEPS, partial(LearnedOptimizer, network=network))
    for images, labels in (batch for batches_of_round in batches for batch in batches_of_round):
        nn.functional.cross_entropy(model(images[rank]), labels[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
        rounds.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("inputs", ["mean", NUM_WORKERS])
@pytest.mark.parametrize("update", UPDATES)
def test_two_simulated_workers_equal_two_processes(update, inputs):
    wanted = simulated(update, inputs)
    start = make(update, inputs)[2]
    for parameters in run_workers(real, NUM_WORKERS, update, inputs):
        for name, p in zip(wanted, parameters, strict=True):
            torch.testing.assert_close(p, wanted[name][0], rtol=0, atol=1e-10)
            assert not torch.equal(p, start[name][0])
