"""What the README and the method cards say that a sync sends and a worker holds, in bytes per parameter."""

from __future__ import annotations

import gc
import types
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lopt import AdaMLP, Fragments, LearnedOptimizer, Rounds, SlowMomentum, SyncOptions, TopK
from tests.processes import run_workers

K = 3
RING = 2 * (K - 1) / K * 4  # an all-reduce in float32
OUTERS = {
    "averaging": None,
    "SlowMo": SlowMomentum,
    "DiLoCo": partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
    "AdamW": partial(torch.optim.AdamW, lr=1e-3),
    "learned": partial(LearnedOptimizer, network=AdaMLP.base_step(seed=0)),
    "LOpt-A": partial(LearnedOptimizer, network=AdaMLP(seed=0)),
    "LAgg-A": partial(LearnedOptimizer, network=AdaMLP(K, seed=0)),
}
CASES: list[tuple[str, SyncOptions, float, float, float]] = [  # sent in a sync, held between syncs, held in flight
    ("averaging", SyncOptions(), RING, 4, 0),
    ("SlowMo", SyncOptions(), RING, 8, 0),
    ("DiLoCo", SyncOptions(), RING, 8, 0),
    ("AdamW", SyncOptions(), RING, 4 + 8, 0),
    ("learned", SyncOptions(), RING, 20 + 2 * 4, 0),  # two Gram matrices of as many numbers as a square matrix has
    ("LOpt-A", SyncOptions(), RING, 20, 0),
    ("LAgg-A", SyncOptions(), (K - 1) * 4, 20, 0),
    ("LAgg-A", SyncOptions(compression="int8"), (K - 1) * 1, 20 + 4, 0),
    ("LAgg-A", SyncOptions(sharded=True), RING, 4 + 16 / K, 0),
    ("averaging", SyncOptions(density=0.1), 0.1 * RING, 4 + 8 * 0.1, 0),
    ("averaging", SyncOptions(density=0.1, overlap_steps=1), 0.1 * RING, 4 + 8 * 0.1, 4 + 24 * 0.1),
    ("averaging", SyncOptions(selection=Fragments(4)), RING / 4, 4, 0),
    ("averaging", SyncOptions(compression="bf16"), RING / 2, 4 + 4, 0),
    ("SlowMo", SyncOptions(compression="int8"), RING / 4, 8 + 4, 0),
    ("averaging", SyncOptions(compression=TopK(0.02)), (K - 1) * 0.02 * 6, 4 + 4, 0),
    ("averaging", SyncOptions(overlap_steps=1), RING, 4, 4 + 8),
    ("averaging", SyncOptions(overlap_steps=1, compression="int8"), RING / 4, 4 + 4, 4 + 4 + 12),
    ("averaging", SyncOptions(local_state="average"), RING + 2 * RING, 4, 0),  # Adam's two momenta
    ("AdamW", SyncOptions(sharded=True), RING, 4 + 8 / K, 0),
]


def _held(rounds: Rounds, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that `rounds` leads to, without the user's own."""
    if (drawn := getattr(rounds.sync._selection, "_next", None)) is not None:
        drawn[2].result()  # the next round's coordinates
    own = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t is not None]
    storages = {t.untyped_storage().data_ptr(): 0 for t in own}
    seen: set[int] = set()
    stack: list[Any] = [rounds]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, type | types.ModuleType | types.FunctionType):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages.setdefault(item.untyped_storage().data_ptr(), item.untyped_storage().nbytes())
        stack += gc.get_referents(item)
    return sum(storages.values())


def _costs(rank):
    found = []
    for name, options, *_ in CASES:
        model = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(12)))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        rounds = Rounds(model, optimizer, 2 * options.effective_selection.num_turns, OUTERS[name], options=options)
        before, in_flight = rounds.comm.bytes_sent, 0
        while rounds.round_idx < 2 * options.effective_selection.num_turns:
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            rounds.step()
            rounds.sync.wait()
            if rounds.sync.in_flight:
                in_flight = _held(rounds, model, optimizer)
        sent, held = (rounds.comm.bytes_sent - before) / rounds.round_idx, _held(rounds, model, optimizer)
        found.append([value / (12 * 100 * 100) for value in (sent, held, in_flight)])
    return found


@pytest.fixture(scope="module")
def costs():
    return run_workers(_costs, K)


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: CASES[i][0])
def test_bytes_per_parameter(costs, index):
    *_, sent, held, in_flight = CASES[index]
    for worker in costs:
        assert worker[index] == pytest.approx([sent, held, in_flight], rel=0.03, abs=0.02)
