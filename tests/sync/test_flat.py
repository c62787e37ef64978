"""Flat buffers: every element is in them once."""

from __future__ import annotations

import torch
from torch import nn

from lightning_lopt import Rounds
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
