"""Rounds and Sync without Lightning: closed forms, identities, packing, what travels and when."""

from __future__ import annotations

import math
import sys
from functools import partial

import pytest
import torch
from torch import nn

from lightning_lopt import (
    QSR,
    AdaMLP,
    BlendedNesterov,
    ControlledNesterov,
    DisagreementError,
    Fragments,
    LearnedOptimizer,
    PowerSGD,
    Rounds,
    SlowMomentum,
    SyncOptions,
    TopK,
)
from tests.processes import run_workers
from tests.threads import run_threads


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


def _train(
    rank, num_workers, outer, local_steps=4, num_steps=12, lr=0.1, dtype=torch.float64, whole=False, options=None
):
    """A small net on random data, each worker on its own rows (`whole`: everybody on all rows)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    x, y = torch.randn(num_steps, 4 * num_workers, 5, dtype=dtype), torch.randint(0, 3, (num_steps, 4 * num_workers))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rounds = Rounds(model, optimizer, local_steps, outer, options=options) if local_steps else None
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


@pytest.mark.parametrize("overlap_steps", [0, 1])
@pytest.mark.parametrize("outer", [None, _nesterov(1.0, 0.0)], ids=["mean", "SGD"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sharded": True},
        {"density": 0.5},
        {"selection": Fragments(2), "sharded": True},
        {"compression": TopK(1.0)},
        {"compression": PowerSGD(9)},
    ],
    ids=str,
)
def test_one_worker_is_no_strategy_with_any_options(options, outer, overlap_steps):
    options = SyncOptions(overlap_steps=overlap_steps, **options)
    found = _train(0, 1, outer, options=options)
    torch.testing.assert_close(found, _train(0, 1, None, None), rtol=0, atol=1e-6)  # TopK sends float32


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
    ("local_steps", "outer", "options", "match"),
    [
        (4, None, SyncOptions(overlap_steps=4), "no room for overlap_steps=4"),
        (8, None, SyncOptions(overlap_steps=4, selection=Fragments(2)), "2 fragments take turns"),
        (1, None, SyncOptions(selection=Fragments(2)), "no room"),
        (4, LearnedOptimizer, SyncOptions(density=0.5), "cannot step random coordinates"),
        (4, partial(LearnedOptimizer, network=AdaMLP(1)), SyncOptions(compression=PowerSGD()), "their mean alone"),
        (lambda info: 1, None, SyncOptions(selection=Fragments(2)), "must be at least as many"),
    ],
)
def test_wrong_combinations(local_steps, outer, options, match):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=match):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), local_steps, outer, options=options).step()


def _refused(rank, make_comm, worker_speeds):
    model, comm = torch.nn.Linear(2, 2), make_comm()
    with pytest.raises(ValueError, match="worker_speeds"):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 4, comm=comm, worker_speeds=worker_speeds)
    return comm.num_collectives


@pytest.mark.parametrize("worker_speeds", [[1, 2, 3], [1, 0], "fast"])
def test_arguments_are_checked_before_anything_is_sent(worker_speeds):
    assert run_threads(_refused, 2, worker_speeds) == [0, 0]


def test_arguments_are_checked_before_a_process_group_is_made(monkeypatch):
    made = []
    monkeypatch.setattr("lightning_lopt.rounds.Communicator", lambda: made.append(1))
    model, copy = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "local_steps": 4}
    for wrong, error, match in [
        ({"options": SyncOptions(overlap_steps=4)}, ValueError, "no room"),
        ({"options": {"overlap_steps": 1}}, TypeError, r"must be SyncOptions\(...\).* not {'overlap_steps': 1}"),
        ({"options": "int8"}, TypeError, r"must be SyncOptions"),
        ({"worker_speeds": [0.0]}, ValueError, "worker_speeds"),
        ({"total_steps": 0}, ValueError, "total_steps must be an integer >= 1"),
        ({"total_steps": 62.5}, ValueError, "total_steps must be an integer >= 1"),
        ({"outer_optimizer": AdaMLP.bundled()}, TypeError, "make an optimizer from param"),
        ({"elastic": "http://127.0.0.1:1"}, TypeError, r"must be Elastic\(...\), not 'http"),
        ({"outer_optimizer": torch.optim.SGD(copy.parameters(), lr=0.7)}, TypeError, "make an optimizer from param"),
        ({"optimizer": torch.optim.SGD(copy.parameters(), lr=0.1)}, ValueError, "none of the model's parameters"),
        ({"optimizer": model.parameters()}, TypeError, "a torch.optim.Optimizer, not Linear and generator"),
        ({"model": given["optimizer"], "optimizer": model}, TypeError, "Optimizer, not SGD and Linear"),
    ]:
        with pytest.raises(error, match=match):
            Rounds(**{**given, **wrong})
    assert not made


def test_wrong_arguments_that_are_seen_later():
    model = torch.nn.Linear(2, 2)
    make = partial(Rounds, model, torch.optim.SGD(model.parameters(), lr=0.1), 4)
    with pytest.raises(TypeError, match=r"must return a torch\.optim\.Optimizer, not None"):
        make(outer_optimizer=lambda groups: None)
    with pytest.raises(ValueError, match="'anchor' or 'mean', not 'anchors'"):
        make().swap_in("anchors")


@pytest.mark.parametrize("method", ["state_dict", "local_state"])
def test_states_of_something_else(method):
    model = torch.nn.Linear(2, 2)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 4)
    other = {"state_dict": "local_state", "local_state": "state_dict"}[method]
    for state in getattr(rounds, other)(), model.state_dict(), {}:
        with pytest.raises(ValueError, match=rf"no result of Rounds\.{method}\(\)"):
            getattr(rounds, f"load_{method}")(state)


SHAPES = {"embedding": (6, 4), "another": (6, 4), "bias": (5,), "kernel": (4, 2, 3, 3), "expert": (3, 2)}
UNUSED = {"embedding": [0, 4], "another": (slice(None), 2), "bias": 1, "kernel": (slice(None), 1), "expert": ...}
STAYING = {
    "mean": (None, {}),
    "mean, fragments": (None, {"selection": Fragments(2)}),
    "SGD, random coordinates": (_nesterov(0.7, 0.9), {"density": 0.5}),
    "SlowMo, int8": (SlowMomentum, {"compression": "int8"}),
    "blended": (BlendedNesterov, {}),
    "controlled, sharded": (ControlledNesterov, {"sharded": True}),
    "default": (LearnedOptimizer, {}),
    "default, bf16": (LearnedOptimizer, {"compression": "bf16"}),
    "default, TopK": (LearnedOptimizer, {"compression": TopK(0.5)}),
    "default, in flight": (LearnedOptimizer, {"overlap_steps": 1}),
    "default, sharded": (LearnedOptimizer, {"sharded": True}),
}


def _unused(rank, make_comm, outer, options, dtype=torch.float32):
    """Rounds in which parts of a model have no gradient on any worker, then some in which all have one."""
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    model = nn.ParameterDict({name: p.clone() for name, p in start.items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rounds = Rounds(model, optimizer, 2, outer, comm=make_comm(), options=SyncOptions(**options))
    generator.manual_seed(rank + 1)
    moved = []
    for some_unused in (True, False):
        moved.append({name: torch.zeros_like(p, dtype=torch.bool)[UNUSED[name]] for name, p in model.items()})
        for _ in range(6):
            for name, p in model.items():
                p.grad = torch.randn(p.shape, generator=generator).to(dtype) + 0.5
                if some_unused:
                    p.grad[UNUSED[name]] = 0
            optimizer.step()
            rounds.step()
            for name, p in model.items():  # in bfloat16 some come back
                moved[-1][name] |= (p != start[name])[UNUSED[name]]
    return moved


@pytest.mark.parametrize(
    ("outer", "options", "dtype"),
    [*((*staying, torch.float32) for staying in STAYING.values()), (LearnedOptimizer, {}, torch.bfloat16)],
    ids=[*STAYING, "default, of bfloat16"],
)
def test_what_is_unused_on_all_workers_stays_until_it_is_used(outer, options, dtype):
    """Rows, columns, a channel and a tensor without gradient: padding, tokens not yet seen, an expert not reached."""
    for unused, used in run_threads(_unused, 2, outer, options, dtype):
        assert not any(moved.any() for moved in unused.values())
        assert all(moved.all() for moved in used.values())


def test_the_published_update_moves_what_is_unused():
    """As the authors' code does, whose numbers it is compared with."""
    for unused, _ in run_threads(_unused, 2, partial(LearnedOptimizer, network="lopt_a_short"), {}):
        assert all(moved.all() for moved in unused.values())


# -- weights from outside ---------------------------------------------------------------------------------------------

NESTEROV = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


class _Net(nn.Module):
    """A body and a head of two weights each, BatchNorm, and a frozen part."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        self.norm, self.frozen = nn.BatchNorm1d(2), nn.Linear(2, 1).requires_grad_(False)
        for p in self.parameters():
            nn.init.ones_(p)


def _load_first(model, rounds, rank, step):
    if step == 0:
        model.load_state_dict({name: t + 4 for name, t in model.state_dict().items()})


def _load_frozen(model, rounds, rank, step):
    if step == 0:
        model.frozen.weight.data = torch.full((1, 2), 5.0)
        rounds.adopt_replaced(at_start=True)


def _reset_head(model, rounds, rank, step):
    if step == 2:
        nn.init.constant_(model.head.weight, 9.0)


def _prune(model, rounds, rank, step):
    if step == 2:
        with torch.no_grad():
            model.head.weight[:, 0] = 0.0


def _project(model, rounds, rank, step):
    if step == 2:
        with torch.no_grad():
            model.body.weight.mul_(0.9)


def _adopt_within(model, rounds, rank, step):
    if step == 3:
        model.load_state_dict({name: torch.full_like(t, 3) for name, t in model.state_dict().items()})
        rounds.adopt()


def _unnoticed(model, rounds, rank, step):
    if step == 3:
        model.body.weight.data.fill_(3.0)


def _per_worker(model, rounds, rank, step):
    if step == 2:
        nn.init.constant_(model.head.weight, 5.0 + rank)


def _one_worker(model, rounds, rank, step):
    if step == 2 and rank == 1:
        nn.init.constant_(model.head.weight, 5.0)


def _from_outside(rank, make_comm, change, lr):
    """Six steps, H = 2, with a gradient of 1 on the body; what came from outside before one of them."""
    model = _Net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    rounds = Rounds(model, optimizer, 2, NESTEROV, comm=make_comm())
    before = rounds.comm.bytes_sent
    for step in range(6):
        change(model, rounds, rank, step)
        model.norm(torch.randn(4, 2) + rank)  # its statistics differ between the workers
        model.body.weight.grad = torch.ones(1, 2)
        optimizer.step()
        rounds.step()
    rounds.finish_round()
    momenta = {id(a): s["momentum_buffer"] for a, s in rounds.sync.outer.state.items() if "momentum_buffer" in s}
    kept = [momenta.get(id(p.anchor)) for p in rounds.sync.replica.parameters()]
    values = [model.body.weight[0, 0].item(), *model.head.weight[0].tolist(), model.frozen.weight[0, 0].item()]
    statistics = [model.norm.running_mean.tolist(), model.norm.num_batches_tracked.item()]
    return values, statistics, rounds.comm.bytes_sent - before, kept


ADOPTED = {  # body, head, frozen
    _load_first: [5.0, 5.0, 5.0, 5.0],
    _load_frozen: [1.0, 1.0, 1.0, 5.0],
    _reset_head: [1.0, 9.0, 9.0, 1.0],
    _prune: [1.0, 0.0, 1.0, 1.0],
    _project: [pytest.approx(0.9), 1.0, 1.0, 1.0],
    _adopt_within: [3.0, 3.0, 3.0, 3.0],
}


@pytest.mark.parametrize("change", ADOPTED)
def test_weights_from_outside_are_where_training_goes_on(change):
    first, second = run_threads(_from_outside, 2, change, 0.0)
    assert first[0] == second[0] == ADOPTED[change]
    assert first[1] == second[1]  # the statistics were not taken as they were on each worker


def test_frozen_weights_that_are_loaded_at_the_start_are_not_sent():
    (_, _, plain, _), _ = run_threads(_from_outside, 2, lambda *_: None, 0.0)
    (_, _, loaded, _), _ = run_threads(_from_outside, 2, _load_frozen, 0.0)
    assert loaded - plain < 600  # messages alone; three syncs


def test_a_change_within_a_round_that_is_not_adopted_is_taken_for_progress():
    first, second = run_threads(_from_outside, 2, _unnoticed, 0.0)
    assert first[0] == second[0]
    assert first[0][0] != 3.0


def _momentum_of_body(rank, make_comm, change):
    *_, kept = _from_outside(rank, make_comm, change, 0.1)
    return kept[0].mean().item()


def test_a_projection_keeps_outer_momentum_and_new_weights_do_not():
    # g = 0.2 in each round: 0.2, then 0.9 · 0.2 + 0.2 = 0.38, then 0.9 · 0.38 + 0.2 = 0.542
    assert run_threads(_momentum_of_body, 2, _project) == [pytest.approx(0.542, abs=1e-5)] * 2

    def replace_body(model, rounds, rank, step):
        if step == 2:
            nn.init.constant_(model.body.weight, 9.0)

    assert run_threads(_momentum_of_body, 2, replace_body) == [pytest.approx(0.38, abs=1e-5)] * 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_per_worker, "the weights that were put in place of the global ones"),
        (_one_worker, "different places: .*worker 1 at the adoption of new weights"),
    ],
)
def test_workers_that_replace_weights_differently(change, match):
    with pytest.raises(DisagreementError, match=match):
        run_threads(_from_outside, 2, change, 0.0)


def test_a_projection_within_rounding_is_no_change():
    """As of schedule-free optimizers, which leave the workers' weights apart by rounding when they swap them."""

    def come_back(model, rounds, rank, step):
        if step == 2:
            with torch.no_grad():
                model.body.weight.mul_(1 + 2e-7 * rank)

    first, second = run_threads(_from_outside, 2, come_back, 0.0)
    assert first[0][0] == second[0][0] == pytest.approx(1.0)
