"""Who is an outlier, as a law over random norms."""

from __future__ import annotations

import random

import pytest

from lightning_lopt.functional.outliers import Norms, OutlierFilter, outliers

INF, NAN = float("inf"), float("nan")


def test_a_change_that_all_share_leaves_nobody_out():
    draw = random.Random(0)
    for _ in range(2000):
        num_workers = draw.randint(1, 9)
        before = Norms([10 ** draw.uniform(-6, 6) for _ in range(draw.randint(0, 9))])
        scale = 10 ** draw.uniform(-6, 6)
        norms = [scale * draw.uniform(1, 9.9) for _ in range(num_workers)]
        norms[draw.randrange(num_workers)] *= draw.choice([1, 0])  # one may stand still
        assert outliers(norms, before) == []
        assert outliers([*norms, NAN], before) == [num_workers]


def test_one_wild_worker_of_three_needs_no_history():
    draw = random.Random(0)
    for _ in range(500):
        norms = [draw.uniform(1, 2) for _ in range(draw.randint(2, 9))]
        assert outliers([*norms, 21.0], Norms()) == [len(norms)]
        assert outliers([9.9, *norms], Norms()) == []


@pytest.mark.parametrize(
    ("norms", "before", "expected"),
    [
        ([], [], []),
        ([NAN, INF], [1.0], [0, 1]),
        ([0.0, 0.0], [], []),
        ([1.0, 20.0], [], []),  # two, and nothing to tell by
        ([1.0, 20.0], [1.0], [1]),
        ([20.0, 20.0], [1.0, 1.0], []),
        ([NAN, 20.0], [1.0, 1.0], [0]),  # the other one cannot be told from a change of both
        ([1.0, 20.0], [1.0] * 7 + [1000.0], []),  # no more history than workers, the largest of it
    ],
)
def test_cases(norms, before, expected):
    assert outliers(norms, Norms(before)) == expected


def test_what_recent_rounds_took_is_taken_again():
    """A hard example where the loss is nearly 0; but not what is larger than ever, nor for ever."""
    before = Norms().then([3.0, 2.0]).then([0.01, 0.02])
    assert outliers([0.01, 2.9], before) == []
    assert outliers([0.01, 3.1], before) == [1]
    for _ in range(200):
        before = before.then([0.01, 0.02])
    assert outliers([0.01, 2.9], before) == [1]


def test_the_filter_remembers_only_what_rounds_took():
    outlier_filter = OutlierFilter()
    for norms, expected in (([1.0, 2.0, NAN], [2]), ([NAN, INF, NAN], [0, 1, 2]), ([1.0, 2.0, 1.0], [])):
        before = outlier_filter.norms
        left_out = outlier_filter.outliers(norms)
        assert left_out == expected
        assert outlier_filter.norms is before
        outlier_filter.update(norms, left_out)
        if len(left_out) == 3:
            assert outlier_filter.norms is before
    assert outlier_filter.num_left_out == 4
    assert outlier_filter.norms == Norms([1.0, 2.0, 1.0], 2.0)
