"""Writes to tensors of which no copy is kept are noticed, however they are made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lopt.sync.watch import THOROUGH_EVERY, Watch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex128, torch.int64, torch.bool, torch.float8_e4m3fn]
WRITES = {
    "in place": lambda p: p.detach().add_(1.0),
    "in place through data": lambda p: p.data.add_(1.0),
    "new data": lambda p: setattr(p, "data", p.data + 1.0),
    "rows exchanged": lambda p: p.detach().copy_(p.detach().flip(0)),
    "sign": lambda p: p.detach().neg_(),
    "resized": lambda p: setattr(p, "data", torch.zeros(3)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_writes_are_noticed(write, layout):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(8, 9, 5, 3).to(memory_format=layout))
    watch = Watch({"p": p})
    assert watch.changed({"p": p}) == []
    write(p)
    assert watch.changed({"p": p}) == ["p"]
    assert watch.changed({"p": p}) == ["p"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (33, 65)], ids=str)
def test_all_types_and_sizes(dtype, shape):
    p = torch.zeros(shape).to(dtype)
    watch = Watch({"p": p})
    assert watch.changed({"p": p}) == []
    p.data.fill_(1)
    assert watch.changed({"p": p}) == ["p"]


def test_what_is_the_same_again_is_no_change():
    p, q = torch.ones(5), torch.zeros(0)
    watch = Watch({"p": p, "q": q})
    p.add_(1).sub_(1)
    assert watch.changed({"p": p.clone(), "q": q}) == []
    assert watch.changed({"p": p, "new": q}) == ["new"]


def test_a_single_element_through_data_is_noticed_in_the_end():
    p = torch.zeros(10_000)
    watch = Watch({"p": p})
    p.data[1] = 1.0
    assert [watch.changed({"p": p}) for _ in range(THOROUGH_EVERY)][-2:] == [[], ["p"]]


def test_a_slice_with_gaps_is_compared_each_time():
    p = torch.zeros(20_000)[::2]
    watch = Watch({"p": p})
    p.data[1] = 1.0
    assert watch.changed({"p": p}) == ["p"]
