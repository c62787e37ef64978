"""Codecs: flat tensors as bytes, and back with a loss.

The loss of `values` is `values - decode(encode(values))`; the sender adds it to its next values (error feedback).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_lopt.functional.compression import from_int8, from_top_k, round_to_int8, select_top_k, top_k_chunks


class Codec(Protocol):
    """A lossy code of flat tensors as bytes.

    The pieces of a flat tensor are tensors of the model, or the parts of them that are left where the flat tensor was
    cut into one share per worker; some may have size 0. Values that are not finite must not become finite ones.

    Attributes:
        sparse: Whether all codes are sent to all workers, for a mean of several decoded tensors is denser than each of
            them and does not fit the code. Otherwise each worker averages its share and codes the mean, as an
            all-reduce does.
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
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], the share of the coordinates to keep, not {self.density!r}.")

    def encode(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        kept, places = select_top_k(values, self.density)
        return torch.cat([t.view(torch.uint8) for t in (*kept, *places)])

    def decode(self, code: Tensor, sizes: Sequence[int]) -> Tensor:
        numel = sum(sizes)
        count = sum(num * keep for num, _, keep in top_k_chunks(numel, self.density))
        kept, places = code[: 4 * count].view(torch.float32), code[4 * count : 6 * count].view(torch.int16).long()
        return from_top_k(kept, places, numel, self.density)


def as_codec(compression: str | Codec | None) -> Codec | None:
    """Turn `"bf16"` and `"int8"` into codecs; take a codec or None as it is.

    Raises:
        ValueError: An unknown name, or neither a name nor a codec.

    Example:
        >>> as_codec("int8")
        Int8()
    """
    named = {"bf16": BF16(), "int8": Int8()}
    codec = named.get(compression) if isinstance(compression, str) else compression
    if compression is not None and (isinstance(codec, type) or not hasattr(codec, "encode")):
        raise ValueError(f"compression must be 'bf16', 'int8', TopK(...), any Codec or None, not {compression!r}.")
    return codec
