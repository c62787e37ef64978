"""Who is an outlier, as a law over random norms."""

from __future__ import annotations

import random

import pytest

from lightning_lopt.functional.outliers import outliers

INF, NAN = float("inf"), float("nan")


def test_a_change_that_all_share_leaves_nobody_out():
    draw = random.Random(0)
    for _ in range(2000):
        num_workers = draw.randint(1, 9)
        before = [10 ** draw.uniform(-6, 6) for _ in range(draw.randint(0, 9))]
        scale = 10 ** draw.uniform(-6, 6)
        norms = [scale * draw.uniform(1, 9.9) for _ in range(num_workers)]
        norms[draw.randrange(num_workers)] *= draw.choice([1, 0])  # one may stand still
        assert outliers(norms, before) == []
        assert outliers([*norms, NAN], before) == [num_workers]


def test_one_wild_worker_of_three_needs_no_history():
    draw = random.Random(0)
    for _ in range(500):
        norms = [draw.uniform(1, 2) for _ in range(draw.randint(2, 9))]
        assert outliers([*norms, 21.0], []) == [len(norms)]
        assert outliers([9.9, *norms], []) == []


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
    assert outliers(norms, before) == expected
