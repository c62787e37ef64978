"""The merge rule on real processes: golden rounds of LOSCAR, its laws and identities, parts, states, resumption."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
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
    RandomCoordinates,
    Rounds,
    SlowMomentum,
    SyncOptions,
    TopK,
)
from lightning_lopt.comm import Communicator
from lightning_lopt.strategies.joint import JointOptimizer
from lightning_lopt.sync import Sync
from lightning_lopt.sync.status import WorkerStatus
from tests.conftest import VECTORS
from tests.processes import run_workers

CASES = [f"density{density}_q{q}" for density in ("0.1", "0.5", "1.0") for q in ("0", "1", "3", "mix")]


@dataclass(frozen=True)
class Given:
    """Coordinates of one tensor by masks [R, d]."""

    masks: list
    num_turns = 1
    whole_tensors = False
    partial = True

    def pick(self, sizes, round_idx):
        return [torch.tensor(self.masks[round_idx]).nonzero().squeeze(1)]


class Point(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(x.clone())


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
                sync.launch(t, WorkerStatus(before + overlap, "launch"), same_steps=False)
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


@pytest.mark.parametrize("case", CASES)
def test_loscar_equals_the_golden_rounds(vectors, case):
    data = vectors("loscar.npz")
    x, y, z = torch.stack(run_workers(_golden, 4, case, "delay_corrected", torch.float64), 1)  # [K, R, d]
    expected = torch.from_numpy(data[f"{case}/x"][1:]).transpose(0, 1)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.mean(0), z.mean(0), rtol=0, atol=1e-15)  # the first law
    mask = torch.from_numpy(data[f"{case}/mask"])
    for i, k in combinations(range(4), 2):  # the second law
        torch.testing.assert_close((x[i] - x[k])[mask], ((z[i] - y[i]) - (z[k] - y[k]))[mask], rtol=0, atol=1e-15)


def test_overwriting_equals_the_golden_rounds_and_breaks_the_law(vectors):
    data = vectors("loscar.npz")
    x, _, z = torch.stack(run_workers(_golden, 4, "density0.5_qmix", "overwrite", torch.float32), 1)
    expected = torch.from_numpy(data["density0.5_qmix/naive_x"][1:]).transpose(0, 1).float()
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    assert (x.mean(0) - z.mean(0)).abs().max() > 0.01


def _move(rounds, model, rank, steps):
    """Local steps of plain SGD on a problem of the worker's own; the parameters after each."""
    optimizer = rounds._optimizer
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p - rank - i).square().sum() for i, p in enumerate(model.parameters())).backward()
        optimizer.step()
        rounds.step()
        seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return torch.stack(seen)


def _run(rank, options, steps=12, outer=None, local_steps=4, total=None, finish=False, optimizer=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    local = (optimizer or partial(torch.optim.SGD, lr=0.1))(model.parameters())
    rounds = Rounds(model, local, local_steps, outer, total, options=options)
    seen = _move(rounds, model, rank, steps)
    if finish:
        rounds.finish_round()
        seen = torch.cat([seen, torch.cat([p.detach().flatten() for p in model.parameters()])[None]])
    return seen, rounds.round_idx, rounds.last_report


def _compare(first, second, workers=2):
    a, b = (run_workers(_run, workers, *options) for options in (first, second))
    return [(x[0], y[0]) for x, y in zip(a, b, strict=True)]


def test_all_random_coordinates_are_local_sgd():
    for a, b in _compare((SyncOptions(selection=RandomCoordinates(1.0)),), (SyncOptions(),)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("overlap", [0, 2])
def test_the_final_round_sends_everything_at_once(overlap):
    options = SyncOptions(density=0.3, overlap_steps=overlap, compression=TopK(0.1), merge=0.5)
    (a, rounds, _), (b, _, _) = run_workers(_run, 2, options, 10, None, 4, 10)
    assert rounds == 3
    assert torch.equal(a[-1], b[-1])
    assert not torch.equal(a[7], b[7])


@pytest.mark.parametrize("steps", [8, 10, 11])  # right after a sync, before a launch, in flight
def test_an_unforeseen_end_syncs_everything(steps):
    options = SyncOptions(density=0.3, overlap_steps=1, compression="int8")
    (a, *_), (b, *_) = run_workers(_run, 2, options, steps, None, 4, None, True)
    assert torch.equal(a[-1], b[-1])
    torch.testing.assert_close(a[-1], (a[-2] + b[-2]) / 2, rtol=0, atol=0.3)  # residuals are in it, too


def test_sparta_shares_random_coordinates_after_every_step():
    a, b = (seen for seen, *_ in run_workers(_run, 2, SyncOptions(density=0.3), 6, None, 1))
    equal = a == b
    assert all(row.sum() >= round(0.3 * a.shape[1]) for row in equal)
    assert not torch.equal(equal[0], equal[1])
    assert not equal.all(1).any()


@pytest.mark.parametrize(
    "changed",
    [
        SyncOptions(density=0.5),
        SyncOptions(selection=Fragments(2)),
        SyncOptions(selection=RandomCoordinates(0.5, seed=1)),
        SyncOptions(compression="bf16"),
        SyncOptions(compression="int8"),
        SyncOptions(compression=TopK(0.3)),
        SyncOptions(compression=TopK(0.6)),
        SyncOptions(overlap_steps=2),
        SyncOptions(overlap_steps=1),
        SyncOptions(overlap_steps=2, merge="overwrite"),
        SyncOptions(overlap_steps=2, merge=0.5),
        SyncOptions(overlap_steps=2, merge=0.25),
        SyncOptions(local_state="reset"),
        SyncOptions(local_state="average"),
    ],
    ids=str,
)
def test_every_argument_changes_something(changed):
    heavy = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    others = {
        "seed": SyncOptions(selection=RandomCoordinates(0.5)),
        "merge='overwrite'": SyncOptions(overlap_steps=2),
        "merge=0.5": SyncOptions(overlap_steps=2),
        "merge=0.25": SyncOptions(overlap_steps=2, merge=0.5),
        "density=0.6": SyncOptions(compression=TopK(0.3)),
    }
    plain = next((other for key, other in others.items() if key in str(changed) and "seed=0" not in str(changed)), None)
    options = (10, None, 4, None, False, heavy)
    (a, b), _ = _compare((changed, *options), (plain or SyncOptions(), *options))
    assert not torch.allclose(a, b, rtol=0, atol=1e-6)


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


@pytest.mark.parametrize(
    ("outer", "reference"),
    [
        (partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True), "nesterov"),
        (partial(SlowMomentum, lr=0.8, momentum=0.5), "slow"),
        (partial(torch.optim.Adam, lr=0.1), "adam"),
    ],
    ids=["SGD", "SlowMomentum", "Adam"],
)
def test_outer_steps_on_random_coordinates(outer, reference):
    """Each coordinate has its own momentum, and only those that are sent move it (Adam counts steps per tensor)."""
    torch.manual_seed(0)
    masks = torch.rand(6, 8) < 0.5
    masks[:, 0], masks[:, 1] = True, False
    model = Point(torch.randn(2, 4, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sync = Sync(model, optimizer, outer, Communicator(), SyncOptions(selection=Given(masks.tolist())))
    a, u, v = model.x.detach().flatten().clone(), torch.zeros(8).double(), torch.zeros(8).double()
    for t, mask in enumerate(masks):
        y = torch.randn(8, dtype=torch.float64)
        g = a - y
        if reference == "nesterov":
            u = torch.where(mask, 0.9 * u + g, u)
            step = 0.7 * (g + 0.9 * u)
        elif reference == "slow":
            u = torch.where(mask, 0.5 * u + g / 0.1, u)
            step = 0.8 * 0.1 * u
        else:
            u, v = torch.where(mask, 0.9 * u + 0.1 * g, u), torch.where(mask, 0.999 * v + 0.001 * g**2, v)
            step = 0.1 * (u / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        a = torch.where(mask, a - step, a)
        model.x.data = y.view(2, 4).clone()
        sync.launch(t, WorkerStatus(1))
        sync.finish()
        torch.testing.assert_close(model.x.detach().flatten(), torch.where(mask, a, y), rtol=0, atol=1e-12)
    states = [s for s in sync.outer.state[sync.outer.param_groups[0]["params"][0]].values() if s.numel() > 1]
    assert all(s.shape == (2, 4) and s.flatten()[1] == 0 for s in states)


@pytest.mark.parametrize(
    ("outer", "what"),
    [(LearnedOptimizer, "its statistics of rows"), (torch.optim.Adafactor, "its state 'row_var'")],
)
def test_outer_steps_that_need_whole_tensors_are_refused(outer, what):
    with pytest.raises(ValueError, match=f"cannot step random coordinates of a tensor: {what}"):
        _run(0, SyncOptions(density=0.5), outer=outer)


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


def _late(rank):
    model = Point(torch.zeros(4))
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 3, options=SyncOptions(overlap_steps=2))
    seconds = []
    for step in range(3):
        if rank == 1 and step == 0:
            time.sleep(1.0)
        start = time.monotonic()
        rounds.step()
        seconds.append(time.monotonic() - start)
    return seconds, rounds.last_report


def test_nobody_waits_at_the_launch():
    """A worker comes a second late: with overlap the other one goes on, and waits at the finish only."""
    (seconds, report), _ = run_workers(_late, 2)
    assert max(seconds[:2]) < 0.3
    assert seconds[2] > 0.5
    assert report.transfer_seconds > 0.5


OPTIONS = {
    "loscar": (SyncOptions(density=0.5, overlap_steps=2, compression="int8"), partial(SlowMomentum, momentum=0.5)),
    "fragments": (
        SyncOptions(selection=Fragments(2), overlap_steps=1),
        partial(LearnedOptimizer, network=AdaMLP(seed=1)),
    ),
    "lagg": (SyncOptions(overlap_steps=2, compression="bf16"), partial(LearnedOptimizer, network=AdaMLP(2, seed=1))),
    "topk": (SyncOptions(compression=TopK(0.2), merge=0.5, overlap_steps=3), partial(torch.optim.Adam, lr=0.1)),
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


@pytest.mark.parametrize("name", OPTIONS)
def test_resumes_bitwise_from_every_step(name):
    ends = run_workers(_resumed, 2, name)
    for resumed, whole in ends:
        assert torch.equal(resumed, whole)
    assert not torch.equal(ends[0][1], ends[1][1])  # in mid-round


def _disagree(rank):
    with pytest.raises(RuntimeError, match="how parameters travel"):
        _run(rank, SyncOptions(density=(rank + 1) / 2))
    return True


def test_workers_with_other_settings_are_an_error():
    assert run_workers(_disagree, 2) == [True, True]


def _other_coordinates(rank):
    model = Point(torch.zeros(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sync = Sync(model, optimizer, None, Communicator(), SyncOptions(density=0.5))
    sync._cargo.picks = RandomCoordinates(0.5, seed=rank)
    sync.launch(0, WorkerStatus(1, "launch"))
    with pytest.raises(RuntimeError, match="coordinates to send"):
        sync.finish()
    return True


def test_workers_with_other_coordinates_are_an_error():
    assert run_workers(_other_coordinates, 2) == [True, True]


def _evaluated(rank):
    """The mean of the workers, in mid-flight, and then on as if nothing had been."""
    torch.manual_seed(0)
    model = Point(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rounds = Rounds(model, optimizer, 4, options=SyncOptions(density=0.5, overlap_steps=2, compression="int8"))
    own = _move(rounds, model, rank, 3)[-1]
    rounds.swap_in("mean")
    seen = model.x.detach().clone()
    rounds.swap_out()
    assert torch.equal(model.x, own)
    return own, seen, _move(rounds, model, rank, 3)


def _unevaluated(rank):
    model = Point(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rounds = Rounds(model, optimizer, 4, options=SyncOptions(density=0.5, overlap_steps=2, compression="int8"))
    return _move(rounds, model, rank, 6)[3:]


def test_evaluating_in_flight_leaves_no_trace():
    (own, seen, after), (other, _, _) = run_workers(_evaluated, 2)
    torch.testing.assert_close(seen, (own + other) / 2, rtol=0, atol=1e-15)
    assert torch.equal(after, run_workers(_unevaluated, 2)[0])
