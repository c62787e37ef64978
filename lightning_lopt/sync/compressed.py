"""The mean over the workers of compressed values, by either kind of codec."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_lopt.comm import Communicator
from lightning_lopt.compression import Codec, LinearCodec
from lightning_lopt.functional.balance import even_bounds
from lightning_lopt.sync.flat import FlatBuffer


class CompressedMean(NamedTuple):
    """The result of `compressed_mean` or `linear_mean`.

    Attributes:
        mean: Mean over the workers, [n].
        residual: Values of this worker that the compression lost, [n].
        worker_values: Decoded values of all workers, [K, n], if they were gathered.
        spread: A scalar whose scaled mean over the workers is the mean squared distance of the decoded values from
            their own mean, before that is coded.
    """

    mean: Tensor
    residual: Tensor
    worker_values: Tensor | None
    spread: Tensor


def check_codec(codec: Codec, device: torch.device) -> None:
    """Refuse a codec whose codes have a length that depends on the values: those of other workers would not fit.

    Args:
        codec: Codec to try, on a few values.
        device: Device of the values.

    Raises:
        ValueError: The codes of different values differ in length, or are not bytes, or do not have as many values.
    """
    sizes = [192, 64]
    values = torch.linspace(-1.0, 1.0, sum(sizes), device=device)
    codes = [_encode(codec, values * scale, sizes) for scale in (0.0, 1.0)]
    _decode(codec, codes[1], sizes)
    if len(codes[0]) != len(codes[1]):
        raise ValueError(
            f"encode of {codec!r} returned about {len(codes[0])} bytes for zeros and {len(codes[1])} for other values: "
            "the length of a code must depend on the sizes alone, as workers receive codes of the length of their own. "
            "Keep a fixed number of values, as TopK does, or pad the code to the largest length."
        )


def average_compressed(
    comm: Communicator,
    flat_buffer: FlatBuffer,
    codec: Codec | LinearCodec,
    *,
    gather: bool = False,
    scale: float = 1.0,
) -> None:
    """Replace a buffer's payload by its compressed mean over the workers, and keep what was lost in `residual`.

    Args:
        comm: Collectives among the workers.
        flat_buffer: Buffer to send, without its extras.
        codec: Compression of the payload.
        gather: Whether every worker's payload is wanted, which a `LinearCodec` cannot tell.
        scale: Factor by which the caller scales the mean.
    """
    if isinstance(codec, LinearCodec):
        assert not gather  # check_combination has refused it
        shapes, states = [s.shape for s in flat_buffer.slices], [s.parameter.codec_state for s in flat_buffer.slices]
        result, flat_buffer.codec_states = linear_mean(comm, flat_buffer.payload, shapes, states, codec, scale=scale)
    else:
        result = compressed_mean(comm, flat_buffer.payload, flat_buffer.sizes, codec, gather=gather, scale=scale)
    flat_buffer.payload.copy_(result.mean)
    flat_buffer.residual, flat_buffer.worker_payloads = result.residual, result.worker_values
    flat_buffer.squared_norm.copy_(result.spread)


def linear_mean(
    comm: Communicator,
    values: Tensor,
    shapes: Sequence[Sequence[int]],
    states: Sequence[Tensor | None],
    codec: LinearCodec,
    *,
    scale: float = 1.0,
) -> tuple[CompressedMean, Sequence[Tensor | None]]:
    """Average values over the workers by a `LinearCodec`, and return the error and the codec's new states, too.

    The mean of `values` is the mean that is returned plus the mean of the residuals. Workers that are left out pass
    zeros, and have no residual.

    Args:
        comm: Collectives among the workers.
        values: Values of this worker, [n].
        shapes: Shapes of the tensors that `values` are made of.
        states: State of each tensor.
        codec: Compression of the values.
        scale: Factor by which the caller scales the mean.

    Example:
        >>> from lightning_lopt.compression import PowerSGD
        >>> result, states = linear_mean(Communicator(), torch.ones(12), [(3, 4)], [None], PowerSGD(1))
        >>> round(result.mean.sum().item(), 3), states[0].shape
        (12.0, torch.Size([4, 1]))
    """
    parts = values.split([math.prod(shape) for shape in shapes])
    tensors = [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]
    reduced = codec.reduce(tensors, states, comm.means)
    if any([*map(Tensor.size, ts)] != [*map(Tensor.size, tensors)] for ts in (reduced.means, reduced.sent)):
        raise ValueError(f"reduce of {codec!r} must return means and sent of the shapes of the tensors.")
    mean, sent = (torch.cat([t.flatten() for t in ts]) for ts in (reduced.means, reduced.sent))
    spread = _squares(sent) - scale * _squares(mean)
    return CompressedMean(mean, torch.sub(values, sent, out=sent), None, spread), reduced.states


def compressed_mean(
    comm: Communicator,
    values: Tensor,
    sizes: Sequence[int],
    codec: Codec,
    *,
    gather: bool = False,
    scale: float = 1.0,
) -> CompressedMean:
    r"""Average compressed values over the workers, and return the error of the compression, too.

    Dense codes are sent as an all-reduce does: slices are coded and sent to the worker that owns them, which averages
    them and codes the mean, which all gather. The error of that second code is added K times to the owner's residual,
    so that nothing is lost for good: the mean of `values` is the mean that is returned plus the mean of the residuals.

    Where workers are left out of a mean, they pass zeros, and the caller scales the mean by K / (K - their number). The
    error of the second code is one of the scaled mean. Values that a worker could not send itself keep the weight that
    they would have in its next pseudo-gradient, 1/K.

    Args:
        comm: Collectives among the workers.
        values: Values of this worker, [n].
        sizes: Lengths of the pieces that `values` are made of.
        codec: Compression of the values.
        gather: Whether every worker's values are wanted; all codes then go to all workers, as those of a sparse codec.
        scale: Factor by which the caller scales the mean.

    Example:
        >>> from lightning_lopt.compression import TopK
        >>> compressed_mean(Communicator(), torch.tensor([1.0, 3.0]), [2], TopK(0.5))[:2]
        (tensor([0., 3.]), tensor([1., 0.]))
    """
    num_workers, width = comm.num_workers, values.dtype
    if gather or codec.sparse:
        received = comm.gather(_encode(codec, values, sizes))
        sent = _decode(codec, received[comm.rank], sizes).to(width)
        workers = None
        if gather:
            workers = torch.stack([_decode(codec, code, sizes).to(width) for code in received])
            mean = workers.mean(0)
        else:
            mean = torch.zeros_like(values)
            for code in received:
                mean += _decode(codec, code, sizes)
            mean.div_(num_workers)
        return CompressedMean(mean, values - sent, workers, _squares(sent) - scale * _squares(mean))
    bounds = even_bounds(len(values), num_workers)
    pieces = _cut(sizes, bounds)
    parts = values.split([high - low for low, high in pairwise(bounds)])
    codes = _stack([_encode(codec, part, s) for part, s in zip(parts, pieces, strict=True)])
    sent = torch.cat([_decode(codec, code, s) for code, s in zip(codes, pieces, strict=True)])
    own = pieces[comm.rank]
    mean = torch.zeros(sum(own), device=values.device)
    length = [codes.shape[1]] * num_workers
    for code in comm.all_to_all(codes.flatten(), length, length).view_as(codes):
        mean += _decode(codec, code, own)
    mean /= num_workers
    coded = _encode(codec, mean, own)
    gathered = comm.gather(pad(coded, (0, codes.shape[1] - len(coded))))
    means = [_decode(codec, code, s) for code, s in zip(gathered, pieces, strict=True)]
    residual = values - sent.to(width)
    residual[bounds[comm.rank] : bounds[comm.rank + 1]] += num_workers * scale * (mean - means[comm.rank])
    spread = _squares(sent) - num_workers * scale * _squares(mean)
    return CompressedMean(torch.cat(means).to(width), residual, None, spread)


def _squares(values: Tensor) -> Tensor:
    return values.square().sum()


def _encode(codec: Codec, values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Encode, and pad the code so that several in a row are aligned for any type."""
    code = codec.encode(values.float(), sizes)
    if code.dtype != torch.uint8 or code.dim() != 1:
        raise ValueError(
            f"encode of {codec!r} returned {code.dtype} {list(code.shape)}; it must be torch.uint8 [bytes]."
        )
    return pad(code, (0, -len(code) % 8))


def _decode(codec: Codec, code: Tensor, sizes: Sequence[int]) -> Tensor:
    values = codec.decode(code, sizes)
    if list(values.shape) != [sum(sizes)]:
        raise ValueError(f"decode of {codec!r} returned {list(values.shape)}; it must be [{sum(sizes)}], for {sizes}.")
    return values


def _stack(codes: Sequence[Tensor]) -> Tensor:
    longest = max(len(code) for code in codes)
    return torch.stack([pad(code, (0, longest - len(code))) for code in codes])


def _cut(sizes: Sequence[int], bounds: Sequence[int]) -> list[list[int]]:
    """Cut consecutive pieces of these sizes at the bounds, and return the sizes between consecutive bounds."""
    edges = sorted({0, *accumulate(sizes), *bounds})
    return [[high - low for low, high in pairwise(edges) if start <= low < end] for start, end in pairwise(bounds)]
