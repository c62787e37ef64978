"""Whitened steps: directions common to recent pseudo-gradients are made smaller, by their Gram matrices."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from lightning_lopt.functional.ada import BaseState
from lightning_lopt.functional.orthogonal import polynomial
from lightning_lopt.functional.products import as_matrix, grafted, norm, product, symmetric_product

KEEP = 0.7  # of the Gram matrices, from round to round
FLOOR = 0.005  # of their eigenvalues, in units of their norm
ITERATIONS = 3
# Elements of the Gram matrices whose roots are in memory together: on a CPU they stay in the cache.
GROUP = {"cpu": 1 << 16, "other": 1 << 20}


def update_grams(state: BaseState, grad: Tensor) -> None:
    r"""Advance the Gram matrices, in place.

    .. math:: L \leftarrow 0.7\,L + G G^T,\quad R \leftarrow 0.7\,R + G^T G

    Args:
        state: Memory of the parameter; of L and R only the diagonal blocks of `grams.gram_shapes` are kept.
        grad: Averaged pseudo-gradient, [P, *S], G as a matrix of its first dimension by the rest.

    Source: Shi et al. 2023, arXiv 2309.06497: Shampoo with exponential averages.
    """
    matrix = as_matrix(grad)
    for gram, side in ((state.left_gram, matrix), (state.right_gram, matrix.mT)):
        for blocks, rows in _blocks(gram, side):
            flat = rows.flatten(0, 1)
            squares = flat.square() if flat.shape[1:] == (1, 1) else symmetric_product(flat, flat.mT)
            torch.add(squares.view_as(blocks), blocks, alpha=KEEP, out=blocks)


def whiten(step: Tensor, state: BaseState, size: Tensor | None = None) -> Tensor:
    r"""Whiten a step with the Gram matrices, and keep its norm.

    .. math:: W = \Big(\frac{L}{|L|} + 0.005\,I\Big)^{-1/2} S \Big(\frac{R}{|R|} + 0.005\,I\Big)^{-1/2}
        \cdot \frac{|S|}{|\cdot|}

    The roots are those of three coupled Newton-Schulz iterations: their eigenvalues are right up to a factor between
    0.68 and 1.2. A vector is divided by the root of its L alone.

    Args:
        step: Step S, [P, *S].
        state: Memory of the parameter, already advanced.
        size: Norm of S where it is known, [P, 1, ...]; None to compute it.

    Returns:
        Whitened step W, of the same shape; 0 where S is 0.

    Source: Morwani et al. 2024, arXiv 2406.17748: Shampoo with exponents of -1/2 is the best Kronecker approximation
    of the whitening by the full second moment.

    Example:
        >>> grad = torch.diag(torch.tensor([4.0, 1.0])).unsqueeze(0)
        >>> state = BaseState.zeros((2, 2), 1, torch.float32, grad.device)
        >>> update_grams(state, grad)
        >>> result = whiten(grad, state)[0]
        >>> bool(result[1, 1] > 2 * result[0, 0]), round(result.square().sum().item(), 4)
        (True, 17.0)
    """
    matrix = _conditioned(as_matrix(step), state.left_gram)
    if state.right_gram.numel():
        matrix = _conditioned(matrix.mT, state.right_gram).mT
    return grafted(matrix.reshape(step.shape), norm(step) if size is None else size)


def _blocks(gram: Tensor, matrix: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pair blocks of a Gram matrix with their rows, [P, N, n, n] and [P, N, n, m]: those of one size, and the last."""
    side = gram.shape[2]
    whole, rest = divmod(matrix.shape[1], side) if gram.numel() else (0, 0)
    blocks, pairs = matrix[:, : whole * side].unflatten(1, (whole, side)), []
    if whole:
        pairs.append((gram[:, :whole], blocks))
    if rest:
        pairs.append((gram[:, whole:, :rest, :rest], matrix[:, whole * side :].unsqueeze(1)))
    return pairs


def _conditioned(matrix: Tensor, gram: Tensor) -> Tensor:
    """Multiply each block of rows with the inverse root of its Gram matrix."""
    shrink = norm(gram).clamp_(min=torch.finfo(gram.dtype).tiny).reciprocal_()
    if gram.shape[2] == 1:
        return (gram.flatten(1) * shrink.flatten(1)).add_(FLOOR).rsqrt_().unsqueeze(2) * matrix
    count, result = max(1, GROUP.get(gram.device.type, GROUP["other"]) // gram.shape[2] ** 2), torch.empty_like(matrix)
    for (blocks, rows), (_, target) in zip(_blocks(gram, matrix), _blocks(gram, result), strict=True):
        for part, to, *operands in _groups(count, rows, target, blocks, shrink.expand(-1, blocks.shape[1], -1, -1)):
            grams = torch.mul(*operands).flatten(0, 1)
            to.copy_(times_inverse_root(grams, part.flatten(0, 1)).view_as(part))
    return result


def _groups(count: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors [P, N, *] into groups of at most `count` blocks of the P * N."""
    for several in zip(*(tensor.split(count) for tensor in tensors), strict=True):
        size = max(1, count // len(several[0]))
        yield from zip(*(tensor.split(size, dim=1) for tensor in several), strict=True)


def times_inverse_root(grams: Tensor, rows: Tensor) -> Tensor:
    r"""Compute (A + 0.005 I)^(-1/2) S, nearly.

    The coupled iteration multiplies with a polynomial q of :math:`X_i = A (q(X_0) \cdots q(X_{i-1}))^2` in turn. All of
    these commute and are symmetric, so a narrow S is multiplied with them one by one: their product is never formed.

    Args:
        grams: Symmetric matrices A with eigenvalues in [0, 1], [P, n, n]; overwritten.
        rows: Factors S, [P, n, m].
    """
    grams.diagonal(dim1=1, dim2=2).add_(FLOOR)
    if rows.shape[2] < rows.shape[1]:
        for factor in _factors_of_root(grams):
            rows = product(factor, rows)
        return rows
    return product(reduce(symmetric_product, _factors_of_root(grams)), rows)


def _factors_of_root(x: Tensor) -> Iterator[Tensor]:
    """Yield the polynomials q(X_0), q(X_1), ... of the coupled iteration."""
    for remaining in reversed(range(ITERATIONS)):
        factor = polynomial(x)
        yield factor
        if remaining:
            x = symmetric_product(symmetric_product(x, factor), factor)
