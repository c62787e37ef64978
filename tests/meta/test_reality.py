"""Simulation equals reality: two simulated workers against two processes that synchronise over gloo."""

from __future__ import annotations

from functools import partial
from itertools import chain, pairwise

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from examples.benchmarks.compare.data import load_task
from lightning_lopt import AdaMLP, LearnedLocalSGD, LearnedOptimizer, Rounds
from lightning_lopt.functional.learned import UPDATES
from lightning_lopt.meta.local import MOMENTUM, LocalOptimizer
from lightning_lopt.meta.tasks import ImageMLP
from lightning_lopt.meta.unroll import local_round, outer_step, zero_states
from tests.processes import run_workers
from tests.strategies_support import trainer

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
    states, meta = zero_states(anchor, network.update), network.functional()
    for t, batches_of_round in enumerate(batches):
        local_lr = torch.tensor([LOCAL_LR], dtype=torch.float64)
        workers, _ = local_round(task, anchor, batches_of_round, local_lr, NUM_WORKERS)
        outer_step(anchor, workers, states, meta, torch.tensor([t]))
    return anchor


def mlp(task: ImageMLP, anchor) -> nn.Sequential:
    """A module with these parameters."""
    layers = [nn.Linear(a, b, dtype=task.dtype) for a, b in pairwise(task.sizes)]
    for i, layer in enumerate(layers):
        layer.load_state_dict({"weight": anchor[f"layers.{i}.weight"][0], "bias": anchor[f"layers.{i}.bias"][0]})
    return nn.Sequential(*chain.from_iterable((layer, nn.ReLU()) for layer in layers[:-1]), layers[-1])


def real(rank: int, update: str, inputs) -> list[torch.Tensor]:
    task, network, anchor, batches = make(update, inputs)
    model = mlp(task, anchor)
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


DIGITS_ROUNDS = 25


def digits():
    """Real data: the task, the start and the batches of all rounds."""
    task, generator = load_task("digits"), torch.Generator().manual_seed(3)
    anchor = task.init(1, generator)
    batches = [[task.batch(NUM_WORKERS, generator) for _ in range(LOCAL_STEPS)] for _ in range(DIGITS_ROUNDS)]
    return task, anchor, batches


class Replay(pl.LightningModule):
    """Trains on given batches; records the loss of the global weights on a sample after every sync."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.task, anchor, self.batches = digits()
        self.model, self.losses = mlp(self.task, anchor), []

    def train_dataloader(self):
        images_and_labels = chain.from_iterable(self.batches)
        own = [(images[self.global_rank], labels[self.global_rank]) for images, labels in images_and_labels]
        return DataLoader(own, batch_size=None)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if (batch_idx + 1) % LOCAL_STEPS == 0:
            logits = self.model(self.task.images[:1024])
            self.losses.append(nn.functional.cross_entropy(logits, self.task.labels[:1024]).item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LOCAL_LR * (1 - self.momentum), momentum=self.momentum)


def trained(rank: int, momentum: float) -> list[float]:
    run = trainer(LearnedLocalSGD(LOCAL_STEPS), NUM_WORKERS, max_epochs=1, use_distributed_sampler=False)
    module = Replay(momentum)
    run.fit(module)
    return module.losses


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "momentum"), [("sgd", 0.0), ("momentum", MOMENTUM)])
def test_the_default_in_a_trainer_follows_its_simulated_curve(kind, momentum):
    task, anchor, batches = digits()
    optimizer, rate = LocalOptimizer(kind), torch.tensor([LOCAL_LR * (1 - momentum)])
    state = optimizer.init({name: p.repeat_interleave(NUM_WORKERS, 0) for name, p in anchor.items()})
    network = AdaMLP.bundled()
    states, meta, simulation = zero_states(anchor, network.update), network.functional(), []
    for t, batches_of_round in enumerate(batches):
        workers, _ = local_round(task, anchor, batches_of_round, rate, NUM_WORKERS, optimizer, state)
        outer_step(anchor, workers, states, meta, torch.tensor([t]), carried=optimizer.carried(LOCAL_STEPS))
        sample = task.images[None, :1024], task.labels[None, :1024]
        simulation.append(task.loss(anchor, sample).item())
    for losses in run_workers(trained, NUM_WORKERS, momentum):
        assert losses == pytest.approx(simulation, rel=1e-3)
    assert simulation[-1] < 0.2 * simulation[0]
