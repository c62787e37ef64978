"""Whitened steps: directions common to recent pseudo-gradients are made smaller, by their Gram matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lopt.functional.ada import BaseState
from lightning_lopt.functional.orthogonal import MUON, Polynomials
from lightning_lopt.functional.products import as_matrix, grafted, norm, product, symmetric_product

KEEP = 0.7  # of the Gram matrices, from round to round
FLOOR = 0.005  # of their eigenvalues, in units of their norm
# Coefficients of 1, x and x² in the polynomials of the iterations: of all such pairs those with the least error of the
# root on [FLOOR, 1 + FLOOR], 13 %; the former ones are right up to a factor between 0.68 and 1.2.
POLYNOMIALS: Polynomials = ((6.2094, -16.1710, 11.4899), (2.3126, -1.6796, 0.4200))
FORMER_POLYNOMIALS: Polynomials = (MUON,) * 3
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
        if gram.numel():
            blocks = _row_blocks(side, gram)
            squares = blocks.square() if blocks.shape[1:] == (1, 1) else symmetric_product(blocks, blocks.mT)
            torch.add(squares.view_as(gram), gram, alpha=KEEP, out=gram)


def whiten(
    step: Tensor, state: BaseState, size: Tensor | None = None, polynomials: Polynomials = POLYNOMIALS
) -> Tensor:
    r"""Whiten a step with the Gram matrices, and keep its norm.

    .. math:: W = \Big(\frac{L}{|L|} + 0.005\,I\Big)^{-1/2} S \Big(\frac{R}{|R|} + 0.005\,I\Big)^{-1/2}
        \cdot \frac{|S|}{|\cdot|}

    The roots are those of two coupled Newton-Schulz iterations: their eigenvalues are right up to a factor between
    0.87 and 1.13. A vector is divided by the root of its L alone.

    Args:
        step: Step S, [P, *S].
        state: Memory of the parameter, already advanced.
        size: Norm of S where it is known, [P, 1, ...]; None to compute it.
        polynomials: Coefficients of the iterations.

    Returns:
        Whitened step W, of the same shape; 0 where S is 0.

    Source: Morwani et al. 2024, arXiv 2406.17748: Shampoo with exponents of -1/2 is the best Kronecker approximation
    of the whitening by the full second moment. Polynomials: Amsel et al. 2025, arXiv 2505.16932: the best one of each
    iteration makes the best of all.

    Example:
        >>> grad = torch.diag(torch.tensor([4.0, 1.0])).unsqueeze(0)
        >>> state = BaseState.zeros((2, 2), 1, torch.float32, grad.device)
        >>> update_grams(state, grad)
        >>> result = whiten(grad, state)[0]
        >>> bool(result[1, 1] > 2 * result[0, 0]), round(result.square().sum().item(), 4)
        (True, 17.0)
    """
    matrix = _conditioned(as_matrix(step), state.left_gram, polynomials)
    if state.right_gram.numel():
        matrix = _conditioned(matrix.mT, state.right_gram, polynomials).mT
    return grafted(matrix.reshape(step.shape), norm(step) if size is None else size)


def _row_blocks(matrix: Tensor, gram: Tensor) -> Tensor:
    """Split rows by the blocks of a Gram matrix: [P, n, m] to [P * number, side, m], the last one padded."""
    _, number, side, _ = gram.shape
    missing = number * side - matrix.shape[1]
    padded = F.pad(matrix, (0, 0, 0, missing)) if missing else matrix
    return padded.reshape(-1, side, matrix.shape[2])


def _conditioned(matrix: Tensor, gram: Tensor, polynomials: Polynomials) -> Tensor:
    """Multiply each block of rows with the inverse root of its Gram matrix."""
    shrink = norm(gram).clamp_(min=torch.finfo(gram.dtype).tiny).reciprocal_().expand(-1, gram.shape[1], -1, -1)
    blocks, side = _row_blocks(matrix, gram), gram.shape[2]
    if side == 1:
        rows = (gram * shrink).add_(FLOOR).rsqrt_().flatten(0, 1) * blocks
    else:
        count = max(1, GROUP.get(gram.device.type, GROUP["other"]) // side**2)
        parts = (tensor.split(count) for tensor in (gram.flatten(0, 1), shrink.flatten(0, 1), blocks))
        whitened = [
            times_inverse_root(part * factor, rows, polynomials) for part, factor, rows in zip(*parts, strict=True)
        ]
        rows = torch.cat(whitened) if len(whitened) > 1 else whitened[0]
    return rows.view(matrix.shape[0], -1, matrix.shape[2])[:, : matrix.shape[1]]


def times_inverse_root(grams: Tensor, rows: Tensor, polynomials: Polynomials = POLYNOMIALS) -> Tensor:
    r"""Compute (A + 0.005 I)^(-1/2) S, nearly.

    The coupled iteration multiplies with polynomials :math:`q_i` of :math:`X_i = A (q_0(X_0) \cdots
    q_{i-1}(X_{i-1}))^2` in turn. All of these commute and are symmetric, so a narrow S is multiplied with them one by
    one: their product is never formed.

    Args:
        grams: Symmetric matrices A with eigenvalues in [0, 1], [P, n, n]; overwritten.
        rows: Factors S, [P, n, m].
        polynomials: Coefficients of the iterations, at least two.
    """
    side, width = rows.shape[1:]
    grams.diagonal(dim1=1, dim2=2).add_(FLOOR)
    if width < side:
        return _times_roots(grams, rows, product, polynomials)
    return product(_times_roots(grams, None, symmetric_product, polynomials), rows)


def _times_roots(x: Tensor, rows: Tensor | None, times: Callable[..., Tensor], polynomials: Polynomials) -> Tensor:
    """Apply the polynomials of the coupled iteration to `rows`; None for the identity matrix."""
    for i, (linear, cubic, quintic) in enumerate(polynomials):
        last = i == len(polynomials) - 1
        if last and rows is not None:  # nothing else needs the polynomial itself
            return times(x, times(x, rows, rows, beta=cubic, alpha=quintic), rows, beta=linear)
        higher = symmetric_product(x, x, x, beta=cubic, alpha=quintic)
        if rows is None:
            rows = higher.clone()
            rows.diagonal(dim1=1, dim2=2).add_(linear)
        else:
            rows = times(higher, rows, rows, beta=linear)
        if not last:
            half = symmetric_product(x, higher, x, beta=linear)
            x = symmetric_product(half, higher, half, beta=linear)
    assert rows is not None
    return rows
