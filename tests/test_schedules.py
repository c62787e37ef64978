"""Schedules: the golden runs of the QSR authors' code, what schedules hear and remember, and wrong arguments."""

from __future__ import annotations

import json
import math
import threading
import types
from itertools import pairwise

import pytest
import torch
from torch import nn

import lightning_lopt.rounds as rounds_module
from lightning_lopt import QSR, Constant, Fragments, RoundInfo, Rounds, SyncOptions
from lightning_lopt.comm import Communicator
from lightning_lopt.schedules import as_schedule
from tests.conftest import VECTORS
from tests.sync_support import WhileDriftIsSmall, move
from tests.threads import run_threads


def _learning_rate(case, step):
    """The schedulers of the reference, as its README states them."""
    total, warmup = case["total_steps"], case["warmup_steps"]
    peak, final = case["max_lr"], case["final_lr"]
    if case["schedule"] == "step":
        epoch = step // case["steps_per_epoch"]
        return peak * case["gamma"] ** sum(epoch >= point for point in case["decay_points"])
    if step < warmup:
        return final + step * (peak - final) / warmup
    done = (step - warmup) / (total - warmup)
    if case["schedule"] == "linear":
        return peak + (final - peak) * done
    lr = final + 0.5 * (peak - final) * (1 + math.cos(math.pi * done))
    return lr if case["schedule"] == "cosine" else None


def _rounds(case):
    rule = QSR(case["alpha"], case["h_base"], case["power"], case["warmup_steps"])
    step, rounds, total = 0, [], case["total_steps"]
    while step < total:
        info = RoundInfo(len(rounds), step, total, _learning_rate(case, step))
        local_steps = min(rule(info), total - step)
        rounds.append((step, local_steps))
        step += local_steps
    return rounds


def test_qsr_equals_the_authors():
    path = VECTORS / "qsr.json"
    if not path.exists():
        pytest.skip("golden numbers are not here")
    checked = 0
    for case in json.loads(path.read_text()):
        if case["alpha"] == 0 or case["schedule"] == "cosine_step":
            continue  # a constant schedule by another name; a scheduler of the reference alone
        rounds = _rounds(case)
        assert len(rounds) == case["num_rounds"], case
        assert [h for _, h in rounds[-10:]] == case["last_ten_H"]
        checked += 1
    assert checked >= 5


def test_qsr_at_constant_lr_is_constant():
    rule = QSR(alpha=0.1, base_steps=3)
    assert {rule(RoundInfo(i, 9 * i, None, lr=0.1 / 3)) for i in range(5)} == {9}


@pytest.mark.parametrize("power", [1, 2, 3])
def test_powers(power):
    assert QSR(alpha=1.0, base_steps=1, power=power)(RoundInfo(0, 0, None, lr=0.125)) == 8**power


def test_learning_rate_zero_runs_to_the_end():
    assert QSR(alpha=1.0, base_steps=2)(RoundInfo(0, 90, 100, lr=0.0)) == 10
    assert QSR(alpha=1.0, base_steps=2)(RoundInfo(0, 90, None, lr=0.0)) == 2


@pytest.mark.parametrize("wrong", [0, -3, 2.5, "16", True, None])
def test_wrong_local_steps(wrong):
    with pytest.raises(ValueError, match="local_steps must be an integer >= 1"):
        as_schedule(wrong)


@pytest.mark.parametrize(
    "wrong", [{"alpha": 0.0}, {"alpha": math.inf}, {"base_steps": 2.5}, {"base_steps": 0}], ids=str
)
def test_wrong_qsr(wrong):
    with pytest.raises(ValueError, match="alpha > 0, an integer base_steps"):
        QSR(**{"alpha": 0.1, "base_steps": 4, **wrong})


@pytest.mark.parametrize("lr", [1e-300, 5e-324])
def test_learning_rates_next_to_zero_are_zero(lr):
    assert QSR(alpha=1.0, base_steps=2)(RoundInfo(0, 90, 100, lr=lr)) == 10


def test_a_learning_rate_that_is_not_a_number():
    with pytest.raises(ValueError, match="is not a number"):
        QSR(alpha=1.0, base_steps=2)(RoundInfo(0, 0, None, lr=math.nan))


def test_numbers_become_schedules():
    assert as_schedule(16) == Constant(16)


# -- schedules that listen --------------------------------------------------------------------------------------------


def _worker(rank, make_comm, schedule, lr=0.05, **options):
    model = nn.Linear(3, 2)
    for p in model.parameters():
        nn.init.constant_(p, 0.1)  # threads share the generator of random numbers
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    return model, optimizer, Rounds(model, optimizer, schedule, comm=make_comm(), options=SyncOptions(**options))


def _heard(rank, make_comm, steps=8, **options):
    """The figures that a schedule hears on this worker, and those of the reports, H = 2."""
    infos, reports = [], []

    def schedule(info):
        infos.append(info)
        return 2

    model, optimizer, rounds = _worker(rank, make_comm, schedule, **options)
    rounds.listeners.append(reports.append)
    move(rounds, model, optimizer, rank, steps)
    heard = [(info.drift, info.pseudo_grad_norm) for info in infos]
    return heard, [(report.drift, report.pseudo_grad_norm) for report in reports]


@pytest.mark.parametrize("options", [{}, {"overlap_steps": 1}, {"compression": "int8"}, {"sharded": True}], ids=str)
def test_a_schedule_hears_the_last_round_on_all_workers(options):
    (heard, reports), (others, _) = run_threads(lambda *args: _heard(*args, **options), 2)
    assert heard == others == [(None, None), *reports[:-1]]
    assert all(drift > 0 and norm > 0 for drift, norm in reports)


@pytest.mark.parametrize("options", [{"density": 0.5}, {"selection": Fragments(2)}, {"lr": math.nan}], ids=str)
def test_a_part_of_the_model_or_a_skipped_round_say_nothing(options):
    for heard, _ in run_threads(lambda *args: _heard(*args, **options), 2):
        assert set(heard) == {(None, None)}


def test_seconds_are_those_of_the_slowest_worker(monkeypatch):
    clock = threading.local()  # each worker is a thread
    monkeypatch.setattr(rounds_module, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))

    def run(rank, make_comm):
        heard = []

        def schedule(info):
            heard.append(info.seconds)
            return 1

        model, optimizer, rounds = _worker(rank, make_comm, schedule)
        clock.now = 100.0 * rank
        for round_idx in range(6):
            clock.now += 8 + round_idx if rank == round_idx % 2 else 1
            move(rounds, model, optimizer, rank, 1)
        return heard

    # the first round's is unknown; those of rounds 1, 2, 3 arrive with the syncs of rounds 2, 3, 4
    assert run_threads(run, 2) == [[None, None, None, 9.0, 10.0, 11.0]] * 2


LIMIT = 0.5


def _listening(rank, make_comm, steps, state=None, limit=LIMIT, **options):
    """Train until a step, from a state if there is one; the weights after each step, H of each round, the state."""
    schedule = WhileDriftIsSmall(limit, local_steps=1)
    model, optimizer, rounds = _worker(rank, make_comm, schedule, **options)
    if state is not None:
        rounds.load_state_dict(state["rounds"])
        rounds.load_local_state(state["local"])
        optimizer.load_state_dict(state["optimizer"])
    lengths = []
    rounds.listeners.append(lambda report: lengths.append(report.local_steps))
    weights = move(rounds, model, optimizer, rank, steps - rounds.step_idx)
    state = {"rounds": rounds.state_dict(), "local": rounds.local_state(), "optimizer": optimizer.state_dict()}
    return weights, lengths, state, schedule.seen


@pytest.mark.parametrize("options", [{}, {"overlap_steps": 1}], ids=str)
def test_what_a_schedule_remembers_and_hears_resumes_bitwise_from_every_step(options, tmp_path):
    whole = run_threads(lambda *args: _listening(*args, 24, **options), 2)
    lengths = whole[0][1]
    assert max(lengths) >= 4, lengths
    assert any(later < earlier for earlier, later in pairwise(lengths)), lengths
    for stop in range(1, 24):
        for rank, (*_, state, _) in enumerate(run_threads(lambda *args, n=stop: _listening(*args, n, **options), 2)):
            torch.save(state, tmp_path / f"{rank}.pt")

        def resume(rank, make_comm):
            state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
            return _listening(rank, make_comm, 24, state, **options)

        for (weights, all_lengths, _, all_seen), (again, rest, _, seen) in zip(
            whole, run_threads(resume, 2), strict=True
        ):
            assert torch.equal(again, weights[stop:])
            assert rest == all_lengths[len(all_lengths) - len(rest) :]
            heard, expected = ([(i.step, i.drift, i.pseudo_grad_norm) for i in infos] for infos in (seen, all_seen))
            assert heard == expected[len(expected) - len(heard) :]


def test_another_schedule_begins_with_nothing_to_remember():
    *_, state, _ = _listening(0, Communicator, 3, limit=0.0)

    class Other(WhileDriftIsSmall):
        pass

    for make, expected in ((WhileDriftIsSmall, 2), (Other, 7)):
        schedule = make(LIMIT, 7)
        _worker(0, Communicator, schedule)[2].load_state_dict(state["rounds"])
        assert schedule.local_steps == expected


def test_workers_that_wait_for_others_hear_what_they_hear():
    def run(rank, make_comm):
        schedule = WhileDriftIsSmall(LIMIT, local_steps=1)
        model, optimizer, rounds = _worker(rank, make_comm, schedule)
        rounds.equal_steps = False
        for epoch in range(2):
            move(rounds, model, optimizer, rank, [2, 9][rank == epoch % 2])
            rounds.join()
        return schedule.local_steps, [(i.round_idx, i.drift, i.pseudo_grad_norm) for i in schedule.seen]

    first, second = run_threads(run, 2)
    assert first == second
    assert len(first[1]) > 4


def test_a_round_that_begins_anew_keeps_its_h():
    schedule = WhileDriftIsSmall(math.inf, local_steps=2)
    model, optimizer, rounds = _worker(0, Communicator, schedule)
    move(rounds, model, optimizer, 0, 3)
    rounds.abandon_round()
    move(rounds, model, optimizer, 0, 4)
    assert [info.round_idx for info in schedule.seen] == [0, 1]
    assert rounds.round_idx == 2
    assert rounds.last_report.local_steps == 4


@pytest.mark.parametrize("has", ["state_dict", "load_state_dict"])
def test_half_of_a_state_is_refused(has):
    schedule = type("Half", (), {"__call__": lambda self, info: 4, has: lambda self, *_: {}})()
    with pytest.raises(ValueError, match="both, or neither"):
        as_schedule(schedule)
