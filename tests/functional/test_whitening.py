"""Whitened steps against inverse roots by eigenvalues."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt.functional import ada, grams, whitening
from lightning_lopt.functional.whitening import FLOOR, KEEP, POLYNOMIALS, times_inverse_root, update_grams, whiten

SHAPES = [(5, 7), (7, 5), (6, 6), (4, 3, 2, 2), (1, 4), (4, 1), (9,), ()]


def accumulated(grads, dtype=torch.float64):
    """The accumulators after some pseudo-gradients [P, *S]."""
    state = ada.AdaState.zeros(tuple(grads[0].shape[1:]), len(grads[0]), dtype, grads[0].device, grams=True)
    for grad in grads:
        update_grams(state, grad)
    return state


def root_by_eigenvalues(gram):
    """[P, n, n]: what the iterations make of each eigenvalue."""
    values, vectors = torch.linalg.eigh(gram / torch.linalg.matrix_norm(gram, keepdim=True))
    values, inverse = values + FLOOR, torch.ones_like(values)
    for a, b, c in POLYNOMIALS:
        x = values * inverse.square()
        inverse = inverse * (a + b * x + c * x.square())
    return vectors * inverse.unsqueeze(-2) @ vectors.mT


def inverse_root(gram):
    """The root itself, [P, n, n]."""
    return times_inverse_root(gram.clone(), torch.eye(gram.shape[1], dtype=gram.dtype).expand_as(gram))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gram_matrices_are_exponential_sums(shape):
    grads = [torch.randn(2, *shape, dtype=torch.float64) for _ in range(3)]
    state = accumulated(grads)
    matrices = [grad.reshape(2, shape[0] if shape else 1, -1) for grad in grads]
    left = sum(KEEP ** (2 - t) * matrix @ matrix.mT for t, matrix in enumerate(matrices))
    if len(shape) < 2:
        torch.testing.assert_close(state.left_gram.flatten(1), left.diagonal(dim1=1, dim2=2))
        assert state.right_gram.numel() == 0
        return
    right = sum(KEEP ** (2 - t) * matrix.mT @ matrix for t, matrix in enumerate(matrices))
    torch.testing.assert_close(state.left_gram.squeeze(1), left)
    torch.testing.assert_close(state.right_gram.squeeze(1), right)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 1], ids=str)
def test_both_sides_are_multiplied_with_their_roots(shape):
    grads = [torch.randn(2, *shape, dtype=torch.float64) for _ in range(3)]
    state, step = accumulated(grads), torch.randn(2, *shape, dtype=torch.float64)
    result = whiten(step, state)
    wanted = root_by_eigenvalues(state.left_gram[:, 0]) @ step.flatten(2) @ root_by_eigenvalues(state.right_gram[:, 0])
    wanted *= torch.linalg.matrix_norm(step.flatten(2), keepdim=True) / torch.linalg.matrix_norm(wanted, keepdim=True)
    torch.testing.assert_close(result.flatten(2), wanted)


def test_vectors_are_divided_by_the_root_of_their_mean_square():
    grads = [torch.randn(1, 50, dtype=torch.float64) for _ in range(3)]
    state, step = accumulated(grads), torch.randn(1, 50, dtype=torch.float64)
    square = sum(KEEP ** (2 - t) * grad.square() for t, grad in enumerate(grads))
    wanted = step / (square / square.norm() + FLOOR).sqrt()
    torch.testing.assert_close(whiten(step, state), wanted * step.norm() / wanted.norm())


def test_eigenvalues_of_the_roots():
    """Right up to a factor between 0.87 and 1.13, from the floor on."""
    basis = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
    values = torch.cat([torch.zeros(2), torch.logspace(-4, 0, 38)]).double()
    root = inverse_root((basis * values @ basis.mT).unsqueeze(0))[0]
    ratio = (basis.mT @ root @ basis).diagonal() * (values + FLOOR).sqrt()
    assert 0.871 < ratio.min() < 1 < ratio.max() < 1.129


@pytest.mark.parametrize("side", [3, 64, 150])
@pytest.mark.parametrize("width", [0.5, 1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=["64", "32"])
def test_narrow_and_wide_steps_meet_the_same_root(side, width, dtype, tolerance):
    """For Gram matrices of any condition, in tiles and in one product; the polynomials multiply rounding by 100."""
    basis = torch.linalg.qr(torch.randn(2, side, side, dtype=torch.float64))[0]
    gram = basis * torch.logspace(-12, -1, side, dtype=torch.float64) @ basis.mT
    step = torch.randn(2, side, max(1, int(width * side)), dtype=torch.float64)
    gram /= torch.linalg.matrix_norm(gram, keepdim=True)
    wanted = root_by_eigenvalues(gram) @ step
    result = times_inverse_root(gram.to(dtype), step.to(dtype)).double()
    assert torch.linalg.vector_norm(result - wanted) <= tolerance * torch.linalg.vector_norm(wanted)


def test_sides_that_are_too_long_are_cut_into_blocks(monkeypatch):
    """As if each block of rows and of columns were a matrix of its own, but for their common norm."""
    monkeypatch.setattr(grams, "MAX_SIDE", 4)
    grams.gram_shapes.cache_clear()
    try:
        grads = [torch.randn(2, 7, 10, dtype=torch.float64) for _ in range(2)]
        state, step = accumulated(grads), torch.randn(2, 7, 10, dtype=torch.float64)
    finally:
        grams.gram_shapes.cache_clear()
    assert state.left_gram.shape == (2, 2, 4, 4)
    assert state.right_gram.shape == (2, 3, 4, 4)

    def cut(gram, sizes):
        gram = gram / gram.flatten(1).norm(dim=1).view(2, 1, 1, 1)
        roots = inverse_root(gram.flatten(0, 1)).view_as(gram)
        return [torch.block_diag(*(root[:n, :n] for root, n in zip(each, sizes, strict=True))) for each in roots]

    pairs = zip(cut(state.left_gram, (4, 3)), step, cut(state.right_gram, (4, 4, 2)), strict=True)
    wanted = torch.stack([left @ matrix @ right for left, matrix, right in pairs])
    wanted *= (step.flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).view(2, 1, 1)
    torch.testing.assert_close(whiten(step, state), wanted)


def test_groups_of_blocks_do_not_matter(monkeypatch):
    grads = [torch.randn(2, 30, 3, dtype=torch.float64) for _ in range(2)]
    state, step = accumulated(grads), torch.randn(2, 30, 3, dtype=torch.float64)
    whole = whiten(step, state)
    monkeypatch.setitem(whitening.GROUP, "cpu", 150)
    torch.testing.assert_close(whiten(step, state), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(1000, 2), (3, 500), (2000,), (768, 3072), (50_000, 64)], ids=str)
def test_memory_is_bounded_by_a_multiple_of_the_parameters(shape):
    sizes = [number * side * side for number, side, _ in grams.gram_shapes(shape)]
    assert sum(sizes) <= (grams.MAX_RATIO + 1) * torch.Size(shape).numel()


@pytest.mark.parametrize("scale", [1e-17, 1e-6, 1e6, 1e17])
@pytest.mark.parametrize("shape", [(5, 7), (9,)], ids=str)
def test_any_scale(shape, scale):
    grads, step = [torch.randn(1, *shape) for _ in range(3)], torch.randn(1, *shape)
    wanted = whiten(step, accumulated(grads, torch.float32))
    result = whiten(scale * step, accumulated([scale * grad for grad in grads], torch.float32))
    torch.testing.assert_close(result / scale, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_gradients_nothing_moves(shape):
    zeros = torch.zeros(2, *shape)
    assert torch.equal(whiten(zeros, accumulated([zeros], torch.float32)), zeros)
