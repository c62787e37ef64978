"""A parameter with its anchor."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_lopt import Rounds
from tests.sync_support import Point


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2).to_sparse()], ids=["complex", "sparse"]
)
def test_only_dense_real_parameters(tensor):
    model = Point(tensor)
    with pytest.raises(ValueError, match="must be dense and real"):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)


KEPT = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float64: torch.float64}


@pytest.mark.parametrize(("dtype", "kept"), KEPT.items(), ids=map(str, KEPT))
def test_anchors_keep_what_parameters_of_few_bits_would_lose(dtype, kept):
    """Ten outer steps of 1/1024 on a parameter of 1, whose next bfloat16 is 1 + 1/128."""
    model = Point(torch.ones(1, dtype=dtype))
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1, partial(torch.optim.SGD, lr=2.0**-10))
    anchor = rounds.sync.outer.param_groups[0]["params"][0]
    for _ in range(10):
        before = anchor.item()
        model.x.data = torch.tensor([2 * before]).to(dtype)
        pseudo_grad = before - model.x.item()
        rounds.step()
        assert anchor.item() == pytest.approx(before - pseudo_grad / 1024, rel=1e-6)
    assert anchor.dtype == kept
    assert model.x.dtype == dtype
    assert model.x.item() == torch.tensor(anchor.item(), dtype=torch.float64).to(dtype).item()
