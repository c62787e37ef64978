"""The benchmark of the overhead of the strategy."""

from __future__ import annotations

import time

import pytest

from examples.benchmarks.speed import overhead
from tests.processes import run_workers


class Work:
    def outer(self):
        burn(0.02)
        self.inner()

    def inner(self):
        burn(0.04)


def burn(seconds: float) -> None:
    start = time.thread_time()
    while time.thread_time() - start < seconds:
        pass


def test_the_stopwatch_counts_each_method_without_those_within():
    watch, outer = overhead.Stopwatch(), Work.outer
    with watch.around([(Work, "outer", "a"), (Work, "inner", "b")]):
        Work().outer()
        Work().inner()
    assert Work.outer is outer
    assert watch.seconds["a"] == pytest.approx(0.02, abs=0.005)
    assert watch.seconds["b"] == pytest.approx(0.08, abs=0.005)


def _measure(rank: int):
    return overhead.measure(num_workers=2, local_steps=3, num_rounds=4)


def test_a_short_training():
    first, second = run_workers(_measure, 2, connect=False)
    assert (first["is_rank_zero"], second["is_rank_zero"]) == (True, False)
    assert all(len(values) == 4 and min(values) > 0 for values in first["milliseconds_per_round"].values())
    assert 0 < first["microseconds_per_step"][overhead.OURS] < 50_000
    assert all(0 < value < 50_000 for value in first["idle_microseconds_per_step"].values())
    together, idle = overhead.rows(first)[2:4]
    assert together["quantity"].startswith("together")
    assert together["median"] == pytest.approx(sum(first["microseconds_per_step"].values()))
    assert idle["median"] == pytest.approx(sum(first["idle_microseconds_per_step"].values()))
