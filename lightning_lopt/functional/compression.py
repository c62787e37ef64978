"""Codecs: flat tensors as bytes, and back with a loss.

What is lost of `values` is `values - decode(encode(values))`; the sender adds it to its next values (error feedback).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK = 1 << 12


class Codec(Protocol):
    """A lossy code of flat tensors as bytes.

    Attributes:
        sparse: whether a mean of several decoded tensors is denser than each of them, and does not fit the code.
    """

    @property
    def sparse(self) -> bool: ...

    def encode(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        """Code float32 [n], made of pieces of these sizes, as uint8 [b]; b depends on the sizes alone."""
        ...

    def decode(self, code: Tensor, sizes: Sequence[int]) -> Tensor:
        """What the bytes say: uint8 [>= b] -> float32 [n]."""
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
        scales, codes = values.new_zeros(len(sizes)), values.new_empty(len(values), dtype=torch.int8)
        for i, (piece, code) in enumerate(zip(values.split(list(sizes)), codes.split(list(sizes)), strict=True)):
            if len(piece):
                scales[i] = piece.abs().amax() / 127
                code.copy_((piece / scales[i]).nan_to_num_().round_())
        return torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)])

    def decode(self, code: Tensor, sizes: Sequence[int]) -> Tensor:
        scales, rest = code[: 4 * len(sizes)].view(torch.float32), code[4 * len(sizes) :].view(torch.int8)
        values = rest[: sum(sizes)].float()
        for piece, scale in zip(values.split(list(sizes)), scales, strict=True):
            piece.mul_(scale)
        return values


@dataclass(frozen=True)
class TopK:
    """The largest coordinates by magnitude of every 4,096: 6 bytes for each that is kept.

    Args:
        density: share of the coordinates to keep, in (0, 1], rounded up in each chunk; 0.02 is a start.

    Raises:
        ValueError: `density` outside (0, 1].

    A sync sends (K-1) × density × 6 bytes per coordinate. Fails with many workers, each of whom gets all codes, and
    with short runs: what is not sent waits in the error feedback.

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

    def _blocks(self, numel: int) -> list[tuple[int, int, int]]:
        """Chunks of equal length: how many, of which length, and how many coordinates each keeps."""
        blocks = [(numel // CHUNK, CHUNK), (1, numel % CHUNK)]
        return [(num, length, math.ceil(self.density * length)) for num, length in blocks if num * length]

    def encode(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        kept, indices, start = [], [], 0
        for num, length, keep in self._blocks(len(values)):
            chunks = values[start : start + num * length].view(num, length)
            index = chunks.abs().topk(keep, sorted=False).indices
            kept.append(chunks.gather(1, index).flatten())
            indices.append(index.flatten().to(torch.int16))
            start += num * length
        return torch.cat([t.view(torch.uint8) for t in (*kept, *indices)])

    def decode(self, code: Tensor, sizes: Sequence[int]) -> Tensor:
        values, start, first = code.new_zeros(sum(sizes), dtype=torch.float32), 0, 0
        blocks = self._blocks(len(values))
        total = sum(num * keep for num, _, keep in blocks)
        kept, indices = code[: 4 * total].view(torch.float32), code[4 * total : 6 * total].view(torch.int16).long()
        for num, length, keep in blocks:
            part = slice(first, first + num * keep)
            chunks = values[start : start + num * length].view(num, length)
            chunks.scatter_(1, indices[part].view(num, keep), kept[part].view(num, keep))
            start, first = start + num * length, first + num * keep
        return values


def as_codec(compression: str | Codec | None) -> Codec | None:
    """`"bf16"` and `"int8"` become codecs; a codec or None is taken as it is.

    Raises:
        ValueError: an unknown name, or neither a name nor a codec.

    Example:
        >>> as_codec("int8")
        Int8()
    """
    named = {"bf16": BF16(), "int8": Int8()}
    codec = named.get(compression) if isinstance(compression, str) else compression
    if compression is not None and (isinstance(codec, type) or not hasattr(codec, "encode")):
        raise ValueError(f"compression must be 'bf16', 'int8', TopK(...) or None, not {compression!r}.")
    return codec
