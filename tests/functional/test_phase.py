"""The phase of a local learning rate, and the settings in it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from lightning_lopt.functional.phase import (
    LARGEST_FACTOR,
    LARGEST_MOMENTUM,
    LocalDecay,
    contraction,
    settings_in_phase,
)


def shares(local_lrs):
    decay, found = LocalDecay(), []
    for local_lr in local_lrs:
        decay = decay.after(local_lr)
        found.append(decay.share)
    return found


@pytest.mark.parametrize(
    ("local_lrs", "expected"),
    [
        ([0.3] * 4, [1, 1, 1, 1]),
        ([0.0, 0.1, 0.2, 0.2, 0.1, 0.0, 0.0], [1, 1, 1, 1, 0.5, 0, 0]),  # a warm-up, and a decay to 0
        ([0.8, 0.4, 0.2, 0.4, 0.2], [1, 0.5, 0.25, 1, 0.5]),  # a cycle of half the height is no decay at its start
        ([0.8, 0.4, math.nan, 0.4, 0.2], [1, 0.5, 1, 1, 0.5]),
        ([0.8, 0.1, 0.1, 0.1], [1, 0.125, 0.125, 0.125]),  # a step holds
    ],
    ids=["constant", "warm-up and decay", "cycles", "unknown", "step"],
)
def test_the_share_is_of_the_rate_since_its_last_rise(local_lrs, expected):
    assert shares(local_lrs) == expected


def test_settings_grow_monotonically_between_their_bounds():
    decay = [settings_in_phase(0.7, 0.6, share / 10, 4, 0.8) for share in range(10, -1, -1)]  # d 1, 0.9 to 0
    assert decay[0] == (0.7, 0.6)
    assert all(a <= b and c <= d for (a, c), (b, d) in pairwise(decay))
    assert decay[-1] == (pytest.approx(0.7 * LARGEST_FACTOR), pytest.approx(LARGEST_MOMENTUM))
    assert settings_in_phase(0.7, 0.6, 0.5, 4, 0.0) == (0.7, 0.6)
    assert settings_in_phase(0.7, 0.99, 0.1, 4, 0.8)[1] == 0.99


@pytest.mark.parametrize("local_steps", [1, 8])
def test_the_steepest_direction_moves_at_most_as_far_as_at_the_start(local_steps):
    """Gradient descent on a quadratic of curvature 1 from γ = 1 on goes the share q of the way, as the rule has it."""
    for share in (1.0, 0.5, 0.05):
        x = 1.0
        for _ in range(local_steps):
            x -= share * x
        assert contraction(share, local_steps) == pytest.approx(1 - x)
        assert settings_in_phase(1.0, 0.9, share, local_steps, 0.5)[0] * (1 - x) <= 1 + 1e-12
