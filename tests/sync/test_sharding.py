"""The sharded outer step equals the unsharded one, with less state and, for LAgg-A, less traffic."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from lightning_lopt import AdaMLP, Fragments, LearnedOptimizer, Rounds, SlowMomentum, SyncOptions
from tests.processes import run_cases

K = 3
OUTERS = {
    "average": None,
    "slowmo": partial(SlowMomentum, momentum=0.5),
    "adam": partial(torch.optim.Adam, lr=0.1),
    "learned": partial(LearnedOptimizer, network=AdaMLP(seed=1)),
    "lagg": partial(LearnedOptimizer, network=AdaMLP(K, seed=1)),
    "default": partial(LearnedOptimizer, network="default"),
}


def _run(rank, outer, options, resume_at=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rounds = Rounds(model, optimizer, 4, OUTERS[outer], 11, options=options)
    for step in range(11):
        if step == resume_at:
            state, own = rounds.state_dict(), rounds.sync.local_state()
            model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).double()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            rounds = Rounds(model, optimizer, 4, OUTERS[outer], 11, options=options)
            rounds.load_state_dict(state)
            rounds.sync.load_local_state(own)
        torch.manual_seed(10 * step + rank)
        optimizer.zero_grad()
        growing = 2.0 if outer == "default" and step >= 4 else 1.0  # which it damps
        (growing * model(torch.randn(8, 5, dtype=torch.float64))).square().mean().backward()
        optimizer.step()
        rounds.step()
    states = 0 if rounds.sync.outer is None else sum(p.numel() for p, s in rounds.sync.outer.state.items() if s)
    report = rounds.last_report
    weights = torch.cat([t.double().flatten() for t in model.state_dict().values()])
    return weights, states, (report.pseudo_grad_norm, report.drift), report.bytes_sent


OPTIONS = {
    "at once": {},
    "in flight": {"overlap_steps": 2},
    "fragments": {"selection": Fragments(2)},
    "random": {"density": 0.5},
}
# a learned step needs whole tensors
CASES = [(o, name) for o in OUTERS for name in OPTIONS if name != "random" or o in ("average", "slowmo", "adam")]
IN_FLIGHT = SyncOptions(sharded=True, overlap_steps=2)


@pytest.fixture(scope="module")
def runs():
    cases = {
        f"{outer}, {name}, {sharded}": (outer, SyncOptions(sharded=sharded, **OPTIONS[name]))
        for outer, name in CASES
        for sharded in (False, True)
    }
    resumed = {f"{outer}, resumed at {at}": (outer, IN_FLIGHT, at) for outer in ("adam", "lagg") for at in (3, 5)}
    return run_cases(_run, K, cases | resumed)


@pytest.mark.parametrize(("outer", "name"), CASES)
def test_sharded_equals_unsharded(runs, outer, name):
    sharded, plain = (runs[f"{outer}, {name}, {value}"] for value in (True, False))
    for a, b in zip(sharded, plain, strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=1e-9, atol=1e-12)
        assert a[2] == pytest.approx(b[2], rel=1e-9)
    if outer != "average":  # 109 coordinates in tensors of 42, 35, 7, 6, 6, 6, 6 and 1
        assert sum(states for _, states, *_ in sharded) == plain[0][1] == 109
        assert max(states for _, states, *_ in sharded) == 42


@pytest.mark.parametrize("at", [3, 5])
@pytest.mark.parametrize("outer", ["adam", "lagg"])
def test_sharded_rounds_resume_bitwise(runs, outer, at):
    whole, resumed = runs[f"{outer}, in flight, True"], runs[f"{outer}, resumed at {at}"]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole, resumed, strict=True))


def _traffic(rank, sharded):
    model = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(6)))
    outer = OUTERS["lagg"]
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, outer, options=SyncOptions(sharded=sharded))
    rounds.step()
    return rounds.last_report.bytes_sent / (4 * 60_000)


def test_lagg_at_the_price_of_an_all_reduce():
    traffic = run_cases(_traffic, K, {"whole": (False,), "sharded": (True,)})
    assert traffic["whole"][0] == pytest.approx(K - 1, rel=0.01)
    for worker in traffic["sharded"]:
        assert worker == pytest.approx(2 * (K - 1) / K, rel=0.01)
