"""Orthogonalised steps: a matrix with its singular vectors kept and its singular values made nearly equal."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lightning_lopt.functional.products import as_matrix, grafted, norm, product, symmetric_product

Polynomials = tuple[tuple[float, float, float], ...]
# Coefficients of x, x³ and x⁵: of all such pairs that with the least error on singular values from 0.05 to 1, 22 %.
POLYNOMIALS: Polynomials = ((6.7524, -18.3510, 13.2633), (2.5379, -1.8747, 0.4413))
MUON = (3.4445, -4.7750, 2.0315)  # the slope at 0 is as large as it can be
FORMER_POLYNOMIALS: Polynomials = (MUON,) * 5
WIDE = 1.5  # ratio of the sides from which on the Gram matrix is iterated
LONGEST = 3  # iterations of one Gram matrix: in float32 a fourth one would magnify its rounding beyond the step's


def orthogonalise(step: Tensor, size: Tensor | None = None, polynomials: Polynomials = POLYNOMIALS) -> Tensor:
    r"""Make the singular values of a matrix nearly equal, and keep its norm.

    .. math:: X_0 = S/|S|,\quad X_{i+1} = (a_i I + b_i X_i X_i^T + c_i (X_i X_i^T)^2) X_i,\quad
        O = X_2 \frac{|S|}{|X_2|}

    The two iterations carry singular values between 1 and 0.05 of |S| to between 0.78 and 1.22, and magnify smaller
    ones, which may be noise, by 17 at most: Muon's five do by 485.

    Args:
        step: Step S, [P, *S], a matrix of its first dimension by the rest.
        size: Norm of S where it is known, [P, 1, ...]; None to compute it.
        polynomials: Coefficients a, b and c of the iterations.

    Returns:
        Orthogonalised step O, of the same shape; 0 where S is 0.

    The iterations of a wide matrix are those of its Gram matrix :math:`X_i X_i^T`, which is small, and of the product
    of all factors; should there be more than three, the Gram matrix is formed anew.

    Source: Jordan et al. 2024, "Muon"; best polynomials: Amsel et al. 2025, arXiv 2505.16932; iterations of the Gram
    matrix: Zhang, Amsel, Chen and Dao 2026, "Gram Newton-Schulz"; the norm is grafted as in Agarwal et al. 2020,
    arXiv 2002.11803.

    Example:
        >>> result = orthogonalise(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]))[0]
        >>> bool(result[1, 1] > 0.8 * result[0, 0]), round(result.square().sum().item(), 4)
        (True, 10.0)
    """
    size = norm(step) if size is None else size
    x = as_matrix(step)
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x) / size.view(-1, 1, 1).clamp(min=torch.finfo(x.dtype).tiny)
    x = (_by_grams if x.shape[2] > WIDE * x.shape[1] else _by_steps)(x, polynomials)
    return grafted((x.mT if tall else x).reshape(step.shape), size)


def _by_steps(x: Tensor, polynomials: Polynomials) -> Tensor:
    """Iterate matrices [P, n, m], n <= m."""
    for polynomial in polynomials:
        x = product(_higher_terms(symmetric_product(x, x.mT), polynomial), x, x, beta=polynomial[0])
    return x


def _by_grams(x: Tensor, polynomials: Polynomials) -> Tensor:
    """Take the iterations of `_by_steps`, most of them on the Gram matrices [P, n, n]."""
    for first in range(0, len(polynomials), LONGEST):
        some = polynomials[first : first + LONGEST]
        gram = symmetric_product(x, x.mT)
        higher = _higher_terms(gram, some[0])
        factor = higher.clone()
        factor.diagonal(dim1=1, dim2=2).add_(some[0][0])
        for (linear, *_), polynomial in pairwise(some):
            half = symmetric_product(gram, higher, gram, beta=linear)
            gram = symmetric_product(half, higher, half, beta=linear)
            higher = _higher_terms(gram, polynomial)
            factor = symmetric_product(higher, factor, factor, beta=polynomial[0])
        x = product(factor, x)
    return x


def _higher_terms(gram: Tensor, polynomial: tuple[float, float, float]) -> Tensor:
    """Compute b G + c G² of Gram matrices G, [P, n, n]."""
    _, cubic, quintic = polynomial
    return symmetric_product(gram, gram, gram, beta=cubic, alpha=quintic)
