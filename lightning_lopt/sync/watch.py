"""Notices writes to tensors of which no copy is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

NUM_SAMPLES = 64  # elements
THOROUGH_EVERY = 100  # calls


class _Seen(NamedTuple):
    """What was seen of a tensor.

    Attributes:
        version: Its version counter, which writes through `.data` do not raise.
        address: Address of its memory.
        samples: Copy of some of its elements.
        checksum: Sum of all of its bits.
    """

    version: int
    address: int
    samples: Tensor
    checksum: int


class Watch:
    """Notices which tensors were written, replaced or resized since they were first seen.

    Version counters, addresses and a few elements are compared in every call. Where one of these differs, and for all
    tensors in each `THOROUGH_EVERY`-th call, a checksum decides.

    Args:
        named: Tensors by name.

    Example:
        >>> weight = torch.zeros(1000)
        >>> watch = Watch({"weight": weight})
        >>> watch.changed({"weight": weight})
        []
        >>> weight.data.add_(1.0)[0].item()
        1.0
        >>> watch.changed({"weight": weight})
        ['weight']
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self._calls = 0
        checksums = _checksums(named.values())
        self._seen = {
            name: _Seen(t._version, t.data_ptr(), _samples(t).clone(), checksum)
            for (name, t), checksum in zip(named.items(), checksums, strict=True)
        }

    def changed(self, named: Mapping[str, Tensor]) -> list[str]:
        """Names of the tensors that are not what was seen first; unknown names are among them.

        Args:
            named: The same tensors as they are now, by name.
        """
        self._calls += 1
        known = {name: t for name, t in named.items() if name in self._seen}
        suspects = known if self._calls % THOROUGH_EVERY == 0 else self._suspects(known)
        checksums = dict(zip(suspects, _checksums(suspects.values()), strict=True))
        for name, tensor in suspects.items():  # a look that found nothing is not to be repeated each time
            seen = self._seen[name]
            if checksums[name] == seen.checksum:
                self._seen[name] = seen._replace(version=tensor._version, address=tensor.data_ptr())
        return [
            n for n in named if n not in known or checksums.get(n, self._seen[n].checksum) != self._seen[n].checksum
        ]

    def _suspects(self, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        suspects, others = {}, {}
        for name, tensor in known.items():
            seen, now = self._seen[name], _samples(tensor)
            same = (tensor._version, tensor.data_ptr(), now.shape) == (seen.version, seen.address, seen.samples.shape)
            (others if same and now.dtype == seen.samples.dtype else suspects)[name] = tensor
        if others and not _equal([_samples(t) for t in others.values()], [self._seen[n].samples for n in others]):
            suspects |= {n: t for n, t in others.items() if not _equal([_samples(t)], [self._seen[n].samples])}
        return suspects


def _samples(tensor: Tensor) -> Tensor:
    """A few bytes of a tensor, spread over all of it: a view where it is contiguous."""
    flat = tensor.detach().contiguous().flatten()
    return flat[:: max(1, len(flat) // NUM_SAMPLES)]


def _equal(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    return torch.equal(_bytes(first), _bytes(second))


def _bytes(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.contiguous().view(torch.uint8) for t in tensors])


def _checksums(tensors: Iterable[Tensor]) -> list[int]:
    sums = [_words(t).sum(dtype=torch.int64) + t.numel() for t in tensors]
    return torch.stack(sums).tolist() if sums else []


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers."""
    flat = tensor.detach().contiguous().flatten()
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.element_size(), torch.int64)
    return flat.view(width)
