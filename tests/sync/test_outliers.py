"""Workers that diverge, on real processes: who is left out, what the others average, how it goes on."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from lightning_lopt import AdaMLP, Fragments, LearnedOptimizer, PowerSGD, Rounds, SlowMomentum, SyncOptions, TopK
from lightning_lopt.comm import DisagreementError
from lightning_lopt.sync.replica import CHECK_EVERY
from tests.processes import run_cases, run_workers
from tests.threads import run_threads

H = 3
WORKERS = {
    "average": (SyncOptions(), None),
    "optimizer": (SyncOptions(), partial(SlowMomentum, momentum=0.5)),
    "sharded": (SyncOptions(sharded=True), partial(SlowMomentum, momentum=0.5)),
    "in flight": (SyncOptions(overlap_steps=1), partial(SlowMomentum, momentum=0.5)),
    "int8": (SyncOptions(compression="int8"), None),
    "top-k": (SyncOptions(compression=TopK(0.5)), None),
    "factors": (SyncOptions(compression=PowerSGD(2)), None),
    "average of states": (SyncOptions(local_state="average"), None),
}


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()


def _train(rank, options, outer, num_workers, spoiled=(), num_rounds=3, spoil=math.nan, momentum=0.9):
    """Rounds in which the gradients of some (round, worker) are spoiled; model, optimizer, rounds, warnings, reports.

    Worker k draws the data of `k % num_workers`.
    """
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    rounds = Rounds(model, optimizer, H, outer, options=options)
    reports = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(num_rounds * H):
            generator = torch.Generator().manual_seed(100 * step + rank % num_workers)
            optimizer.zero_grad()
            model(torch.randn(8, 6, generator=generator, dtype=torch.float64)).square().mean().backward()
            if (step // H, rank) in spoiled:
                for p in model.parameters():
                    p.grad.mul_(spoil)
                model[1].running_mean.mul_(spoil)
            optimizer.step()
            if rounds.step():
                reports.append(rounds.last_report)
    return model, optimizer, rounds, [str(w.message) for w in caught], reports


def _state(rank, *args):
    model, optimizer, _, said, reports = _train(rank, *args)
    momenta = torch.cat([s["momentum_buffer"].flatten() for s in optimizer.state.values() if s] or [torch.zeros(0)])
    values = torch.cat([t.double().flatten() for t in model.state_dict().values()])
    return values, momenta, said, [r.left_out for r in reports]


@pytest.fixture(scope="module")
def spoiled():
    """Three workers, of which one is spoiled in the last round; or two, in others of six rounds."""
    last = {f"{name} {spoil}": (*WORKERS[name], 3, [(0, 2)], 1, spoil) for name in WORKERS for spoil in (math.nan, 1e4)}
    recovers = {f"{name} recovers": (*WORKERS[name], 3, [(1, 1), (3, 1), (3, 0)], 6) for name in WORKERS}
    return run_cases(_state, 3, last | recovers)


@pytest.fixture(scope="module")
def without():
    """The same two workers without the third."""
    return run_cases(_state, 2, {name: (*WORKERS[name], 3, [], 1) for name in WORKERS})


@pytest.mark.parametrize("spoil", [math.nan, 1e4])
@pytest.mark.parametrize("name", WORKERS)
def test_the_others_go_on_as_if_it_were_not_there(spoiled, without, name, spoil):
    """Worker 2 of 3 is spoiled in the last round: the mean is that of workers 0 and 1, up to what compression loses."""
    options, _ = WORKERS[name]
    results = spoiled[f"{name} {spoil}"]
    atol = 0.02 if options.compression else 1e-12
    for (values, _, _, left_out), (reference, *_) in zip(results[:2], without[name], strict=True):
        torch.testing.assert_close(values, reference, rtol=0, atol=atol)
        assert left_out == [1]
    if not options.overlap_steps:
        assert torch.equal(results[2][0], results[0][0])
    else:
        assert results[2][0].isfinite().all()


@pytest.mark.parametrize("name", WORKERS)
def test_it_recovers_and_this_is_said_once(spoiled, name):
    results = spoiled[f"{name} recovers"]
    for rank, (values, momenta, said, left_out) in enumerate(results):
        assert torch.cat([values, momenta]).isfinite().all()
        assert left_out == [0, 1, 0, 2, 0, 0]
        assert len(said) == (rank == 0)
    assert "Round 1 leaves out worker 1 (not finite)" in results[0][2][0]


def _owned(optimizer):
    return [p for p in optimizer.param_groups[0]["params"] if p.grad is not None]


def _lagg(rank, options, spoiled):
    """The network's input of one round: every worker's pseudo-gradient of the first tensor, [K, *S]."""
    seen = []
    outer = partial(LearnedOptimizer, network=AdaMLP(3, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        step = LearnedOptimizer.step

        def spy(self, closure=None):
            seen.extend((p.worker_grads.clone(), p.grad.clone()) for p in _owned(self))
            return step(self, closure)

        patch.setattr(LearnedOptimizer, "step", spy)
        model, *_ = _train(rank, options, outer, 3, spoiled, 1)
    return seen, torch.cat([p.detach().flatten() for p in model.parameters()])


LAGG = {"plain": SyncOptions(), "sharded": SyncOptions(sharded=True), "bf16": SyncOptions(compression="bf16")}


@pytest.fixture(scope="module")
def lagg():
    cases = {f"{name} {bool(bad)}": (options, bad) for name, options in LAGG.items() for bad in ([], [(0, 1)])}
    return run_cases(_lagg, 3, cases)


@pytest.mark.parametrize("name", LAGG)
def test_lagg_sees_the_mean_of_the_others_in_its_place(lagg, name):
    results, healthy = lagg[f"{name} True"], lagg[f"{name} False"]
    for (seen, values), (before, _) in zip(results, healthy, strict=True):
        assert torch.equal(values, results[0][1])
        for (workers, mean), (whole, _) in zip(seen, before, strict=True):
            others = whole[[0, 2]]
            torch.testing.assert_close(workers, torch.stack([others[0], others.mean(0), others[1]]))
            torch.testing.assert_close(mean, others.mean(0))


def _skipped(rank, name):
    options, outer = WORKERS[name]
    model, _, rounds, said, reports = _train(rank, options, outer, 2, [(1, 0), (1, 1)], 2)
    kept, *_ = _train(rank, options, outer, 2, [], 1)
    equal = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), kept.state_dict().values(), strict=True))
    return equal, rounds.synced, said, reports[-1]


AT_ONCE = [name for name in WORKERS if name != "in flight"]


@pytest.fixture(scope="module")
def skipped():
    return run_cases(_skipped, 2, {name: (name,) for name in AT_ONCE})


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_round_without_anybody_is_skipped(skipped, name):
    for rank, (equal, synced, said, report) in enumerate(skipped[name]):
        assert equal
        assert synced
        assert (report.left_out, report.pseudo_grad_norm, report.drift) == (2, 0, 0)
        assert rank or "Round 1 is skipped: it leaves out worker 0 (not finite), worker 1 (not finite)" in said[0]


def test_one_worker_alone_keeps_its_anchor():
    model = nn.Linear(2, 1)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1)
    before = model.weight.clone()
    model.weight.data.fill_(torch.inf)
    with pytest.warns(UserWarning, match="Round 0 is skipped"):
        rounds.step()
    assert torch.equal(model.weight, before)


def _two(rank, make_comm, sizes):
    """Rounds in which each worker moves as far as it is told; who was left out, and where it ends."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1, comm=make_comm())
    seen = []
    with torch.no_grad():
        for row in sizes:
            model.weight.add_(row[rank])
            rounds.step()
            seen.append(rounds.last_report.left_out)
    return seen, model.weight.item()


@pytest.mark.filterwarnings("ignore:Round . leaves out")
@pytest.mark.parametrize(
    ("sizes", "left_out", "end"),
    [
        ([(1, 1), (1, 11)], [0, 1], 2.0),
        ([(1, 1), (1, 9)], [0, 0], 6.0),
        ([(1, 100)], [0], 50.5),  # two of them, and no round before
        ([(1, 1), (1, 50), (1, 50)], [0, 1, 1], 3.0),
        ([(1, 1), (100, 120), (0, 5000), (0, 7)], [0, 0, 0, 0], 2614.5),  # all change, or stand still: no outlier
    ],
)
def test_two_workers_are_judged_by_the_round_before(sizes, left_out, end):
    for seen, value in run_threads(_two, 2, sizes):
        assert seen == left_out
        assert value == pytest.approx(end)


def _resumed(rank, stop):
    """A run in which worker 1 is wild in round 1, and the same stopped after a step and resumed."""

    def steps(model, rounds, optimizer, num):
        for _ in range(num):
            for p in model.parameters():
                p.grad = torch.full_like(p, 100.0 if rank and rounds.step_idx >= H else 1.0)
            optimizer.step()
            rounds.step()

    def new():
        model = _model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, Rounds(model, optimizer, H, SlowMomentum, options=SyncOptions(overlap_steps=1)), optimizer

    ends = []
    for resume in (False, True):
        parts = new()
        steps(*parts, stop)
        if resume:
            state, local = parts[1].state_dict(), parts[1].sync.local_state()
            parts = new()
            parts[1].load_state_dict(state)
            parts[1].sync.load_local_state(local)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps(*parts, 2 * H - stop)
        ends.append((parts[1].last_report.left_out, torch.cat([p.detach().flatten() for p in parts[0].parameters()])))
    return ends


STOPS = (H, H + 1, 2 * H - 1)  # the last in flight


@pytest.fixture(scope="module")
def resumed_runs():
    return run_cases(_resumed, 2, {str(stop): (stop,) for stop in STOPS})


@pytest.mark.parametrize("stop", STOPS)
def test_a_resumed_run_leaves_out_the_same(resumed_runs, stop):
    for (left_out, whole), (again, resumed) in resumed_runs[str(stop)]:
        assert left_out == again == 1
        assert torch.equal(whole, resumed)


def _silent(rank, make_comm, at):
    """Something writes to one worker's anchor before a sync; the sync at which it is noticed."""
    model = nn.Linear(3, 3)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1, SlowMomentum, comm=make_comm())
    for i in range(CHECK_EVERY + 2):
        if i == at and rank:
            rounds.sync.outer.param_groups[0]["params"][0].view(-1)[:2] += torch.tensor([1e-3, -1e-3])
        try:
            rounds.step()
        except DisagreementError as error:
            return i, "the global weights" in str(error)
    return None


@pytest.mark.parametrize(("at", "noticed"), [(0, 0), (1, 1), (2, CHECK_EVERY)])
def test_anchors_that_silently_differ_are_an_error(at, noticed):
    assert run_threads(_silent, 2, at) == [(noticed, True)] * 2


def _in_fragments(rank):
    options = SyncOptions(selection=Fragments(3), local_state="keep")
    model = _model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rounds = Rounds(model, optimizer, 6, options=options)
    for step in range(24):
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)
        (model(x) * (math.nan if step == 7 and rank == 1 else 1.0)).square().mean().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
            rounds.step()
    return all(p.isfinite().all() for p in model.state_dict().values()), [
        bool(v.isfinite().all()) for s in optimizer.state.values() for v in s.values()
    ]


def test_tensors_that_were_not_sent_come_back_too():
    for model, states in run_workers(_in_fragments, 2):
        assert all([model, *states])


def _fast(rank, make_comm, wild):
    """Worker 0 takes 200 steps in a round, the others 5; in the second round one takes steps fifty times as long."""
    speeds = [40, 1, 1, 1]
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rounds = Rounds(model, optimizer, 200, comm=make_comm(), worker_speeds=speeds)
    seen = []
    for round_idx in range(2):
        model.weight.grad = torch.full_like(model.weight, 50.0 if round_idx == 1 and rank == wild else 1.0)
        for _ in range(200 if rank == 0 else 5):
            optimizer.step()
            rounds.step()
        seen.append(rounds.last_report.left_out)
    return seen


@pytest.mark.filterwarnings("ignore:Round 1 leaves out")
@pytest.mark.parametrize("wild", [None, 0, 3])
def test_a_fast_worker_is_not_an_outlier(wild):
    expected = [0, 0 if wild is None else 1]
    assert run_threads(_fast, 4, wild) == [expected] * 4
