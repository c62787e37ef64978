"""Orthogonalised steps: a matrix with its singular vectors kept and its singular values made nearly equal."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lopt.functional.products import as_matrix, grafted, norm, product, symmetric_product

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x³ and x⁵: the slope at 0 is as large as it can be
ITERATIONS = 5
WIDE = 1.5  # ratio of the sides from which on the Gram matrix is iterated
# Iterations of each Gram matrix: in float32 a fourth one would magnify its rounding beyond the step's.
RESTARTS = (3, 2)


def orthogonalise(step: Tensor, size: Tensor | None = None) -> Tensor:
    r"""Make the singular values of a matrix nearly equal, and keep its norm.

    .. math:: X_0 = S/|S|,\quad X_{i+1} = (a I + b X_i X_i^T + c (X_i X_i^T)^2) X_i,\quad
        O = X_5 \frac{|S|}{|X_5|}

    Five such Newton-Schulz iterations carry singular values between 1 and about 0.01 of |S| to between 0.7 and 1.2.

    Args:
        step: Step S, [P, *S], a matrix of its first dimension by the rest.
        size: Norm of S where it is known, [P, 1, ...]; None to compute it.

    Returns:
        Orthogonalised step O, of the same shape; 0 where S is 0.

    The iterations of a wide matrix are those of its Gram matrix :math:`X_i X_i^T`, which is small, and of the product
    of all factors; after three of them the Gram matrix is formed anew.

    Source: Jordan et al. 2024, "Muon"; the norm is grafted as in Agarwal et al. 2020, arXiv 2002.11803. Iterations of
    the Gram matrix: Zhang, Amsel, Chen and Dao 2026, "Gram Newton-Schulz".

    Example:
        >>> result = orthogonalise(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]))[0]
        >>> bool(result[1, 1] > 0.8 * result[0, 0]), round(result.square().sum().item(), 4)
        (True, 10.0)
    """
    size = norm(step) if size is None else size
    x = as_matrix(step)
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x) / size.view(-1, 1, 1).clamp(min=torch.finfo(x.dtype).tiny)
    x = _by_grams(x) if x.shape[2] > WIDE * x.shape[1] else _by_steps(x)
    return grafted((x.mT if tall else x).reshape(step.shape), size)


def _by_steps(x: Tensor) -> Tensor:
    """Iterate matrices [P, n, m], n <= m."""
    for _ in range(ITERATIONS):
        x = product(_higher_terms(symmetric_product(x, x.mT)), x, x, beta=COEFFICIENTS[0])
    return x


def _by_grams(x: Tensor) -> Tensor:
    """Take the iterations of `_by_steps`, most of them on the Gram matrices [P, n, n]."""
    linear = COEFFICIENTS[0]
    for iterations in RESTARTS:
        gram = symmetric_product(x, x.mT)
        higher = _higher_terms(gram)
        factor = higher.clone()
        factor.diagonal(dim1=1, dim2=2).add_(linear)
        for _ in range(iterations - 1):
            half = symmetric_product(gram, higher, gram, beta=linear)
            gram = symmetric_product(half, higher, half, beta=linear)
            higher = _higher_terms(gram)
            factor = symmetric_product(higher, factor, factor, beta=linear)
        x = product(factor, x)
    return x


def _higher_terms(gram: Tensor) -> Tensor:
    """Compute b G + c G² of Gram matrices G, [P, n, n]."""
    return symmetric_product(gram, gram, gram, beta=COEFFICIENTS[1], alpha=COEFFICIENTS[2])
