"""What is sent: shapes, balance, and errors."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt.selection import Everything, Fragments, RandomCoordinates


def test_random_coordinates_are_of_the_whole_model():
    sizes = [1000, 1, 0, 3000]
    picked = RandomCoordinates(0.1).pick(sizes, 5)
    assert sum(len(index) for index in picked) == 400
    assert all(((index >= 0) & (index < size)).all() for index, size in zip(picked, sizes, strict=True))
    assert 60 < len(picked[0]) < 140
    assert not torch.equal(picked[3], RandomCoordinates(0.1, seed=1).pick(sizes, 5)[3])


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
    with pytest.raises(ValueError, match=">= 1"):
        Fragments(0)
    with pytest.raises(ValueError, match="2 tensors cannot make 3 fragments"):
        Fragments(3).pick([4, 5], 0)
