"""Items among owners."""

from __future__ import annotations

import random

from lightning_lopt.functional.balance import least_loaded


def test_loads_differ_by_one_item_at_most():
    draw = random.Random(0)
    for _ in range(200):
        sizes = [draw.randint(0, 100) for _ in range(draw.randint(1, 30))]
        loads = [0] * draw.randint(1, 6)
        owners = least_loaded(sizes, loads)
        for k, load in enumerate(loads):
            assert load == sum(max(1, size) for size, owner in zip(sizes, owners, strict=True) if owner == k)
        assert max(loads) - min(loads) <= max(1, *sizes)


def test_items_that_come_later_go_where_there_is_room():
    loads = [7, 2]
    assert least_loaded([1, 3, 1], loads) == [1, 1, 1]
    assert loads == [7, 7]
