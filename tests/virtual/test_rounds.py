"""The rounds of virtual workers in a plain loop are those of processes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from lightning_lopt import Fragments, LearnedOptimizer, PowerSGD, Rounds, SyncOptions
from lightning_lopt.virtual import SharedModule, VirtualRounds
from tests.processes import run_cases

OPTIONS = {
    "average": (None, SyncOptions()),
    "learned, in flight": (LearnedOptimizer, SyncOptions(overlap_steps=1, compression="int8")),
    "factors, in flight": (None, SyncOptions(overlap_steps=1, compression=PowerSGD(1))),
    "fragments, sharded": (partial(torch.optim.Adam, lr=0.1), SyncOptions(selection=Fragments(2), sharded=True)),
}
NUM_STEPS = 11


def _model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _step(model, optimizer, rank, step):
    optimizer.zero_grad()
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(10 * step + rank))
    model(inputs).square().mean().backward()
    optimizer.step()


def _process(rank, name):
    outer, options = OPTIONS[name]
    model, optimizer = _model()
    rounds = Rounds(model, optimizer, 4, outer, options=options)
    for step in range(NUM_STEPS):
        _step(model, optimizer, rank, step)
        rounds.step()
    return [t.clone() for t in model.state_dict().values()]


@pytest.fixture(autouse=True)
def _one_thread():
    """As the worker processes: another number of threads rounds differently."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def processes():
    return run_cases(_process, 2, {name: (name,) for name in OPTIONS})


def _virtual(name):
    outer, options = OPTIONS[name]
    model, optimizer = _model()
    shared_module = SharedModule(model, [optimizer], 2)
    make = partial(Rounds, local_steps=4, outer_optimizer=outer, options=options)
    return model, optimizer, shared_module, VirtualRounds(make, shared_module, optimizer)


def _train(model, optimizer, shared_module, rounds, steps):
    for step in steps:
        for rank in shared_module.turns():
            _step(model, optimizer, rank, step)
        rounds.step()


@pytest.mark.parametrize("name", OPTIONS)
def test_two_virtual_workers_are_bitwise_two_processes(processes, name):
    model, optimizer, shared_module, rounds = _virtual(name)
    _train(model, optimizer, shared_module, rounds, range(NUM_STEPS))
    for rank, expected in enumerate(processes[name]):
        shared_module.activate(rank)
        for ours, theirs in zip(model.state_dict().values(), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_finishing_and_abandoning_are_for_all_workers():
    model, optimizer, shared_module, rounds = _virtual("average")
    _train(model, optimizer, shared_module, rounds, range(2))
    rounds.finish_round()
    synced = []
    for rank in range(2):
        shared_module.activate(rank)
        synced.append(model[0].weight.detach().clone())
    shared_module.activate(0)
    assert torch.equal(*synced)
    assert (rounds.round_idx, rounds.step_idx, rounds.synced) == (1, 2, True)
    _train(model, optimizer, shared_module, rounds, range(2, 5))
    assert not torch.equal(model[0].weight, synced[0])
    rounds.abandon_round()
    assert [worker.step_idx for worker in rounds.workers] == [2, 2]
    assert torch.equal(model[0].weight, synced[0])
