"""Codecs against numpy's numbers."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt.compression import BF16, Int8, TopK, as_codec
from lightning_lopt.functional.compression import CHUNK

CODECS = {"bf16": BF16(), "int8": Int8(), "topk": TopK(6 / 64)}


def _round_trip(codec, values, sizes=None):
    sizes = sizes or [len(values)]
    return codec.decode(codec.encode(values, sizes), sizes)


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_codecs_equal_the_golden_numbers(vectors, name, feedback):
    data = vectors("compression.npz")
    pseudo_grad, case = torch.from_numpy(data["pseudo_grad"]), f"{name}_ef" if feedback else name
    residual = torch.zeros_like(pseudo_grad[0])
    for t, grads in enumerate(pseudo_grad):
        values = grads + residual if feedback else grads
        sent = torch.stack([_round_trip(CODECS[name], worker) for worker in values])
        residual = values - sent
        assert torch.equal(sent, torch.from_numpy(data[f"{case}/sent"][t]))
        torch.testing.assert_close(sent.double().mean(0), torch.from_numpy(data[f"{case}/mean"][t]), rtol=0, atol=1e-15)
        if feedback:
            assert torch.equal(residual, torch.from_numpy(data[f"{case}/residual"][t]))
        if name == "int8":
            code = Int8().encode(values[0], [64])
            assert torch.equal(code[:4].view(torch.float32), torch.from_numpy(data[f"{case}/scale"][t, :1]))
            assert torch.equal(code[4:].view(torch.int8), torch.from_numpy(data[f"{case}/q"][t, 0]))


def test_bf16_of_special_numbers(vectors):
    data = vectors("compression.npz")
    given, expected = (torch.from_numpy(data[f"bf16_special/{k}"]) for k in ("input", "output"))
    assert torch.equal(_round_trip(BF16(), given).view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(("codec", "num_bytes"), [(BF16(), 2 * 10_000), (Int8(), 10_000 + 8), (TopK(0.02), 6 * 201)])
def test_bytes(codec, num_bytes):
    assert codec.encode(torch.randn(10_000), [9_000, 1_000]).nbytes == num_bytes  # 82 + 82 + ceil(36.16)


def test_int8_has_a_scale_for_each_piece():
    values = torch.cat([1e-3 * torch.randn(50), torch.zeros(3), torch.zeros(0), 1e3 * torch.randn(50)])
    error = (_round_trip(Int8(), values, [50, 3, 0, 50]) - values).abs()
    for piece, lost in zip(values.split([50, 3, 50]), error.split([50, 3, 50]), strict=True):
        assert lost.max() <= piece.abs().max() / 254 * 1.001


@pytest.mark.parametrize("codec", CODECS.values(), ids=str)
def test_what_is_not_finite_stays_so(codec):
    assert not _round_trip(codec, torch.tensor([1.0, float("nan"), 2.0])).isfinite().all()
    assert not _round_trip(codec, torch.tensor([1.0, float("inf"), 2.0])).isfinite().all()


def test_top_k_keeps_the_largest_of_each_chunk():
    values = torch.randn(2 * CHUNK + 100)
    kept = _round_trip(TopK(0.01), values)
    for chunk, out in zip(values.split(CHUNK), kept.split(CHUNK), strict=True):
        largest = chunk.abs().topk(-(-len(chunk) // 100)).indices
        expected = torch.zeros_like(chunk).index_copy_(0, largest, chunk[largest])
        assert torch.equal(out, expected)


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_wrong_densities(density):
    with pytest.raises(ValueError, match="density must be in"):
        TopK(density)


def test_names():
    assert (as_codec("bf16"), as_codec("int8"), as_codec(None), as_codec(TopK(0.5))) == (
        BF16(),
        Int8(),
        None,
        TopK(0.5),
    )
    with pytest.raises(ValueError, match="'bf16', 'int8'"):
        as_codec("int4")
