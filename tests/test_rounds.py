"""Rounds and Sync without Lightning: closed forms, identities, packing, what travels and when."""

from __future__ import annotations

import math
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_lopt import (
    QSR,
    AdaMLP,
    DisagreementError,
    Fragments,
    LearnedOptimizer,
    Rounds,
    SlowMomentum,
    SyncOptions,
    TopK,
)
from tests.processes import run_workers


def _constant_gradient_run(rank, local_steps, num_steps, total_steps=None, outer=None):
    """One scalar parameter at 3; worker r's gradient is r, learning rate 1: it moves by -r per step."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rounds = Rounds(model, optimizer, local_steps, outer, total_steps)
    trajectory, synced = [], []
    for step in range(1, num_steps + 1):
        model.weight.grad = torch.full_like(model.weight, float(rank))
        optimizer.step()
        if rounds.step():
            synced.append(step)
        trajectory.append(model.weight.item())
    return trajectory, synced, rounds.last_report


def test_closed_form_of_averaging():
    # worker 0: 3 3 | 2 2 2 | 1        worker 2: 3 1 -> mean of 3, 3-2·2=-1, 3-2·1=1 is 1 ...
    # with gradients 0, 1, 2 and H = 2: the mean moves by -1 per step: 3 -> 1 -> -1, in between 3 - r
    results = run_workers(_constant_gradient_run, 3, 2, 4)
    for rank, (trajectory, synced, report) in enumerate(results):
        assert trajectory == [3 - rank, 1, 1 - rank, -1]
        assert synced == [2, 4]
        # at the second sync the workers are at 1, -1, -3: distances 2, 0, 2 from their mean
        assert report.pseudo_grad_norm == 2
        assert report.drift == pytest.approx((8 / 3) ** 0.5)


def test_closed_form_of_slow_momentum():
    # g = 1·H = 2 per round; u = 2, then .5·2 + 2 = 3: 3 -> 1 -> -2
    results = run_workers(_constant_gradient_run, 3, 2, 4, None, partial(SlowMomentum, momentum=0.5))
    assert all(trajectory[1::2] == [1, -2] for trajectory, _, _ in results)


@pytest.mark.parametrize(
    ("local_steps", "total", "expected"),
    [(3, 8, [3, 6, 8]), (3, None, [3, 6]), (1, 3, [1, 2, 3]), (100, 8, [8]), (4, 8, [4, 8])],
)
def test_step_numbers_of_syncs(local_steps, total, expected):
    _, synced, _ = _constant_gradient_run(0, local_steps, 8 if total is None else total, total)
    assert synced == expected


def test_any_callable_is_a_schedule():
    seen = []

    def schedule(info):
        seen.append((info.round_idx, info.step, info.total_steps, info.lr))
        return info.round_idx + 1

    _, synced, _ = _constant_gradient_run(0, schedule, 7, 7)
    assert synced == [1, 3, 6, 7]
    assert seen == [(0, 0, 7, 1.0), (1, 1, 7, 1.0), (2, 3, 7, 1.0), (3, 6, 7, 1.0)]


def _train(rank, num_workers, outer, local_steps=4, num_steps=12, lr=0.1, dtype=torch.float64, whole=False):
    """A small net on random data, each worker on its own rows (`whole`: everybody on all rows)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    x, y = torch.randn(num_steps, 4 * num_workers, 5, dtype=dtype), torch.randint(0, 3, (num_steps, 4 * num_workers))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rounds = Rounds(model, optimizer, local_steps, outer) if local_steps else None
    rows = slice(None) if whole else slice(4 * rank, 4 * rank + 4)
    for inputs, labels in zip(x, y, strict=True):
        nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rounds:
            rounds.step()
    return [p.detach().clone() for p in model.parameters()]


def _nesterov(lr, momentum):
    return partial(torch.optim.SGD, lr=lr, momentum=momentum, nesterov=momentum > 0)


@pytest.mark.parametrize(
    "outer",
    [partial(SlowMomentum, lr=1.0, momentum=0.0), _nesterov(1.0, 0.0)],
    ids=["SlowMo(momentum=0, lr=1)", "DiLoCo(momentum=0, lr=1)"],
)
def test_identities_with_local_sgd(outer):
    ours = run_workers(_train, 2, 2, outer)
    plain = run_workers(_train, 2, 2, None)
    for a, b in zip(ours[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_one_local_step_is_data_parallel_sgd():
    local = run_workers(_train, 2, 2, None, 1)
    parallel = _train(0, 2, None, None, whole=True)  # SGD on the joint batch
    for a, b in zip(local[0], parallel, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_worker_is_no_strategy(dtype):
    for a, b in zip(_train(0, 1, None, dtype=dtype), _train(0, 1, None, None, dtype=dtype), strict=True):
        assert torch.equal(a, b)


def _packing(rank, seed):
    """Every element and every buffer is averaged exactly once, whatever sizes and types."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    model = nn.Module()
    for i in range(6):
        shape = torch.randint(0, 5, (int(torch.randint(0, 4, (), generator=generator)),), generator=generator)
        dtype = dtypes[int(torch.randint(0, 4, (), generator=generator))]
        values = torch.randint(-8, 8, tuple(shape.tolist()), generator=generator).to(dtype)
        model.register_parameter(f"p{i}", nn.Parameter(values))
        model.register_buffer(f"b{i}", values.clone())
        model.register_buffer(f"n{i}", values.to(torch.int32))
    model.register_buffer("mask", torch.full((3,), float("-inf")))
    model.register_parameter("last", nn.Parameter(torch.zeros(3)))
    start = {name: t.detach().clone() for name, t in model.state_dict().items()}
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if name != "mask":
                t.add_(2 * rank)  # 0 and 2: the mean is 1, the maximum 2
    rounds.step()
    for name, t in model.state_dict().items():
        shift = 0 if name == "mask" else 2 if name.startswith("n") else 1
        assert torch.equal(t, start[name] + shift), name
    return True


def test_packing():
    for seed in range(3):
        assert run_workers(_packing, 2, seed) == [True, True]


def _count_collectives(rank):
    """The names of all torch.distributed calls per step, with H = 3."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rounds = Rounds(model, optimizer, 3)
    calls: list[str] = []
    names = ["all_reduce", "broadcast", "all_gather", "barrier", "all_gather_object", "gather_object", "reduce"]
    for name in names:
        setattr(dist, name, _recording(name, getattr(dist, name), calls))
    per_step = []
    for _ in range(6):
        model(torch.randn(4, 2)).square().mean().backward()
        optimizer.step()
        rounds.step()
        per_step.append(len(calls))
        calls.clear()
    return per_step, rounds.comm.bytes_sent


def _recording(name, function, calls):
    def wrapper(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    return wrapper


def test_nothing_travels_between_syncs():
    # a sync: the agreement, the floats, and the integers (BatchNorm's counter)
    assert [steps for steps, _ in run_workers(_count_collectives, 2)] == [[0, 0, 3, 0, 0, 3]] * 2


def _lines(function):
    """Where this package is while a function runs, line by line."""
    seen = []

    def trace(frame, event, _):
        if "lightning_lopt" not in frame.f_code.co_filename:
            return None
        if event == "line":
            seen.append((frame.f_code.co_name, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return seen


OPTIONS = {
    "sparse, in flight": {"options": SyncOptions(density=0.5, overlap_steps=3, merge=0.5)},
    "streaming": {"options": SyncOptions(selection=Fragments(2), compression=TopK(0.5), local_state="reset")},
    "sharded": {"options": SyncOptions(sharded=True), "outer_optimizer": partial(LearnedOptimizer, network="default")},
    "measured": {"worker_speeds": "measured"},
    "schedule": {"local_steps": QSR(alpha=1.0, base_steps=8), "total_steps": 40},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_option_costs_a_line_between_syncs(options):
    steps = []
    for some in ({}, options):
        model = nn.Linear(2, 2)
        rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), **{"local_steps": 8, **some})
        rounds.step()
        steps.append(_lines(rounds.step))
    plain, other = steps
    assert plain == other
    assert 0 < len(plain) < 8


def _disagree(rank):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rounds = Rounds(model, optimizer, 2)
    rounds.step()
    if rank == 1:
        rounds.round_idx += 1
    with pytest.raises(DisagreementError, match=r"disagree on round \(between 0 and 1\)"):
        rounds.step()
    return True


def test_workers_in_different_rounds_are_an_error():
    assert run_workers(_disagree, 2) == [True, True]


def _different_models(rank):
    model = nn.Linear(3, 1 + rank)
    with pytest.raises(DisagreementError, match=r"'weight \(1, 3\) torch.float32' against 'weight \(2, 3\)"):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    return True


def test_different_models_are_an_error():
    assert run_workers(_different_models, 2) == [True, True]


def _different_outer(rank, factories):
    model = nn.Linear(3, 1)
    with pytest.raises(DisagreementError, match="outer optimizer"):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, factories[rank])
    return True


@pytest.mark.parametrize(
    "factories",
    [
        [None, SlowMomentum],
        [partial(SlowMomentum, momentum=0.5), partial(SlowMomentum, momentum=0.9)],
        [partial(LearnedOptimizer, network=AdaMLP(seed=seed)) for seed in range(2)],
    ],
)
def test_different_outer_optimizers_are_an_error(factories):
    assert run_workers(_different_outer, 2, factories) == [True, True]


def _start(rank):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    return [t.clone() for t in model.state_dict().values()]


def test_all_start_from_rank_0():
    first, second = run_workers(_start, 2)
    torch.manual_seed(0)
    assert torch.equal(first[0], nn.Linear(2, 2).weight)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _unfreeze(rank):
    """A parameter that is unfrozen, or added, in mid-training joins the syncs: its first one is an average."""
    model = nn.ParameterList([torch.zeros(2), torch.zeros(2), torch.zeros(2)])
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(list(model)[:2], lr=1.0)
    rounds = Rounds(model, optimizer, 1, partial(SlowMomentum, momentum=0.0))

    def move():
        with torch.no_grad():
            for p in model:
                if p.requires_grad:
                    p.sub_(float(rank))
        rounds.step()
        return [p[0].item() for p in model]

    seen = []
    model[2].requires_grad_(False)
    seen.append(move())
    model[1].requires_grad_(True)
    seen.append(move())
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": [model[2]]})
    seen += [move(), move()]
    return seen


def test_unfrozen_and_added_parameters():
    expected = [[-0.5, 0, 0], [-1, -0.5, 0], [-1.5, -1, -0.5], [-2, -1.5, -1]]
    assert run_workers(_unfreeze, 2) == [expected, expected]


def _swap(rank):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    nn.init.zeros_(model[0].weight)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 3)
    with torch.no_grad():
        model[0].weight.sub_(rank)
        model[1].running_mean.add_(rank)
        model[1].num_batches_tracked.add_(1 + rank)
    rounds.step()
    seen, pointers = [], [t.data_ptr() for t in model.state_dict().values()]
    for weights in ("anchor", "mean"):
        rounds.swap_in(weights)
        seen.append((model[0].weight.item(), model[1].running_mean.item(), model[1].num_batches_tracked.item()))
        rounds.swap_out()
        assert model[0].weight.item() == -rank
        assert model[1].running_mean.item() == rank
    assert pointers == [t.data_ptr() for t in model.state_dict().values()]
    rounds.abandon_round()
    assert (model[0].weight.item(), model[1].running_mean.item(), rounds.step_idx) == (0, 0, 0)
    return seen


def test_global_weights_come_with_their_buffers():
    assert run_workers(_swap, 2) == [[(0, 0, 0), (-0.5, 0.5, 2)]] * 2


def _lagg(rank, num_inputs):
    model = nn.Linear(3, 2)
    outer = partial(LearnedOptimizer, network=AdaMLP(inputs=num_inputs, seed=0))
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, outer)
    return rounds.sync.outer is not None


def test_lagg_belongs_to_its_number_of_workers():
    assert run_workers(_lagg, 2, 2) == [True, True]
    with pytest.raises(RuntimeError, match="belongs to 3 workers, but there are 2"):
        run_workers(_lagg, 2, 3)


@pytest.mark.parametrize(("kind", "match"), [("LBFGS", "needs closure"), ("SparseAdam", "needs sparse gradients")])
def test_an_outer_optimizer_that_no_sync_can_step(kind, match):
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=f"{kind} cannot be the outer optimizer: its step {match}"):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, getattr(torch.optim, kind))


class _Explode(torch.optim.SGD):
    max_update_ratio = 10.0


@pytest.mark.parametrize(("lr", "fell_back"), [(9.0, False), (11.0, True), (float("nan"), True)])
def test_a_step_that_is_too_large_or_not_finite_becomes_an_average(lr, fell_back):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    factory = partial(_Explode, lr=1.0)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1, factory)
    rounds.sync.outer.param_groups[0]["lr"] = lr
    with torch.no_grad():
        model.weight.sub_(1)
    if fell_back:
        with pytest.warns(UserWarning, match="averaged instead"):
            rounds.step()
    else:
        rounds.step()
    assert rounds.last_report.fell_back == fell_back
    assert model.weight.item() == (2.0 if fell_back else 3.0 - lr)


def test_nothing_to_train():
    model = nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1)


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, None, math.nan])
def test_a_schedule_that_returns_nonsense(wrong):
    model = nn.Linear(1, 1)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), lambda info: wrong)
    with pytest.raises(ValueError, match=f"returned {wrong} local steps"):
        rounds.step()


def test_a_schedule_may_return_any_kind_of_integer():
    model = nn.Linear(1, 1)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), lambda info: torch.tensor(2))
    assert [rounds.step(), rounds.step(), type(rounds.last_report.local_steps)] == [False, True, int]


def test_a_state_of_another_outer_optimizer():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = Rounds(model, optimizer, 1, SlowMomentum).state_dict()
    with pytest.raises(ValueError, match="outer optimizer SlowMomentum; here there are 2 parameters and SGD"):
        Rounds(model, optimizer, 1, partial(torch.optim.SGD, lr=1.0)).load_state_dict(state)


def _fresh(num_steps, state=None):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rounds = Rounds(model, optimizer, 3, partial(LearnedOptimizer, network=AdaMLP(seed=1)))
    x = torch.randn(20, 8, 4)
    if state is not None:
        rounds.load_state_dict(state["rounds"])
        rounds.sync.load_local_state(state["local"])
        optimizer.load_state_dict(state["optimizer"])
    for i in range(rounds.step_idx, num_steps):
        model(x[i]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        rounds.step()
    state = {"rounds": rounds.state_dict(), "local": rounds.sync.local_state(), "optimizer": optimizer.state_dict()}
    return state, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("stop", range(7))
def test_state_dict_resumes_bitwise_from_every_step(stop, tmp_path):
    _, whole = _fresh(10)
    state, _ = _fresh(stop)
    torch.save(state, tmp_path / "state.pt")
    _, resumed = _fresh(10, torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize(
    ("momentum", "options", "wanted"),
    [
        (0.9, SyncOptions(), 0.9),
        (None, SyncOptions(), 0.0),
        (0.9, SyncOptions(local_state="reset"), 0.0),
        (0.9, SyncOptions(selection=Fragments(2)), 0.81),
    ],
)
def test_the_outer_optimizer_is_told_the_local_momentum(momentum, options, wanted):
    """Of fragments each has twice the steps for it to fade."""
    model, made = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), []
    if momentum is None:
        local: torch.optim.Optimizer = torch.optim.AdamW(model.parameters())
    else:
        local = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)

    def outer(params):
        made.append(torch.optim.SGD(params, lr=1.0))
        return made[0]

    rounds = Rounds(model, local, 4, outer, options=options)
    for _ in range(4):
        model(torch.randn(3, 2)).sum().backward()
        local.step()
        rounds.step()
    assert made[0].param_groups[0]["local_momentum"] == pytest.approx(wanted)
