"""Unroll lengths."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt.meta.truncation import LogUniform


def test_lengths_are_log_uniform():
    lengths = LogUniform(100, 1_000).draw(20_000, torch.Generator().manual_seed(0))
    assert lengths.min() >= 100
    assert lengths.max() <= 1_000
    # A third of the mass in each third of the logarithm, and the mean is (high - low) / ln(high / low).
    for third in range(3):
        low, high = 100 * 10 ** (third / 3), 100 * 10 ** ((third + 1) / 3)
        assert abs(((lengths > low) & (lengths <= high)).double().mean() - 1 / 3) < 0.02
    assert abs(lengths.double().mean() - 390.9) < 5


def test_first_lengths_are_cut_short_at_random():
    first = LogUniform(100, 100).draw_first(2_000, torch.Generator().manual_seed(0))
    assert first.min() >= 1
    assert first.max() <= 100
    assert abs(first.double().mean() - 50.5) < 3


@pytest.mark.parametrize(("low", "high"), [(0, 10), (20, 10)])
def test_bounds_must_be_in_order(low, high):
    with pytest.raises(ValueError, match="1 <= low <= high"):
        LogUniform(low, high)
