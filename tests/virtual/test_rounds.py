"""The rounds of virtual workers in a plain loop are those of processes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from lightning_lopt import Fragments, LearnedOptimizer, PowerSGD, Rounds, SyncOptions
from lightning_lopt.virtual import SharedModule, VirtualRounds
from tests.processes import run_cases
from tests.threads import run_threads

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


def _virtual(name, local_steps=4):
    outer, options = OPTIONS[name]
    model, optimizer = _model()
    shared_module = SharedModule(model, [optimizer], 2)
    make = partial(Rounds, local_steps=local_steps, outer_optimizer=outer, options=options)
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


def test_a_schedule_is_asked_once_for_all_workers():
    """So that one that remembers, in whatever way, returns the same to all."""
    calls = []

    def schedule(info):
        calls.append(info.step)
        return len(calls)

    _train(*(virtual := _virtual("average", schedule)), range(7))
    assert calls == [0, 1, 3, 6]
    assert [worker.round_idx for worker in virtual[-1].workers] == [3, 3]


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


class _Living(nn.Module):
    """A centre that is reassigned, a cache that is filled late, an EMA teacher, and a queue of the worker's own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.teacher = nn.Linear(5, 2), nn.Linear(5, 2).requires_grad_(False)
        self.register_buffer("center", torch.zeros(2))
        self.register_buffer("cache", None)
        self.register_buffer("queue", torch.zeros(3))

    def forward(self, x):
        out = self.net(x)
        if self.cache is None:
            self.cache = torch.zeros(2)
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(2))
        self.late = self.late + out.detach().amax(0)
        self.cache = self.cache + out.detach()[0]
        self.center = 0.9 * self.center + 0.1 * out.detach().mean(0)
        self.queue = torch.cat([self.queue[1:], out.detach()[:1, 0]])
        return out - self.teacher(x) - self.center - 0.1 * self.cache


def _live(make, optimizer, module, steps, turns, step_rounds):
    for step in range(steps):
        for rank in turns():
            _step(module, optimizer, rank, step)
            with torch.no_grad():
                for t, s in zip(module.teacher.parameters(), module.net.parameters(), strict=True):
                    t.lerp_(s, 0.1)
        step_rounds()
        if step == 1:
            make().swap_in("mean")
            make().swap_out()


def _living_options(overlap):
    options = SyncOptions(overlap_steps=overlap, sync_rules={"queue": "local"})
    return {"local_steps": 4, "outer_optimizer": partial(torch.optim.SGD, lr=0.7, momentum=0.5), "options": options}


def _thread(rank, make_comm, overlap):
    module = _Living()
    optimizer = torch.optim.SGD(module.net.parameters(), lr=0.1, momentum=0.9)
    rounds = Rounds(module, optimizer, comm=make_comm(), **_living_options(overlap))
    _live(lambda: rounds, optimizer, module, NUM_STEPS, lambda: [rank], rounds.step)
    return {name: t.clone() for name, t in module.state_dict().items()}


@pytest.mark.parametrize("overlap", [0, 2])
def test_living_tensors_of_virtual_workers_are_those_of_two_models(overlap):
    module = _Living()
    optimizer = torch.optim.SGD(module.net.parameters(), lr=0.1, momentum=0.9)
    shared_module = SharedModule(module, [optimizer], 2)
    rounds = VirtualRounds(partial(Rounds, **_living_options(overlap)), shared_module, optimizer)
    _live(lambda: rounds, optimizer, module, NUM_STEPS, shared_module.turns, rounds.step)
    for rank, expected in enumerate(run_threads(_thread, 2, overlap)):
        shared_module.activate(rank)
        found = module.state_dict()
        assert found.keys() == expected.keys()
        assert [name for name, t in found.items() if not torch.equal(t, expected[name])] == []


def test_weights_from_outside_are_for_all_virtual_workers():
    module = _Living()
    optimizer = torch.optim.SGD(module.net.parameters(), lr=0.0)
    shared_module = SharedModule(module, [optimizer], 2)
    rounds = VirtualRounds(partial(Rounds, **_living_options(0)), shared_module, optimizer)
    nn.init.constant_(module.teacher.weight, 3.0)  # no parameter in training
    module.queue.fill_(4.0)
    assert not rounds.adopt_replaced(at_start=True)
    assert [shared_module.parameters(k)["teacher.weight"].mean().item() for k in range(2)] == [3.0, 3.0]
    assert [shared_module.buffers(k)["queue"].mean().item() for k in range(2)] == [4.0, 4.0]
    nn.init.constant_(module.net.weight, 5.0)
    assert rounds.adopt_replaced()
    nn.init.constant_(module.net.bias, 6.0)
    rounds.adopt()
    assert rounds.synced
    rounds.abandon_round()
    for k in range(2):
        assert shared_module.parameters(k)["net.weight"].mean().item() == 5.0
        assert shared_module.parameters(k)["net.bias"].mean().item() == 6.0
