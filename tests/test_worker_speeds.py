"""Unequal speeds and unequal data: who takes how many steps, and that every step counts."""

from __future__ import annotations

import math
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lightning_lopt import Fragments, Rounds, SlowMomentum, SyncOptions
from lightning_lopt.sync.status import SyncPoint
from lightning_lopt.worker_speeds import WorkerSpeeds
from tests.processes import run_cases, run_workers
from tests.threads import run_threads

CPU = torch.device("cpu")
OPTIONS = {
    "everything": SyncOptions(),
    "in flight": SyncOptions(overlap_steps=2),
    "loscar": SyncOptions(overlap_steps=2, density=0.5),
    "streaming": SyncOptions(overlap_steps=1, selection=Fragments(2)),
    "sharded": SyncOptions(overlap_steps=1, sharded=True),
}


@pytest.mark.parametrize(
    ("speeds", "local_steps", "overlap", "expected"),
    [
        ([3, 1], 48, 16, [(48, 16), (16, 6)]),
        ([1, 1, 2], 5, 1, [(2, 1), (2, 1), (5, 1)]),
        ([100, 1], 10, 9, [(10, 9), (1, 0)]),
        (None, 7, 9, [(7, 6), (7, 6)]),
        ("measured", 7, 2, [(7, 2), (7, 2)]),
    ],
)
def test_steps_in_proportion_to_speed(speeds, local_steps, overlap, expected):
    paces = [WorkerSpeeds(speeds, len(expected), rank, CPU) for rank in range(len(expected))]
    steps = [speeds.steps(local_steps) for speeds in paces]
    assert [(n, speeds.overlap(overlap, n)) for n, speeds in zip(steps, paces, strict=True)] == expected


@pytest.mark.parametrize(
    "speeds",
    [[1, 0], [1, -1], [1, math.inf], [1, math.nan], [1e300, 1e-300], "fast", "", [], ["3", "1"], 3, np.ones(2)],
    ids=str,
)
def test_wrong_speeds(speeds):
    with pytest.raises(ValueError, match="must be a list of positive numbers, one per worker"):
        WorkerSpeeds(speeds, 2, 0, CPU)


@pytest.mark.parametrize("speeds", [[1.0], (1, 2, 3)])
def test_speeds_of_another_number_of_workers(speeds):
    with pytest.raises(ValueError, match=f"{len(speeds)} numbers, but there are 2 workers"):
        WorkerSpeeds(speeds, 2, 0, CPU)


def test_measured_speed(monkeypatch):
    """3 s for 2 steps, then half as long; the other worker needs 1 s."""
    now = iter([10.0, 13.0, 20.0, 21.5, 30.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    speeds = WorkerSpeeds("measured", 2, 1, CPU)
    speeds.start(1)
    speeds.start(2)  # it has begun
    seconds = speeds.measure(3)
    assert seconds == 1.5
    assert speeds.measure(3) == 0  # nothing more to tell, and nobody has heard
    speeds.update([0.0, seconds])
    assert speeds.steps(12) == 12  # the other one is not known yet
    speeds.update([1.0, seconds])
    assert speeds.steps(12) == 8
    speeds.start(0)
    assert speeds.measure(2) == (1.5 + 0.75) / 2
    speeds.start(0)
    speeds.forget()
    assert speeds.measure(9) == 1.5


class _Recording(SlowMomentum):
    """Notes what a sync writes into the groups."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.seen = []

    def step(self, closure=None):
        self.seen.append((self.param_groups[0]["local_steps"], self.param_groups[0]["local_lr"]))
        return super().step(closure)


def _new(local_steps, outer=None, speeds=None, options=None, size=1, comm=None):
    model = nn.ParameterList([torch.zeros(size, dtype=torch.float64) for _ in range(2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rounds = Rounds(model, optimizer, local_steps, outer, comm=comm, options=options, worker_speeds=speeds)
    return model, optimizer, rounds


def _flat(model):
    return torch.cat([p.detach() for p in model]).numpy()


def _epoch(model, optimizer, rounds, gradient, num_steps):
    """The parameter's first coordinate after every step."""
    seen = []
    for _ in range(num_steps):
        for p in model:
            p.grad = torch.full_like(p, gradient)
        optimizer.step()
        rounds.step()
        seen.append(model[0][0].item())
    return seen


def _run(rank, gradients, batches, epochs=1, **options):
    model, optimizer, rounds = _new(**options)
    seen = []
    for epoch in range(epochs):
        seen += _epoch(model, optimizer, rounds, gradients[rank], batches[rank])
        rounds.join(SyncPoint.EPOCH_END, last=epoch == epochs - 1)
    return seen, _flat(model), rounds.round_idx, rounds.step_idx


def _run_threads(rank, make_comm, *args, **options):
    return _run(rank, *args, comm=make_comm(), **options)


def test_closed_form_of_unequal_speeds():
    # worker 0: -1 -2 -3 | -4.5 -5.5 -6.5 | -8    worker 1: -4 | -7.5 |     end: -8 and -7
    # means of each round: -3.5, then -(6.5 + 7.5)/2 = -7, and last -7.5
    fast, slow = run_threads(partial(_run_threads, local_steps=3, speeds=[3, 1]), 2, [1.0, 4.0], [7, 2])
    assert fast[0] == [-1, -2, -3.5, -4.5, -5.5, -7, -8]
    assert slow[0] == [-3.5, -7]
    assert fast[1].tolist() == slow[1].tolist() == [-7.5, -7.5]
    assert [run[2:4] for run in (fast, slow)] == [(3, 7), (3, 2)]


def test_closed_form_of_unequal_data():
    # H = 2. worker 0: -1 -2 | -3, and no more    worker 1: -1 -2 | -3 -4 | -4.5 -5.5 | -5.5
    # means: -2, -3.5, -4.5, and last -5: each of the 10 steps moves it by 1/2
    short, long = run_threads(partial(_run_threads, local_steps=2), 2, [1.0, 1.0], [3, 7])
    assert short[0] == [-1, -2, -3]
    assert long[0] == [-1, -2, -3, -3.5, -4.5, -4.5, -5.5]
    for run, steps in (short, 3), (long, 7):
        assert run[1].tolist() == [-5, -5]
        assert run[2:] == (4, steps)


BATCHES, GRADIENTS = [1, 13, 8, 0], [1.0, 2.0, 3.0, 4.0]
SPEEDS = {"the same": None, "given": [1, 4, 2, 3], "measured": "measured"}


def _end(rank, speeds, options):
    return _run(rank, GRADIENTS, BATCHES, 2, local_steps=6, speeds=speeds, size=8, options=options)[1:3]


@pytest.fixture(scope="module")
def ends():
    cases = {f"{s}, {o}": (speeds, options) for s, speeds in SPEEDS.items() for o, options in OPTIONS.items()}
    return run_cases(_end, 4, cases)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("speeds", SPEEDS)
def test_every_step_counts_the_same(ends, speeds, name):
    """The mean of 4 workers moves by 1/4 of each step, whoever takes it and whenever; in the end all have it."""
    expected = -2 * sum(n * g for n, g in zip(BATCHES, GRADIENTS, strict=True)) / 4
    results = ends[f"{speeds}, {name}"]
    for weights, rounds in results:
        assert weights == pytest.approx(expected, abs=1e-12)
        assert rounds == results[0][1]


def test_outer_optimizers_see_the_same_learning_rate_and_steps():
    """Schedules run with each worker's own steps; without an agreement the anchors would part."""
    for weights, seen in run_threads(_scheduled, 2):
        # g = 6 and lr 1: u = 6, a = -6; then lr max(.125, .5), g = (.75 + 3)/2: u = 3 + 3.75, a = -6 - .5·6.75
        assert seen[:2] == [(4, 1.0), (4, 0.5)]
        assert weights.tolist() == [-9.375, -9.375]


def _scheduled(rank, make_comm):
    outer = partial(_Recording, momentum=0.5)
    model, optimizer, rounds = _new(4, outer, [4, 2], comm=make_comm())
    for _ in range(2):
        _epoch(model, optimizer, rounds, 3.0 if rank else 1.5, 2 if rank else 4)
        optimizer.param_groups[0]["lr"] *= 0.5 if rank else 0.125
    return _flat(model), rounds.sync.outer.seen


def _resumed(rank, make_comm, speeds, stop, options):
    """Two epochs, and the same stopped after some steps of the second and resumed; the next round's steps."""
    parts = _new(6, speeds=speeds, options=options, size=3, comm=make_comm())
    _epoch(*parts, 1.0 + rank, (8, 3)[rank])
    parts[2].join()
    if speeds == "measured":
        parts[2].speeds.update([1.0, 3.0])
    done = min(stop, (12, 4)[rank])
    _epoch(*parts, 1.0 + rank, done)
    state, local = parts[2].state_dict(), parts[2].local_state()
    again = _new(6, speeds=speeds, options=options, size=3, comm=make_comm())
    again[2].load_state_dict(state)
    again[2].load_local_state(local)
    ends = []
    for model, optimizer, rounds in (parts, again):
        known = rounds.speeds.seconds[rank]
        rounds.speeds.measure = lambda step, known=known: known  # what is measured is not repeatable
        _epoch(model, optimizer, rounds, 1.0 + rank, (12, 4)[rank] - done)
        rounds.join()
        ends.append((_flat(model), rounds.round_idx, rounds.step_idx, rounds.speeds.steps(6)))
    return ends


@pytest.mark.parametrize(
    ("options", "speeds", "stop"),
    [("everything", [3, 1], 1), ("loscar", [3, 1], 0), ("everything", "measured", 0)],
)
def test_resume_takes_the_same_steps(speeds, stop, options):
    for rank, (whole, again) in enumerate(run_threads(_resumed, 2, speeds, stop, OPTIONS[options])):
        assert np.array_equal(whole[0], again[0])
        assert whole[1:] == again[1:]
        assert whole[2:] == ((20, 6), (7, 2))[rank]


def _slow(rank, speeds):
    """Rounds of which one worker's steps take four times as long; its steps, and how long the other one waits."""
    model, optimizer, rounds = _new(12, speeds=speeds)
    steps, waited = [], 0.0
    for _ in range(4):
        before = rounds.round_idx
        while rounds.round_idx == before:
            time.sleep(0.02 if rank else 0.005)
            _epoch(model, optimizer, rounds, 1.0, 1)
        steps.append(rounds.last_report.local_steps)
        waited += rounds.last_report.waited_seconds
    return steps, waited


def test_measured_speeds_end_the_waiting():
    (fast, waited), (slow, _) = run_workers(_slow, 2, "measured")
    assert fast == [12] * 4
    assert slow[0] == 12
    assert all(1 <= n <= 6 for n in slow[1:])
    (_, waited_before), _ = run_workers(_slow, 2, None)
    assert waited < 0.7 * waited_before
