"""Workers whose two ranks share one model by FSDP2, beside plain workers that see the same rows."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from lightning_lopt import LearnedOptimizer, PowerSGD, Rounds, SlowMomentum, SyncOptions
from lightning_lopt.comm import Communicator
from lightning_lopt.selection import Fragments
from tests.processes import run_workers

VOCABULARY, WIDTH, STEPS = 13, 6, 12  # odd sizes: shards are uneven
DILOCO = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        block = nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, WIDTH))
        self.blocks = nn.ModuleList([block, copy.deepcopy(block)])
        self.scale = nn.Parameter(torch.ones(1))  # one of two shards is empty
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return self.head(x * self.scale)


def _batch(worker, step):
    generator = torch.Generator().manual_seed(100 * worker + step)
    start = torch.randint(VOCABULARY, (4, 1), generator=generator)
    return (start + (1 + worker) * torch.arange(6)) % VOCABULARY


def _train(model, optimizer, rounds, worker, part=0, parts=1):
    for step in range(STEPS):
        tokens = _batch(worker, step).chunk(parts)[part]
        loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rounds.step()


CASES = {
    "mean": (None, {}),
    "diloco": (DILOCO, {}),
    "adam": (partial(torch.optim.Adam, lr=1e-2), {}),
    "learned": (LearnedOptimizer, {}),
    "overlap": (DILOCO, {"overlap_steps": 2}),
    "learned, overlap": (LearnedOptimizer, {"overlap_steps": 2}),
    "fragments": (DILOCO, {"selection": Fragments(2)}),
    "sharded": (partial(SlowMomentum, momentum=0.5), {"sharded": True}),
    "learned, sharded": (LearnedOptimizer, {"sharded": True}),
    "reset": (DILOCO, {"local_state": "reset"}),
    "factors": (DILOCO, {"compression": PowerSGD(2)}),
}


def _run(rank, name, islands):
    outer, options = CASES[name]
    torch.set_default_dtype(torch.float64)
    model, comm, part = _Model(), Communicator(), 0
    worker = rank
    if islands:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("worker", "shard"))
        worker, part = mesh.get_local_rank("worker"), mesh.get_local_rank("shard")
        for block in model.blocks:
            fully_shard(block, mesh=mesh["shard"])
        fully_shard(model, mesh=mesh["shard"])
        comm = Communicator(ranks_per_worker=2, by_column=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rounds = Rounds(model, optimizer, 4, outer, options=SyncOptions(**options), comm=comm, total_steps=STEPS)
    comm.bytes_sent = 0
    _train(model, optimizer, rounds, worker, part, 2 if islands else 1)
    report = rounds.last_report
    if islands:
        model.reshard()
    weights = {n: (p.full_tensor() if islands else p).detach() for n, p in model.named_parameters()}
    return weights, model.mean, comm.bytes_sent, (report.pseudo_grad_norm, report.drift)


def _all(rank, islands):
    return {name: _run(rank, name, islands) for name in CASES}


@pytest.fixture(scope="module")
def results():
    return run_workers(_all, 4, True), run_workers(_all, 2, False)


@pytest.mark.parametrize("name", CASES)
def test_islands_train_as_plain_workers_do(results, name):
    islands, plain = results
    for rank in range(4):
        weights, mean, sent, numbers = islands[rank][name]
        expected, expected_mean, all_sent, expected_numbers = plain[rank // 2][name]
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
        torch.testing.assert_close(mean, expected_mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(torch.tensor(numbers), torch.tensor(expected_numbers), rtol=1e-8, atol=1e-10)
        assert sent < 0.75 * all_sent
