"""Codecs: lossy compression of what a sync sends, with error feedback.

There are two kinds, and any object with the methods of one of them is a valid `compression`:

* A `Codec` makes bytes of a flat tensor, and a tensor of bytes. Bytes cannot be summed: a sync decodes, averages and
  encodes again, or gathers the bytes of all workers.
* A `LinearCodec` sends only numbers that are linear in the values, as `PowerSGD` does. An all-reduce averages them, and
  nothing is encoded twice. It may keep a state of each tensor, the same on all workers.

A worker adds to its next values what was lost of these: the values minus those that were sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_lopt.functional.compression import (
    from_int8,
    from_top_k,
    is_worth_factors,
    orthonormal_basis,
    round_to_int8,
    select_top_k,
    top_k_chunks,
)
from lightning_lopt.functional.integers import as_integer, as_number


class Codec(Protocol):
    """A lossy code of flat tensors as bytes.

    The pieces of a flat tensor are tensors of the model, or the parts of them that are left where the flat tensor was
    cut into one share per worker; some may have size 0. Values that are not finite must not become finite ones.

    A codec is shared by virtual workers and must not change. Give it a `repr` with its settings, as a dataclass has:
    workers compare it, and a resume says if it has changed.

    Attributes:
        sparse: Whether all codes are sent to all workers, for a mean of several decoded tensors is denser than each of
            them and does not fit the code. Otherwise each worker averages its share and codes the mean, as an
            all-reduce does.

    Example:
        >>> class Signs:  # SyncOptions(compression=Signs())
        ...     sparse = True
        ...     def encode(self, values, sizes):
        ...         return torch.cat([values.abs().mean().view(1).view(torch.uint8), (values >= 0).to(torch.uint8)])
        ...     def decode(self, code, sizes):
        ...         return code[:4].view(torch.float32) * (2.0 * code[4 : 4 + sum(sizes)] - 1)
        >>> Signs().decode(Signs().encode(torch.tensor([1.0, -3.0]), [2]), [2])
        tensor([ 2., -2.])
    """

    @property
    def sparse(self) -> bool: ...

    def encode(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        """Code values as bytes.

        Args:
            values: Values, float32 [n].
            sizes: Sizes of the pieces that the values are made of; their sum is n.

        Returns:
            Code, uint8 [b], where b depends on the sizes alone.
        """
        ...

    def decode(self, code: Tensor, sizes: Sequence[int]) -> Tensor:
        """Invert `encode`, up to its loss.

        Args:
            code: Code, uint8 [>= b]: bytes that it was padded with may follow.
            sizes: Sizes that `encode` was given.

        Returns:
            Values, float32 [n].
        """
        ...


class Reduction(NamedTuple):
    """The result of `LinearCodec.reduce`, with an entry for each tensor.

    Attributes:
        means: Estimates of the means over the workers, the same on all of them.
        sent: Values of this worker as far as they are in these means: the mean of `sent` over the workers is `means`.
        states: States for the next call, the same on all workers; None for tensors without one.
    """

    means: Sequence[Tensor]
    sent: Sequence[Tensor]
    states: Sequence[Tensor | None]


@runtime_checkable
class LinearCodec(Protocol):
    """A lossy mean of tensors over the workers, by all-reduces of numbers that are linear in the tensors.

    All workers make the same calls. Like a `Codec` it must not change, and has a `repr` with its settings. Its
    memory is the states, one tensor or None for each tensor of the model, which are saved in checkpoints. They must
    be computed from means and constants alone, so that they are the same on all workers, and not in place. A state of
    another shape than expected may come from a checkpoint of a codec with other settings.

    Values that are not finite must not become finite ones. Values of 0 on some workers must make these workers count as
    0 in the means, with 0 in `sent`: that is how workers are left out.

    Random coordinates (`density`) are refused, since there would be other coordinates for the state in each round, and
    so are outer optimizers that need every worker's pseudo-gradient.

    Example:
        >>> class EveryOther:  # SyncOptions(compression=EveryOther())
        ...     def reduce(self, tensors, states, mean):
        ...         firsts = [0 if s is None else int(s) for s in states]
        ...         sent = [torch.zeros_like(t) for t in tensors]
        ...         halves = mean([t.flatten()[i::2] for t, i in zip(tensors, firsts)])
        ...         means = [torch.zeros_like(t) for t in tensors]
        ...         for t, s, m, i, half in zip(tensors, sent, means, firsts, halves):
        ...             s.view(-1)[i::2] = t.flatten()[i::2]
        ...             m.view(-1)[i::2] = half
        ...         return Reduction(means, sent, [torch.tensor(1 - i) for i in firsts])
        >>> EveryOther().reduce([torch.tensor([1.0, 2.0, 3.0])], [None], lambda tensors: tensors).sent
        [tensor([1., 0., 3.])]
    """

    def reduce(
        self,
        tensors: Sequence[Tensor],
        states: Sequence[Tensor | None],
        mean: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    ) -> Reduction:
        """Estimate the means of tensors over the workers.

        Args:
            tensors: Tensors of this worker, float32 or float64, as the model has them; not to be changed.
            states: State of each tensor that the last call returned for it; None before the first.
            mean: Function that averages each of several tensors over the workers, bitwise the same on all of them, in
                one message: it sends all elements, whose bytes are counted.
        """
        ...


@dataclass(frozen=True)
class BF16:
    """Rounding to bfloat16: 2 bytes per coordinate, of which the mean's are sent once more, 2(K-1)/K × 2 in all.

    Example:
        >>> codec = BF16()
        >>> codec.decode(codec.encode(torch.tensor([1.0, 1.001]), [2]), [2])
        tensor([1., 1.])
    """

    sparse = False

    def encode(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        return values.bfloat16().view(torch.uint8)

    def decode(self, code: Tensor, sizes: Sequence[int]) -> Tensor:
        return code[: 2 * sum(sizes)].view(torch.bfloat16).float()


@dataclass(frozen=True)
class Int8:
    r"""Rounding to 255 levels, symmetric: a byte per coordinate, and a float32 scale s per piece.

    .. math:: q = \mathrm{round}(x / s), \qquad s = \max|x| / 127

    A sync sends 2(K-1)/K bytes per coordinate. Fails where a few huge coordinates of a piece coarsen all others.

    Example:
        >>> codec = Int8()
        >>> codec.decode(codec.encode(torch.tensor([1.0, -0.3, 127.0]), [3]), [3])
        tensor([  1.,   0., 127.])
    """

    sparse = False

    def encode(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        scales, levels = round_to_int8(values, sizes)
        return torch.cat([scales.view(torch.uint8), levels.view(torch.uint8)])

    def decode(self, code: Tensor, sizes: Sequence[int]) -> Tensor:
        scales, levels = code[: 4 * len(sizes)].view(torch.float32), code[4 * len(sizes) :].view(torch.int8)
        return from_int8(scales, levels[: sum(sizes)], sizes)


@dataclass(frozen=True)
class TopK:
    """The largest coordinates by magnitude of every 4,096: 6 bytes for each that is kept.

    A sync sends (K-1) × density × 6 bytes per coordinate. Fails with many workers, each of whom gets all codes, and
    with short runs: what is not sent waits in the error feedback.

    Args:
        density: Share of the coordinates to keep, in (0, 1], rounded up in each chunk; 0.02 is a start.

    Raises:
        ValueError: `density` outside (0, 1].

    Source: arXiv 2508.15706 (SparseLoCo).

    Example:
        >>> codec = TopK(density=0.5)
        >>> codec.decode(codec.encode(torch.tensor([1.0, -3.0, 2.0, 0.5]), [4]), [4])
        tensor([ 0., -3.,  2.,  0.])
    """

    density: float = 0.02
    sparse = True

    def __post_init__(self) -> None:
        if not 0 < as_number(self.density) <= 1:
            raise ValueError(f"density must be in (0, 1], the share of the coordinates to keep, not {self.density!r}.")

    def encode(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        kept, places = select_top_k(values, self.density)
        return torch.cat([t.view(torch.uint8) for t in (*kept, *places)])

    def decode(self, code: Tensor, sizes: Sequence[int]) -> Tensor:
        numel = sum(sizes)
        count = sum(num * keep for num, _, keep in top_k_chunks(numel, self.density))
        kept, places = code[: 4 * count].view(torch.float32), code[4 * count : 6 * count].view(torch.int16).long()
        return from_top_k(kept, places, numel, self.density)


@dataclass(frozen=True)
class PowerSGD:
    r"""Matrices of low rank: one step of subspace iteration per sync, on the mean of the workers' matrices M.

    .. math::
        P = \mathrm{orth}\Big(\tfrac1K \textstyle\sum_i M_i Q\Big), \qquad
        R = \tfrac1K \textstyle\sum_i M_i^\top P, \qquad
        \bar M \approx P R^\top, \qquad
        Q \leftarrow \mathrm{orth}(R)

    P is [n, rank] and Q is [m, rank] for a matrix of n rows and m columns. Q is kept from sync to sync (warm start), so
    that P R^T stays near the best approximation of its rank while the mean changes slowly. A worker adds the part that
    it has not sent, M - P P^T M, to its next values. Tensors of more dimensions are matrices with the first dimension
    as rows. Vectors, and matrices of which two factors would be no fewer numbers, are averaged as they are.

    A sync sends 2(K-1)/K × 4 rank (n + m) bytes per matrix, in two all-reduces. Memory: 4 rank × m bytes per matrix,
    and 4 n m for the part that was not sent. Fails where pseudo-gradients have a high rank, since the rest waits for
    later syncs, and with short runs. Excludes `density`, and outer optimizers that need every worker's pseudo-gradient.

    Args:
        rank: Number of columns of the factors, an integer >= 1; 4 is a start.

    Raises:
        ValueError: `rank` is not an integer >= 1.

    Source: arXiv 1905.13727 (PowerSGD), there for gradients.

    Example:
        >>> codec, matrix = PowerSGD(rank=1), torch.outer(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 3.0, 4.0]))
        >>> (mean,), _, (state,) = codec.reduce([matrix], [None], lambda tensors: tensors)
        >>> (mean - matrix).abs().max() < 1e-5, state.squeeze().abs()
        (tensor(True), tensor([0.0000, 0.6000, 0.8000]))
    """

    rank: int = 4

    def __post_init__(self) -> None:
        rank = as_integer(self.rank, least=1)
        if rank is None:
            raise ValueError(f"rank must be an integer >= 1, the number of columns of the factors, not {self.rank!r}.")
        object.__setattr__(self, "rank", rank)

    def reduce(
        self,
        tensors: Sequence[Tensor],
        states: Sequence[Tensor | None],
        mean: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    ) -> Reduction:
        matrices = {i: t.flatten(1) for i, t in enumerate(tensors) if is_worth_factors(t.shape, self.rank)}
        bases = self._bases(matrices, states)
        first = mean([matrices[i] @ bases[i] if i in matrices else t for i, t in enumerate(tensors)])
        left = {i: orthonormal_basis(first[i]) for i in matrices}
        own = {i: matrix.T @ left[i] for i, matrix in matrices.items()}
        right = dict(zip(own, mean([*own.values()]), strict=True))
        means, sent, new = [*first], [*tensors], [*states]
        for i in matrices:
            means[i], sent[i] = ((left[i] @ r[i].T).view(tensors[i].shape) for r in (right, own))
            basis = orthonormal_basis(right[i])
            new[i] = torch.where(basis.isfinite().all(), basis, bases[i])
        return Reduction(means, sent, new)

    def _bases(self, matrices: Mapping[int, Tensor], states: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """The Q of the last call for each matrix, or random columns that its shape alone determines."""
        bases = {}
        for i, matrix in matrices.items():
            shape, state = (matrix.shape[1], self.rank), states[i]
            if state is None or state.shape != shape:
                state = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            bases[i] = state.to(matrix)
        return bases


def as_codec(compression: str | Codec | LinearCodec | None) -> Codec | LinearCodec | None:
    """Turn `"bf16"` and `"int8"` into codecs; take a codec or None as it is.

    Raises:
        ValueError: An unknown name, or neither a name nor a codec.

    Example:
        >>> as_codec("int8")
        Int8()
    """
    named = {"bf16": BF16(), "int8": Int8()}
    codec = named.get(compression) if isinstance(compression, str) else compression
    if compression is None or (isinstance(codec, LinearCodec) and not isinstance(codec, type)):
        return codec
    missing = [name for name in ("encode", "decode", "sparse") if not hasattr(codec, name)]
    if missing or isinstance(codec, type):
        lacks = f", which lacks {' and '.join(missing)}" if 0 < len(missing) < 3 else ""
        raise ValueError(
            "compression must be None, 'bf16', 'int8', TopK(...), PowerSGD(...), any Codec (an object with encode, "
            f"decode and sparse) or any LinearCodec (an object with reduce), not {compression!r}{lacks}."
        )
    return codec
