"""Whitened steps: what is common to recent pseudo-gradients is made smaller, by their Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lopt.functional.ada import AdaState
from lightning_lopt.functional.orthogonal import COEFFICIENTS
from lightning_lopt.functional.products import as_matrix, grafted, norm, product

KEEP = 0.7  # of the Gram matrices, from round to round
FLOOR = 0.005  # of their eigenvalues, in units of their norm
ITERATIONS = 3
GROUP = 1 << 20  # elements of the blocks whose roots are in memory together


def update_grams(state: AdaState, grad: Tensor) -> None:
    r"""Advance the Gram matrices, in place.

    .. math:: L \leftarrow 0.7\,L + G G^T,\quad R \leftarrow 0.7\,R + G^T G

    Args:
        state: the accumulators; of L and R only the diagonal blocks of `grams.gram_shapes` are kept.
        grad: averaged pseudo-gradient, [P, *S], G as a matrix of its first dimension by the rest.

    Source: Shi et al. 2023, arXiv 2309.06497: Shampoo with exponential averages.
    """
    matrix = as_matrix(grad)
    for gram, side in ((state.left, matrix), (state.right, matrix.mT)):
        if gram.numel():
            blocks = _blocks(side, gram)
            square = blocks.square() if blocks.shape[1:] == (1, 1) else product(blocks, blocks.mT)
            gram.mul_(KEEP).add_(square.view_as(gram))


def whiten(step: Tensor, state: AdaState) -> Tensor:
    r"""Whiten a step with the Gram matrices, and keep its norm.

    .. math:: W = \Big(\frac{L}{|L|} + 0.005\,I\Big)^{-1/2} S \Big(\frac{R}{|R|} + 0.005\,I\Big)^{-1/2}
        \cdot \frac{|S|}{|\cdot|}

    The roots are those of three coupled Newton-Schulz iterations: their eigenvalues are right up to a factor between
    0.68 and 1.2. A vector is divided by the root of its L alone.

    Args:
        step: S, [P, *S].
        state: the accumulators, already advanced.

    Returns:
        W, of the same shape; 0 where S is 0.

    Source: Morwani et al. 2024, arXiv 2406.17748: Shampoo with exponents of -1/2 is the best Kronecker approximation
    of the whitening by the full second moment.

    Example:
        >>> grad = torch.diag(torch.tensor([4.0, 1.0])).unsqueeze(0)
        >>> state = AdaState.zeros((2, 2), 1, torch.float32, grad.device, grams=True)
        >>> update_grams(state, grad)
        >>> result = whiten(grad, state)[0]
        >>> bool(result[1, 1] > 2 * result[0, 0]), round(result.square().sum().item(), 4)
        (True, 17.0)
    """
    matrix = _conditioned(as_matrix(step), state.left)
    if state.right.numel():
        matrix = _conditioned(matrix.mT, state.right).mT
    return grafted(matrix.reshape(step.shape), step)


def _blocks(matrix: Tensor, gram: Tensor) -> Tensor:
    """The rows that belong to each block of a Gram matrix: [P, n, m] -> [P * number, side, m], the last one padded."""
    _, number, side, _ = gram.shape
    padded = F.pad(matrix, (0, 0, 0, number * side - matrix.shape[1]))
    return padded.reshape(-1, side, matrix.shape[2])


def _conditioned(matrix: Tensor, gram: Tensor) -> Tensor:
    """Each block of rows by the inverse root of its Gram matrix."""
    scale = norm(gram).clamp(min=torch.finfo(gram.dtype).tiny).expand(-1, gram.shape[1], -1, -1)
    blocks, side = _blocks(matrix, gram), gram.shape[2]
    if side == 1:
        rows = inverse_root((gram / scale).flatten(0, 1)) * blocks
    else:
        parts = (tensor.split(max(1, GROUP // side**2)) for tensor in (gram.flatten(0, 1), scale.flatten(0, 1), blocks))
        rows = torch.cat([product(inverse_root(part / size), rows) for part, size, rows in zip(*parts, strict=True)])
    return rows.view(len(matrix), -1, matrix.shape[2])[:, : matrix.shape[1]]


def inverse_root(grams: Tensor) -> Tensor:
    """(A + 0.005 I)^(-1/2), nearly, of symmetric matrices with eigenvalues in [0, 1]: [P, n, n]."""
    eye = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    shifted = grams + FLOOR * eye
    if len(eye) == 1:
        return shifted.rsqrt_()

    def polynomial(x: Tensor) -> Tensor:
        return COEFFICIENTS[1] * x + COEFFICIENTS[2] * product(x, x) + COEFFICIENTS[0] * eye

    inverse = polynomial(shifted)
    root = product(shifted, inverse)  # these two commute
    for iteration in range(1, ITERATIONS):
        factor = polynomial(product(inverse, root))
        inverse = product(factor, inverse)
        if iteration < ITERATIONS - 1:
            root = product(root, factor)
    return inverse
