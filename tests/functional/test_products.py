"""Products in tiles against torch's."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt.functional import products
from lightning_lopt.functional.products import product, symmetric_product

SIZES = [(3, 5, 2), (97, 8, 20), (40, 8, 600), (2000, 4, 3)]


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_lie_in_memory_as_their_right_factors(size, batch, by_columns):
    (a, b, c), options = size, {"dtype": torch.float64}
    left, plus = torch.randn(batch, a, b, **options), torch.randn(batch, a, c, **options)
    right = torch.randn(batch, c, b, **options).mT if by_columns else torch.randn(batch, b, c, **options)
    results = product(left, right), product(left, right, plus, beta=2.0, alpha=3.0)
    torch.testing.assert_close(results[0], left @ right)
    torch.testing.assert_close(results[1], 2 * plus + 3 * left @ right)
    assert all((result.mT if by_columns else result).is_contiguous() for result in results)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("side", [5, 96, 97, 250])
def test_symmetric_products(side, batch):
    half = torch.randn(batch, side, side, dtype=torch.float64)
    gram = half + half.mT
    cube = gram @ gram @ gram
    torch.testing.assert_close(symmetric_product(gram, gram @ gram), cube)
    torch.testing.assert_close(symmetric_product(gram, gram @ gram, gram, beta=2.0, alpha=3.0), 2 * gram + 3 * cube)


def test_a_long_matrix_has_few_tiles(monkeypatch):
    numbers = []
    monkeypatch.setattr(products, "_fill", lambda tiles, *_: numbers.append(len(tiles)))
    for rows in (500, 5000, 50_000):
        product(torch.empty(1, rows, 4), torch.empty(1, 4, 8))
    assert numbers == [6, 14, 16]
