"""Integers in arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_lopt import QSR, Constant, Fragments, SyncOptions
from lightning_lopt.functional.integers import as_integer

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
