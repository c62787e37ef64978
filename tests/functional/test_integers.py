"""Integers and other numbers in arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_lopt import QSR, BlendedNesterov, Constant, DiLoCo, Fragments, SlowMo, SyncOptions, TopK
from lightning_lopt.functional.integers import as_integer, as_number

ARGUMENTS = [
    lambda value: Constant(value).local_steps,
    lambda value: QSR(alpha=1.0, base_steps=value).base_steps,
    lambda value: Fragments(value).num_fragments,
    lambda value: SyncOptions(overlap_steps=value).overlap_steps,
]


@pytest.mark.parametrize("make", ARGUMENTS)
@pytest.mark.parametrize("value", [4, np.int64(4), torch.tensor(4)])
def test_integers_of_any_type(make, value):
    assert type(make(value)) is int
    assert make(value) == 4


@pytest.mark.parametrize("make", ARGUMENTS)
@pytest.mark.parametrize("value", [True, 4.0, -1, "4", None])
def test_anything_else_is_refused(make, value):
    assert as_integer(value, least=0) is None
    with pytest.raises(ValueError, match="integer"):
        make(value)


NUMBERS = [
    lambda value: SyncOptions(density=value),
    lambda value: TopK(value),
    lambda value: QSR(alpha=value, base_steps=4),
    lambda value: SlowMo(outer_lr=value),
    lambda value: SlowMo(momentum=value),
    lambda value: DiLoCo(outer_lr=value),
    lambda value: BlendedNesterov([torch.zeros(1)], momentum=value),
]


@pytest.mark.parametrize("make", NUMBERS)
def test_numbers_of_any_type(make):
    for value in 0.5, np.float32(0.5), torch.tensor(0.5):
        assert as_number(value) == 0.5
        make(value)


@pytest.mark.parametrize("make", NUMBERS)
def test_what_is_no_number_is_refused(make):
    for value in "0.5", True, None, [0.5], -0.5:
        with pytest.raises(ValueError, match=r"> 0|in [\[(]0, 1"):
            make(value)
