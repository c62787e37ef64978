"""Random coordinates that all workers draw alike."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_lopt.functional.subset import shared_indices


@pytest.mark.parametrize("numel", [1, 10, 4096, 5000, 100_000])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.7, 1.0])
def test_shared_indices_are_as_many_different_ascending_coordinates(numel, share):
    count = round(share * numel)
    index = shared_indices(numel, count, seed=1, round_idx=2)
    assert len(index) == count
    assert (index.diff() > 0).all()
    assert count == 0 or (index[0] >= 0 and index[-1] < numel)


@pytest.mark.parametrize(("numel", "count"), [(30, 9), (6000, 1800), (6000, 4200)])
def test_shared_indices_are_uniform(numel, count):
    """Each coordinate, and each pair of neighbours, is drawn as often as it should be, up to 5 standard errors."""
    rounds, drawn = 2000, torch.zeros(numel)
    pairs = 0
    for round_idx in range(rounds):
        index = shared_indices(numel, count, seed=0, round_idx=round_idx)
        drawn[index] += 1
        pairs += int((index.diff() == 1).sum())
    p = count / numel
    assert (drawn - rounds * p).abs().max() < 5 * math.sqrt(rounds * p * (1 - p))
    pair = p * (count - 1) / (numel - 1)
    expected = rounds * (numel - 1) * pair
    assert abs(pairs - expected) < 5 * math.sqrt(2 * expected)


def test_shared_indices_depend_on_seed_and_round_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = shared_indices(10_000, 100, seed=0, round_idx=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, shared_indices(10_000, 100, seed=0, round_idx=0))
    assert not torch.equal(first, shared_indices(10_000, 100, seed=1, round_idx=0))
    assert not torch.equal(first, shared_indices(10_000, 100, seed=0, round_idx=1))
    assert first[:5].tolist() == [74, 107, 192, 242, 343]  # on every machine
