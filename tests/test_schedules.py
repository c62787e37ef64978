"""Schedules: the golden runs of the QSR authors' code, and wrong arguments."""

from __future__ import annotations

import json
import math

import pytest

from lightning_lopt import QSR, Constant, RoundInfo
from lightning_lopt.schedules import as_schedule
from tests.conftest import VECTORS


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
