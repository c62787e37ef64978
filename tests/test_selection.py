"""What is sent: shapes, balance, and errors."""

from __future__ import annotations

import time

import pytest
import torch

from lightning_lopt.selection import Everything, Fragments, RandomCoordinates, drawn_ahead


def test_random_coordinates_are_of_the_whole_model():
    sizes = [1000, 1, 0, 3000]
    picked = RandomCoordinates(0.1).pick(sizes, 5)
    assert sum(len(index) for index in picked) == 400
    assert all(((index >= 0) & (index < size)).all() for index, size in zip(picked, sizes, strict=True))
    assert 60 < len(picked[0]) < 140
    assert not torch.equal(picked[3], RandomCoordinates(0.1, seed=1).pick(sizes, 5)[3])


def test_what_is_drawn_ahead_is_the_same_and_ready():
    selection, sizes = RandomCoordinates(0.2), [20_000_000, 4]
    ahead = drawn_ahead(selection)
    for round_idx in (0, 1, 2, 7, 8, 3):
        for ours, plain in zip(ahead.pick(sizes, round_idx), selection.pick(sizes, round_idx), strict=True):
            assert torch.equal(ours, plain)
    assert sum(map(len, ahead.pick([4, 50], 4))) == 11  # the number of parameters has changed
    ahead.pick(sizes, 0)
    time.sleep(2.0)  # local steps
    start = time.thread_time()
    ahead.pick(sizes, 1)
    assert time.thread_time() - start < 0.01


def test_only_random_coordinates_are_drawn_ahead():
    for selection in (Everything(), Fragments(2)):
        assert drawn_ahead(selection) is selection


def test_something_is_always_sent():
    assert sum(len(index) for index in RandomCoordinates(1e-9).pick([3, 4], 0)) == 1


@pytest.mark.parametrize("num_fragments", [1, 2, 3])
def test_fragments_send_each_tensor_once_in_turn(num_fragments):
    sizes = [100, 90, 20, 40, 30, 0]
    fragments = Fragments(num_fragments)
    turns = torch.tensor([fragments.pick(sizes, 7 + i) for i in range(num_fragments)])
    assert (turns.sum(0) == 1).all()
    loads = (turns * torch.tensor(sizes)).sum(1)
    assert loads.max() - loads.min() <= 30


def test_everything():
    assert Everything().pick([3, 0], 2) == [True, True]


def test_errors():
    for density in (0.0, 1.1):
        with pytest.raises(ValueError, match="density must be in"):
            RandomCoordinates(density)
    for number in (0, 2.5, True):
        with pytest.raises(ValueError, match="an integer >= 1"):
            Fragments(number)
    with pytest.raises(ValueError, match="2 tensors cannot make 3 fragments"):
        Fragments(3).pick([4, 5], 0)
