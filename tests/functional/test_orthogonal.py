"""Orthogonalised steps against the singular value decomposition and torch's Muon."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_lopt.functional import orthogonal
from lightning_lopt.functional.orthogonal import COEFFICIENTS, ITERATIONS, orthogonalise

SHAPES = [(5, 7), (7, 5), (6, 6), (4, 3, 3, 3), (40, 3, 9), (1, 8), (1, 3, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_go_through_the_polynomial_and_the_norm_stays(shape):
    step = torch.randn(2, *shape, dtype=torch.float64)
    result = orthogonalise(step)
    assert result.shape == step.shape
    u, values, v = torch.linalg.svd(step.flatten(2), full_matrices=False)
    norm, (a, b, c) = torch.linalg.vector_norm(values, dim=-1, keepdim=True), COEFFICIENTS
    values = values / norm
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    values *= norm / torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    torch.testing.assert_close(result.flatten(2), u * values.unsqueeze(1) @ v)


@pytest.mark.parametrize("shape", [(16, 64), (100, 40), (70, 300), (3, 2000)], ids=str)
@pytest.mark.parametrize("decades", [0, 6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 5e-5)], ids=["64", "32"])
def test_iterations_of_the_gram_matrix_are_those_of_the_step(shape, decades, dtype, tolerance, monkeypatch):
    """As near to the reference in float64 as the plain iterations are; with one Gram matrix they would not be."""
    rows, columns = min(shape), max(shape)
    u = torch.linalg.qr(torch.randn(2, rows, rows, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(2, columns, rows, dtype=torch.float64))[0]
    step = u * torch.logspace(0, -decades, rows, dtype=torch.float64) @ v.mT
    step = step if shape[0] < shape[1] else step.mT
    result = orthogonalise(step.to(dtype)).double()
    assert max(orthogonal.RESTARTS) <= 3
    assert sum(orthogonal.RESTARTS) == ITERATIONS
    monkeypatch.setattr(orthogonal, "WIDE", math.inf)
    wanted = orthogonalise(step)
    assert torch.linalg.vector_norm(result - wanted) <= tolerance * torch.linalg.vector_norm(wanted)


def test_well_conditioned_values_become_nearly_equal():
    u, _, v = torch.linalg.svd(torch.randn(20, 30), full_matrices=False)
    step = (u * torch.linspace(0.1, 1, 20) @ v).unsqueeze(0)
    values = torch.linalg.svdvals(orthogonalise(step)[0])
    assert values.max() < 1.8 * values.min()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9 has no Muon")
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)], ids=str)
def test_the_direction_is_that_of_muon(shape):
    """Which works in bfloat16."""
    param = torch.nn.Parameter(torch.zeros(shape))
    muon = torch.optim.Muon([param], lr=1, weight_decay=0, momentum=0)
    param.grad = torch.randn(shape)
    muon.step()
    ours = orthogonalise(param.grad.unsqueeze(0))
    assert F.cosine_similarity(ours.flatten(), -param.detach().flatten(), dim=0) > 0.999


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e15, 1e30])
def test_any_scale(scale):
    step = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalise(scale * step), scale * orthogonalise(step), rtol=1e-4, atol=0)
