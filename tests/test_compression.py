"""Codecs against numpy's numbers, and factors against the best ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_lopt.compression import BF16, Int8, PowerSGD, TopK, as_codec
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


@pytest.mark.parametrize("rank", [0, 1.5, True])
def test_wrong_ranks(rank):
    with pytest.raises(ValueError, match="rank must be an integer >= 1"):
        PowerSGD(rank)


def _matrix(rows, columns, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (rows, columns))
    return left @ right.T


def _one_worker(codec, tensors, states=None):
    return codec.reduce(tensors, states or [None] * len(tensors), lambda tensors: [t.clone() for t in tensors])


def test_factors_hold_matrices_of_their_rank_and_nothing_else_is_factored():
    kernel = _matrix(12, 18, 3).view(12, 2, 9)
    tensors = [kernel, torch.randn(50), _matrix(5, 4, 4), torch.zeros(9, 9), torch.zeros(0, 8), torch.tensor(2.0)]
    means, sent, states = _one_worker(PowerSGD(3), tensors)
    for tensor, mean, own in zip(tensors, means, sent, strict=True):
        torch.testing.assert_close(mean, tensor, rtol=0, atol=1e-12)
        torch.testing.assert_close(own, tensor, rtol=0, atol=1e-12)
    assert torch.equal(means[2], tensors[2])  # of rank 4, in 20 numbers instead of 27
    assert [None if s is None else tuple(s.shape) for s in states] == [(18, 3), None, None, (9, 3), None, None]


def test_warm_starts_lead_to_the_best_approximation():
    """Also from a round in which there was nothing to send."""
    matrix = _matrix(40, 30, 30) @ torch.diag(0.7 ** torch.arange(30).double())
    singular_values = torch.linalg.svdvals(matrix)
    best = float(singular_values[4:].norm())
    _, _, states = _one_worker(PowerSGD(4), [torch.zeros_like(matrix)])
    errors = []
    for _ in range(20):
        (mean,), _, states = _one_worker(PowerSGD(4), [matrix], states)
        errors.append(float((matrix - mean).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.05 * best
    assert errors[-1] == pytest.approx(best, rel=1e-3)


def test_factors_of_what_is_not_finite_are_not_and_are_forgotten():
    matrix = torch.ones(20, 20)
    _, _, states = _one_worker(PowerSGD(2), [matrix])
    for wrong in (float("nan"), float("inf")):
        matrix[3, 4] = wrong
        (mean,), _, after = _one_worker(PowerSGD(2), [matrix], states)
        assert not mean.isfinite().all()
        assert torch.equal(after[0], states[0])


def test_names():
    given = ["bf16", "int8", None, TopK(0.5), PowerSGD(2)]
    assert [as_codec(compression) for compression in given] == [BF16(), Int8(), None, TopK(0.5), PowerSGD(2)]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ("int4", r"any Codec \(an object with encode, decode and sparse\) or any LinearCodec .* not 'int4'\.$"),
        (PowerSGD, "not <class"),
        (SimpleNamespace(encode=0, sparse=True), "which lacks decode"),
    ],
)
def test_what_is_no_codec(wrong, match):
    with pytest.raises(ValueError, match=match):
        as_codec(wrong)
