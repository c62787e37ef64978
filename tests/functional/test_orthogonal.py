"""Orthogonalised steps against the singular value decomposition and torch's Muon."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_lopt.functional.orthogonal import FORMER_POLYNOMIALS, POLYNOMIALS, orthogonalise

SHAPES = [(5, 7), (7, 5), (6, 6), (4, 3, 3, 3), (40, 3, 9), (1, 8), (1, 3, 1)]


@pytest.mark.parametrize("polynomials", [POLYNOMIALS, FORMER_POLYNOMIALS], ids=["present", "former"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_go_through_the_polynomials_and_the_norm_stays(shape, polynomials):
    step = torch.randn(2, *shape, dtype=torch.float64)
    result = orthogonalise(step, polynomials=polynomials)
    assert result.shape == step.shape
    u, values, v = torch.linalg.svd(step.flatten(2), full_matrices=False)
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    values = values / norm
    for a, b, c in polynomials:
        values = a * values + b * values**3 + c * values**5
    values *= norm / torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    torch.testing.assert_close(result.flatten(2), u * values.unsqueeze(1) @ v)


def plain(step, polynomials):
    """The iterations of the step itself, in its type."""
    x = step / torch.linalg.matrix_norm(step, keepdim=True)
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x * (torch.linalg.matrix_norm(step, keepdim=True) / torch.linalg.matrix_norm(x, keepdim=True))


def distance(result, wanted):
    return (torch.linalg.vector_norm(result.double() - wanted) / torch.linalg.vector_norm(wanted)).item()


@pytest.mark.parametrize("shape", [(16, 64), (40, 40), (100, 40), (70, 300), (3, 2000)], ids=str)
@pytest.mark.parametrize("decades", [0, 6, 40])
@pytest.mark.parametrize("polynomials", [POLYNOMIALS, FORMER_POLYNOMIALS], ids=["present", "former"])
def test_iterations_of_the_gram_matrix_are_those_of_the_step(shape, decades, polynomials):
    """As near to the reference in float64 as those are; with one Gram matrix for all they would not be."""
    rows, columns = min(shape), max(shape)
    u = torch.linalg.qr(torch.randn(2, rows, rows, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(2, columns, rows, dtype=torch.float64))[0]
    step = u * torch.logspace(0, -decades, rows, dtype=torch.float64) @ v.mT
    step = step if shape[0] < shape[1] else step.mT
    assert distance(orthogonalise(step, polynomials=polynomials), plain(step, polynomials)) < 1e-11
    single = step.float()
    limit = 2e-6 if decades == 0 else 2e-4
    assert distance(orthogonalise(single, polynomials=polynomials), plain(single.double(), polynomials)) < limit


def test_well_conditioned_values_become_nearly_equal():
    u, _, v = torch.linalg.svd(torch.randn(20, 30), full_matrices=False)
    step = (u * torch.linspace(0.2, 1, 20) @ v).unsqueeze(0)
    values = torch.linalg.svdvals(orthogonalise(step)[0])
    assert values.max() < 1.8 * values.min()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9 has no Muon")
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)], ids=str)
def test_the_direction_is_that_of_muon(shape):
    """With its polynomials; it works in bfloat16."""
    param = torch.nn.Parameter(torch.zeros(shape))
    muon = torch.optim.Muon([param], lr=1, weight_decay=0, momentum=0)
    param.grad = torch.randn(shape)
    muon.step()
    ours = orthogonalise(param.grad.unsqueeze(0), polynomials=FORMER_POLYNOMIALS)
    assert F.cosine_similarity(ours.flatten(), -param.detach().flatten(), dim=0) > 0.999


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e15, 1e30])
def test_any_scale(scale):
    step = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalise(scale * step), scale * orthogonalise(step), rtol=1e-4, atol=0)
