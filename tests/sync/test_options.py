"""What the options of a sync exclude, and what they cost in bytes per parameter."""

from __future__ import annotations

import gc
import types
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lopt import (
    AdaMLP,
    Fragments,
    LearnedOptimizer,
    PowerSGD,
    RandomCoordinates,
    Rounds,
    SlowMomentum,
    SyncOptions,
    TopK,
)
from tests.processes import run_workers


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 0.5, "selection": Fragments(2)}, "one of the two"),
        ({"selection": 4}, "selection must be"),
        ({"selection": Fragments}, "selection must be"),
        ({"selection": types.SimpleNamespace(pick=len, num_turns=1)}, "which lacks whole_tensors and partial"),
        (
            {"selection": types.SimpleNamespace(pick=len, num_turns=0, whole_tensors=True, partial=True)},
            "num_turns of .* must be an integer >= 1",
        ),
        ({"compression": "int4"}, "compression must be"),
        ({"compression": 8}, "compression must be"),
        ({"compression": TopK}, "compression must be"),
        ({"overlap_steps": -1}, "overlap_steps"),
        ({"overlap_steps": True}, "overlap_steps"),
        ({"merge": "average"}, "merge must be"),
        ({"merge": 1.5}, "merge must be"),
        ({"merge": True}, "merge must be"),
        ({"compression": "int4"}, "any Codec"),
        ({"sync_rules": ["*queue*"]}, r"must map patterns of names to .* not \['\*queue\*'\]"),
        ({"merge": "overwrite"}, "without overlap_steps there are none"),
        ({"local_state": "drop"}, "local_state must be"),
        ({"local_state": "reset", "density": 0.5}, "needs whole tensors"),
        ({"local_state": "average", "overlap_steps": 1}, "excludes overlap_steps"),
        ({"sharded": True, "compression": "int8"}, "excludes compression"),
        ({"sharded": True, "compression": PowerSGD()}, "excludes compression"),
        ({"density": 0.5, "compression": PowerSGD(2)}, r"PowerSGD\(rank=2\) needs whole tensors"),
    ],
)
def test_wrong_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        SyncOptions(**options)


def test_fingerprints_tell_settings_apart():
    settings = [
        SyncOptions(),
        SyncOptions(density=0.5),
        SyncOptions(selection=RandomCoordinates(0.5, 1)),
        SyncOptions(merge=0.5),
    ]
    assert len({options.fingerprint for options in settings}) == len(settings)
    assert SyncOptions(density=0.5).fingerprint == SyncOptions(density=0.5).fingerprint


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
    ("averaging", SyncOptions(compression=PowerSGD(4)), RING * 4 * (100 + 100) / 100**2, 4 + 4 + 16 / 100, 0),
    ("averaging", SyncOptions(overlap_steps=1), RING, 4, 4 + 8),
    ("averaging", SyncOptions(overlap_steps=1, compression="int8"), RING / 4, 4 + 4, 4 + 4 + 12),
    ("averaging", SyncOptions(local_state="average"), RING + 2 * RING, 4, 0),  # Adam's two momenta
    ("AdamW", SyncOptions(sharded=True), RING, 4 + 8 / K, 0),
]


def _held(rounds: Rounds, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that `rounds` leads to, without the user's own."""
    own = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t is not None]
    storages = {t.untyped_storage().data_ptr(): 0 for t in own}
    seen: set[int] = set()
    stack: list[Any] = [rounds]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, type | types.ModuleType | types.FunctionType):
            continue
        seen.add(id(item))
        if isinstance(item, Future):
            item.result()  # the next round's coordinates, drawn ahead
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
