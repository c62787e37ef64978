"""The merge rule on real processes: golden rounds of LOSCAR, its laws and identities, parts, states, resumption."""

from __future__ import annotations

import io
from functools import partial
from itertools import combinations

import numpy as np
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
from lightning_lopt.comm import Communicator
from lightning_lopt.strategies.joint import JointOptimizer
from lightning_lopt.sync import Sync
from lightning_lopt.sync.status import SyncPoint, WorkerStatus
from tests.conftest import VECTORS
from tests.processes import run_cases, run_workers
from tests.sync_support import Given, Point, flat, move
from tests.threads import run_threads

CASES = [f"density{density}_q{q}" for density in ("0.1", "0.5", "1.0") for q in ("0", "1", "3", "mix")]


def _golden(rank, case, merge, dtype):
    """The file's quadratic problem, on which each worker takes its own number of steps: x, y, z [R, d]."""
    data = np.load(VECTORS / "loscar.npz")
    curvature, center, noise, x0 = (
        torch.from_numpy(data[k]).to(dtype) for k in ("curvature", "center", "grad_noise", "x0")
    )
    before, overlap = int(data["N"][rank]), int(data[f"{case}/Q"][rank])
    model = Point(x0)
    optimizer = torch.optim.SGD(model.parameters(), lr=float(data["eta"]))
    selection = Given(data[f"{case}/mask"].tolist())
    options = SyncOptions(selection=selection, overlap_steps=int(data[f"{case}/Q"].max()), merge=merge)
    sync = Sync(model, optimizer, None, Communicator(), options)
    xyz = []
    for t in range(len(noise)):
        for h in range(before + overlap):
            if h == before:
                sync.launch(t, WorkerStatus(before + overlap, SyncPoint.LAUNCH), same_steps=False)
                y = model.x.detach().clone()
            model.x.grad = curvature[rank] * (model.x.detach() - center[rank]) + noise[t, rank, h]
            optimizer.step()
        z = model.x.detach().clone()
        if not overlap:
            y = z
            sync.launch(t, WorkerStatus(before), same_steps=False)
        sync.finish()
        xyz.append(torch.stack([model.x.detach(), y, z]))
    return torch.stack(xyz, 1)


@pytest.fixture(scope="module")
def golden_rounds():
    cases = {case: (case, "delay_corrected", torch.float64) for case in CASES}
    return run_cases(_golden, 4, {**cases, "overwrite": ("density0.5_qmix", "overwrite", torch.float32)})


@pytest.mark.parametrize("case", CASES)
def test_loscar_equals_the_golden_rounds(vectors, golden_rounds, case):
    data = vectors("loscar.npz")
    x, y, z = torch.stack(golden_rounds[case], 1)  # [K, R, d]
    expected = torch.from_numpy(data[f"{case}/x"][1:]).transpose(0, 1)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.mean(0), z.mean(0), rtol=0, atol=1e-15)  # the first law
    mask = torch.from_numpy(data[f"{case}/mask"])
    for i, k in combinations(range(4), 2):  # the second law
        torch.testing.assert_close((x[i] - x[k])[mask], ((z[i] - y[i]) - (z[k] - y[k]))[mask], rtol=0, atol=1e-15)


def test_overwriting_equals_the_golden_rounds_and_breaks_the_law(vectors, golden_rounds):
    data = vectors("loscar.npz")
    x, _, z = torch.stack(golden_rounds["overwrite"], 1)
    expected = torch.from_numpy(data["density0.5_qmix/naive_x"][1:]).transpose(0, 1).float()
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    assert (x.mean(0) - z.mean(0)).abs().max() > 0.01


def _run(rank, options, steps=12, local_steps=4, total=None, finish=False, optimizer=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    local = (optimizer or partial(torch.optim.SGD, lr=0.1))(model.parameters())
    rounds = Rounds(model, local, local_steps, None, total, options=options)
    seen = move(rounds, model, local, rank, steps)
    if finish:
        rounds.finish_round()
        seen = torch.cat([seen, flat(model)[None]])
    return seen, rounds.round_idx


UNFORESEEN = SyncOptions(density=0.3, overlap_steps=1, compression="int8")
RUNS = {
    "plain": (SyncOptions(),),
    "all coordinates": (SyncOptions(selection=RandomCoordinates(1.0)),),
    **{
        f"final round, {overlap} in flight": (
            SyncOptions(density=0.3, overlap_steps=overlap, compression=TopK(0.1), merge=0.5),
            10,
            4,
            10,
        )
        for overlap in (0, 2)
    },
    **{f"ends after {steps}": (UNFORESEEN, steps, 4, None, True) for steps in (8, 10, 11)},
    "sparta": (SyncOptions(density=0.3), 6, 1),
}
CHANGES = {  # options, and what they are compared with
    "density": (SyncOptions(density=0.5), SyncOptions()),
    "fragments": (SyncOptions(selection=Fragments(2)), SyncOptions()),
    "seed": (SyncOptions(selection=RandomCoordinates(0.5, seed=1)), SyncOptions(density=0.5)),
    "bf16": (SyncOptions(compression="bf16"), SyncOptions()),
    "int8": (SyncOptions(compression="int8"), SyncOptions()),
    "top-k": (SyncOptions(compression=TopK(0.3)), SyncOptions()),
    "density of top-k": (SyncOptions(compression=TopK(0.6)), SyncOptions(compression=TopK(0.3))),
    "overlap": (SyncOptions(overlap_steps=2), SyncOptions()),
    "overlap of one step": (SyncOptions(overlap_steps=1), SyncOptions(overlap_steps=2)),
    "overwriting": (SyncOptions(overlap_steps=2, merge="overwrite"), SyncOptions(overlap_steps=2)),
    "blending": (SyncOptions(overlap_steps=2, merge=0.5), SyncOptions(overlap_steps=2)),
    "share of the blend": (SyncOptions(overlap_steps=2, merge=0.25), SyncOptions(overlap_steps=2, merge=0.5)),
    "reset": (SyncOptions(local_state="reset"), SyncOptions()),
    "average of states": (SyncOptions(local_state="average"), SyncOptions()),
}


@pytest.fixture(scope="module")
def runs():
    heavy = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    changes = {str(options): (options, 10, 4, None, False, heavy) for pair in CHANGES.values() for options in pair}
    return run_cases(_run, 2, {**RUNS, **changes})


def test_all_random_coordinates_are_local_sgd(runs):
    for (a, _), (b, _) in zip(runs["all coordinates"], runs["plain"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("overlap", [0, 2])
def test_the_final_round_sends_everything_at_once(runs, overlap):
    (a, rounds), (b, _) = runs[f"final round, {overlap} in flight"]
    assert rounds == 3
    assert torch.equal(a[-1], b[-1])
    assert not torch.equal(a[7], b[7])


@pytest.mark.parametrize("steps", [8, 10, 11])  # right after a sync, before a launch, in flight
def test_an_unforeseen_end_syncs_everything(runs, steps):
    (a, _), (b, _) = runs[f"ends after {steps}"]
    assert torch.equal(a[-1], b[-1])
    torch.testing.assert_close(a[-1], (a[-2] + b[-2]) / 2, rtol=0, atol=0.3)  # residuals are in it, too


def test_sparta_shares_random_coordinates_after_every_step(runs):
    a, b = (seen for seen, _ in runs["sparta"])
    equal = a == b
    assert all(row.sum() >= round(0.3 * a.shape[1]) for row in equal)
    assert not torch.equal(equal[0], equal[1])
    assert not equal.all(1).any()


@pytest.mark.parametrize("name", CHANGES)
def test_every_argument_changes_something(runs, name):
    changed, plain = (runs[str(options)][0][0] for options in CHANGES[name])
    assert not torch.allclose(changed, plain, rtol=0, atol=1e-6)


def _average_states(rank, joint):
    model = Point(torch.zeros(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    local = JointOptimizer([optimizer]) if joint else optimizer
    rounds = Rounds(model, local, 2, options=SyncOptions(local_state="average"))
    for _ in range(2):
        model.x.grad = torch.tensor([1.0, 2.0, 3.0]) * (rank + 1)
        optimizer.step()
        rounds.step()
    return optimizer.state[model.x]["exp_avg"].clone(), optimizer.state[model.x]["step"].item()


@pytest.mark.parametrize("joint", [False, True])
def test_local_states_are_averaged(joint):
    # after two steps with gradient c: exp_avg = c·(1 - .9²) = .19 c; the mean of c and 2c is 1.5 c
    for average, step in run_workers(_average_states, 2, joint):
        torch.testing.assert_close(average, 0.19 * 1.5 * torch.tensor([1.0, 2.0, 3.0]))
        assert step == 2


def _fragments(rank, outer):
    model = nn.ParameterList([torch.zeros(3), torch.zeros(2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rounds = Rounds(model, optimizer, 5, outer, options=SyncOptions(selection=Fragments(2)))
    seen = []
    for _ in range(10):
        for p in model:
            p.grad = torch.full_like(p, float(rank))
        optimizer.step()
        rounds.step()
        seen.append([p[0].item() for p in model])
    return seen


def test_fragments_take_turns():
    # H = 5: the first tensor syncs after steps 2 and 7, the second after 5 and 10; the worker with gradient 2 is at
    # 0 -2 | then the mean of 0 and -4: -2 -4 -6 -8 -10 -12 | the mean of -2 and -12: -7
    first, second = run_workers(_fragments, 2, None)
    for i, period in ((0, (2, 7)), (1, (5, 10))):
        equal = [step for step, (a, b) in enumerate(zip(first, second, strict=True), 1) if a[i] == b[i]]
        assert set(period) <= set(equal)
    assert [row[0] for row in second] == [-1, -1, -2, -3, -4, -5, -3.5, -4.5, -5.5, -6.5]
    assert [row[1] for row in second] == [-1, -2, -3, -4, -2.5, -3.5, -4.5, -5.5, -6.5, -5]


def test_fragments_step_only_their_own_tensors():
    # momentum .5 on g = 1 (two steps), then g = 2.5: u = 1, 3; the anchor moves by -1 and -3, as far as nobody else's
    _, second = run_workers(_fragments, 2, partial(torch.optim.SGD, lr=1.0, momentum=0.5))
    assert [row[0] for row in second][1::5] == [-1, -4]


OPTIONS = {
    "loscar": (SyncOptions(density=0.5, overlap_steps=2, compression="int8"), partial(SlowMomentum, momentum=0.5)),
    "fragments": (
        SyncOptions(selection=Fragments(2), overlap_steps=1),
        partial(LearnedOptimizer, network=AdaMLP(seed=1)),
    ),
    "lagg": (SyncOptions(overlap_steps=2, compression="bf16"), partial(LearnedOptimizer, network=AdaMLP(2, seed=1))),
    "topk": (SyncOptions(compression=TopK(0.2), merge=0.5, overlap_steps=3), partial(torch.optim.Adam, lr=0.1)),
    "factors": (
        SyncOptions(compression=PowerSGD(1), overlap_steps=1, selection=Fragments(2)),
        partial(SlowMomentum, momentum=0.5),
    ),
    "average": (SyncOptions(local_state="average"), None),
}


def _resumed(rank, name, steps=11):
    """The last parameters of a run that is stopped and resumed after each of its steps, and of one that is not."""
    options, outer = OPTIONS[name]
    state, ends = None, []
    for stop in (1,) * steps, (steps,):
        for num in stop:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            rounds = Rounds(model, optimizer, 4, outer, options=options)
            if state is not None:
                state.seek(0)
                loaded = torch.load(state, weights_only=True)
                rounds.load_state_dict(loaded["rounds"])
                rounds.sync.load_local_state(loaded["local"])
                optimizer.load_state_dict(loaded["optimizer"])
            for _ in range(num):
                torch.manual_seed(100 * rank + rounds.step_idx)
                optimizer.zero_grad()
                model(torch.randn(6, 5)).square().mean().backward()
                optimizer.step()
                rounds.step()
            if len(stop) > 1:
                state = io.BytesIO()
                parts = {"rounds": rounds.state_dict(), "local": rounds.sync.local_state()}
                torch.save({**parts, "optimizer": optimizer.state_dict()}, state)
        ends.append(torch.cat([t.double().flatten() for t in model.state_dict().values()]))
        state = None
    return ends


@pytest.fixture(scope="module")
def resumed_runs():
    return run_cases(_resumed, 2, {name: (name,) for name in OPTIONS})


@pytest.mark.parametrize("name", OPTIONS)
def test_resumes_bitwise_from_every_step(resumed_runs, name):
    ends = resumed_runs[name]
    for resumed, whole in ends:
        assert torch.equal(resumed, whole)
    assert not torch.equal(ends[0][1], ends[1][1])  # in mid-round


def _unmoved(rank, make_comm):
    model = Point(torch.randn(2000, generator=torch.Generator().manual_seed(0)))
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=0.0), 1, comm=make_comm())
    seen = [model.x.detach().clone()]
    for _ in range(30):
        rounds.step()
        seen.append(model.x.detach().clone())
    return seen


@pytest.mark.parametrize("num_workers", [2, 3, 5, 6, 7])
def test_what_no_worker_moves_is_rounded_once(num_workers):
    """A sum of K equal values, over K, is off by a few units in the last place, and a fixed point soon."""
    seen = run_threads(_unmoved, num_workers)[0]
    first, after_ten, last = seen[0], seen[10], seen[30]
    assert torch.equal(after_ten, last)
    assert ((last - first) / first).abs().max() <= num_workers * torch.finfo(last.dtype).eps
    assert torch.equal(first, last) == (num_workers == 2)
