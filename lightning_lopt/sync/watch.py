"""Detects changes of tensors without keeping copies of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

NUM_SAMPLES = 64  # elements
THOROUGH_EVERY = 100  # calls
_NUM_BLOCKS = 64


class _Seen(NamedTuple):
    """Traces of a tensor as it was seen.

    Attributes:
        place: Version counter (which writes through `.data` do not raise), address, layout and type.
        shares: Whether the samples are a view of the tensor; they are not if it is a slice with gaps.
        samples: Some of its elements.
        copy: Copy of the samples.
        checksum: Checksum of the whole tensor.
    """

    place: tuple[Any, ...]
    shares: bool
    samples: Tensor
    copy: Tensor
    checksum: int


class Watch:
    """Detects which tensors were written, replaced or resized since they were first seen.

    Every call compares version counters, addresses and a few elements. For tensors in which one of these differs, and
    for all tensors in each `THOROUGH_EVERY`-th call, a checksum decides.

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
        self._seen = dict(zip(named, map(_see, named.values(), checksums(named.values())), strict=True))

    def changed(self, named: Mapping[str, Tensor]) -> list[str]:
        """Names of the tensors that differ from those first seen; names that were not seen before are among them.

        Args:
            named: The same tensors as they are now, by name; others are forgotten.
        """
        self._calls += 1
        self._seen = {name: self._seen[name] for name in named if name in self._seen}
        suspects = [*self._seen] if self._calls % THOROUGH_EVERY == 0 else self._suspects(named)
        found = {name for name in named if name not in self._seen}
        for name, checksum in zip(suspects, checksums(named[name] for name in suspects), strict=True):
            if checksum != self._seen[name].checksum:
                found.add(name)
            else:  # a look that found nothing is not to be repeated each time
                self._seen[name] = _see(named[name], checksum)
        return [name for name in named if name in found]

    def _suspects(self, named: Mapping[str, Tensor]) -> list[str]:
        elsewhere = {name for name, seen in self._seen.items() if not seen.shares or _place(named[name]) != seen.place}
        others = [(name, seen) for name, seen in self._seen.items() if name not in elsewhere]
        if not _equal([seen for _, seen in others]):
            elsewhere.update(name for name, seen in others if not _equal([seen]))
        return [name for name in self._seen if name in elsewhere]


def _see(tensor: Tensor, checksum: int) -> _Seen:
    flat = _bytes(tensor).view(-1, tensor.element_size())
    samples = flat[:: max(1, len(flat) // NUM_SAMPLES)]
    return _Seen(_place(tensor), flat.data_ptr() == tensor.data_ptr(), samples, samples.clone(), checksum)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in the order of its memory, [n]: a view where it is dense."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.detach().permute(order).contiguous().flatten().view(torch.uint8)


def _equal(all_seen: Sequence[_Seen]) -> bool:
    """Whether all samples are as they were."""
    for width in {seen.copy.shape[1] for seen in all_seen}:
        of_width = [seen for seen in all_seen if seen.copy.shape[1] == width]
        if not torch.equal(torch.cat([s.samples for s in of_width]), torch.cat([s.copy for s in of_width])):
            return False
    return True


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """A checksum of each tensor's bits; it depends on the order of its 64 blocks, but not on that within one."""
    sums = [_checksum(_bytes(tensor)) for tensor in tensors]
    return torch.stack(sums).tolist() if sums else []


def _checksum(flat: Tensor) -> Tensor:
    flat = flat.clone() if flat.data_ptr() % 8 else flat
    size = len(flat) // (8 * _NUM_BLOCKS) * 8 * _NUM_BLOCKS
    blocks = flat[:size].view(torch.int64).view(_NUM_BLOCKS, -1).sum(1)  # sums of smaller words are slow
    rest = flat[size:].to(torch.int64)
    weights = torch.arange(1, max(_NUM_BLOCKS, len(rest)) + 1, device=flat.device)
    return (blocks * weights[:_NUM_BLOCKS]).sum() + (rest * weights[: len(rest)]).sum() + len(flat)
