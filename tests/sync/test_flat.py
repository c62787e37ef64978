"""Flat buffers: every element is in them once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_lopt import Rounds
from lightning_lopt.sync.anchors import AnchoredParameter
from lightning_lopt.sync.flat import choose
from tests.processes import run_workers


def _packing(rank, seed):
    generator = torch.Generator().manual_seed(seed)
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    model = nn.Module()
    for i in range(6):
        shape = torch.randint(0, 5, (int(torch.randint(0, 4, (), generator=generator)),), generator=generator)
        dtype = dtypes[int(torch.randint(0, 4, (), generator=generator))]
        values = torch.randint(-8, 8, tuple(shape.tolist()), generator=generator).to(dtype)
        model.register_parameter(f"p{i}", nn.Parameter(values))
        model.register_buffer(f"b{i}", values.clone())
        model.register_buffer(f"n{i}", values.to(torch.int32))
    model.register_buffer("mask", torch.full((3,), float("-inf")))
    model.register_parameter("last", nn.Parameter(torch.zeros(3)))
    start = {name: t.detach().clone() for name, t in model.state_dict().items()}
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if name != "mask":
                t.add_(2 * rank)  # 0 and 2: the mean is 1, the maximum 2
    rounds.step()
    for name, t in model.state_dict().items():
        shift = 0 if name == "mask" else 2 if name.startswith("n") else 1
        assert torch.equal(t, start[name] + shift), name


def _packings(rank):
    for seed in range(3):
        _packing(rank, seed)


def test_every_element_and_every_buffer_is_averaged_exactly_once():
    """Whatever their sizes and types."""
    run_workers(_packings, 2)


def _anchored(number):
    parameters = [AnchoredParameter(nn.Parameter(torch.zeros(4))) for _ in range(number)]
    for p in parameters:
        p.has_anchor = True
    return parameters


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([True], "1 choices for 2 tensors"),
        ([[0, 1], True], r"returned \[0, 1\] for tensor 0"),
        ([True, torch.tensor([True, False])], "for tensor 1"),
        ([True, torch.tensor(1)], "for tensor 1"),
        (["all", True], "returned 'all' for tensor 0"),
    ],
)
def test_wrong_choices_of_a_selection_are_named(choices, message):
    with pytest.raises(ValueError, match=message):
        choose(_anchored(2), choices)


def test_choices_of_numpy_are_choices():
    first, second = _anchored(2)
    assert [s.parameter for s in choose([first, second], [np.bool_(True), np.bool_(False)])] == [first]
