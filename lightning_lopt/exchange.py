"""What a sync sends and what comes back, in the foreground or in flight."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_lopt.agreement import Standing, Told, tell
from lightning_lopt.buffers import maxima
from lightning_lopt.comm import Communicator
from lightning_lopt.compression import Codec
from lightning_lopt.functional.outliers import Norms, outliers
from lightning_lopt.packing import Part, Wire
from lightning_lopt.parameters import wire_dtype
from lightning_lopt.sharding import Shards


class Background:
    """A function that runs in a thread, on a stream of its own where there are streams.

    Args:
        work: called at once.
        device: of the tensors that it works on.

    Example:
        >>> results = []
        >>> Background(lambda: results.append(1), torch.device("cpu")).wait()
        >>> results
        [1]
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)  # a lost worker must not keep this one alive
        self._thread.start()

    def _run(self) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):
                self._work()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Return when it is done; what it raised is raised here."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class Exchange:
    """One agreement and one exchange of wires and buffers among all workers.

    The agreement tells all workers where each of them stands, before anything else is sent. If all wait at the same
    place, nothing is. Those whose pseudo-gradients it shows to be `outliers` send zeros, and a mean is that of the
    others; if all are, nothing is sent.

    Args:
        comm: the collectives.
        equal: integers that must be the same on all workers; None is equal to any.
        wires: to `fill`; afterwards they hold the means over the workers, and what else they are asked for.
        buffers: this worker's values of all buffers.
        changed: which of them it changed.
        states: further floating-point tensors to average.

    Attributes:
        own: where this worker stands, but for the norm.
        settings: of its local optimizer's parameter groups.
        gather: whether every worker's bodies are wanted, not only their mean.
        codec: compresses the bodies of the wires.
        shards: sends each worker its share of the sorted wires only.
        norms_before: of the pseudo-gradients that earlier rounds took the mean of.
        parts: of all wires.
        arrived: the buffers that somebody changed, by position: their mean or maximum.
        states: the means.
        told: what all workers told.
        left_out: the workers that are in no mean.
        bytes_sent: by this worker.
        seconds: from start to end, waiting for other workers included.
    """

    def __init__(
        self,
        comm: Communicator,
        equal: Mapping[str, int | None],
        wires: dict[torch.dtype, Wire],
        buffers: list[Tensor],
        changed: Sequence[bool],
        states: Sequence[Tensor] = (),
    ) -> None:
        self._comm, self._equal, self._changed = comm, equal, changed
        self.wires, self.buffers, self.states = wires, buffers, list(states)
        self.own = Standing(0)
        self.settings: Sequence[float] = ()
        self.gather = False
        self.codec: Codec | None = None
        self.shards: Shards | None = None
        self.norms_before = Norms()
        self.told = Told()
        self.left_out: list[int] = []
        self.arrived: dict[int, Tensor] = {}
        self.bytes_sent = 0
        self.seconds = 0.0
        self._background: Background | None = None

    @property
    def parts(self) -> list[Part]:
        return [part for wire in self.wires.values() for part in wire.parts]

    def pairs(self) -> list[tuple[Part, Tensor]]:
        """Each part with its piece of a wire."""
        return [pair for wire in self.wires.values() for pair in zip(wire.parts, wire.views, strict=True)]

    @property
    def skipped(self) -> bool:
        """Whether all workers were left out, so that nothing arrived."""
        return len(self.left_out) == self._comm.num_workers

    @property
    def kept_norms(self) -> list[float]:
        """The norms of those that were not left out."""
        return [norm for worker, norm in enumerate(self.told.norms) if worker not in self.left_out]

    def fill(self, *, differences: bool) -> None:
        """Pack the parameters as they are now: anchor - y, or y itself."""
        for wire in self.wires.values():
            wire.fill(differences=differences)

    def start(self, device: torch.device, *, background: bool) -> None:
        """Run, or begin to run."""
        if background:
            self._background = Background(lambda: self._run(device), device)
        else:
            self._run(device)

    def wait(self) -> None:
        """Return when the results are here.

        Raises:
            DisagreementError: the workers do not agree on an integer.
        """
        if self._background is not None:
            self._background.wait()
            self._background = None

    def _run(self, device: torch.device) -> None:
        start, bytes_before = time.perf_counter(), self._comm.bytes_sent
        norm = math.sqrt(sum(float(wire.square) for wire in self.wires.values()))
        self.told = tell(self._comm, device, self._equal, replace(self.own, norm=norm), self._changed, self.settings)
        self.left_out = outliers(self.told.norms, self.norms_before)
        if not self.told.met and not self.skipped:
            self._send_all(self.told.changed)
        self.bytes_sent = self._comm.bytes_sent - bytes_before
        self.seconds = time.perf_counter() - start

    def _send_all(self, sent: Sequence[int]) -> None:
        """Replace the wires, these buffers and the states by their means over the workers."""
        floating = [i for i in sent if self.buffers[i].is_floating_point()]
        for i in floating:
            (self.arrived[i],) = self.wires[wire_dtype(self.buffers[i])].board([self.buffers[i]])
        self.states = [self.wires[wire_dtype(state)].board([state])[0] for state in self.states]
        for wire in self.wires.values():
            if len(wire.flat) > 1:
                if self._comm.rank in self.left_out:
                    wire.flat.zero_()
                self._send(wire)
                if self.left_out:
                    self._leave_out(wire)
        integers = [i for i in sent if not self.buffers[i].is_floating_point()]
        self.arrived |= zip(integers, maxima([self.buffers[i] for i in integers], self._comm), strict=True)

    def _send(self, wire: Wire) -> None:
        """Replace a wire by its mean over the workers."""
        if self.codec is not None and len(wire.body):
            mean, wire.residual, wire.workers = compressed_mean(
                self._comm, wire.body, wire.sizes, self.codec, gather=self.gather
            )
            wire.body.copy_(mean)
            self._comm.mean_(wire.flat[len(wire.body) :])
        elif self.shards is not None:
            self.shards.collect(wire, gather=self.gather)
            self._comm.mean_(wire.flat[len(wire.body) :])
        elif self.gather:
            stacked = self._comm.gather(wire.flat)
            torch.mean(stacked, 0, out=wire.flat)
            wire.workers = stacked[:, : len(wire.body)]
        else:
            self._comm.mean_(wire.flat)

    def _leave_out(self, wire: Wire) -> None:
        """Make a mean over all workers one over those that sent something, and give the others its value."""
        kept = [k for k in range(self._comm.num_workers) if k not in self.left_out]
        wire.flat.mul_(self._comm.num_workers / len(kept))
        if wire.workers is not None:
            wire.workers[self.left_out] = wire.workers[kept].mean(0)


def compressed_mean(
    comm: Communicator, values: Tensor, sizes: Sequence[int], codec: Codec, *, gather: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""The mean over the workers of what their codes say, and what they do not say.

    Dense codes travel as an all-reduce does: slices are coded and sent to the worker that owns them, who averages and
    codes the mean, which all gather. What that second code loses is K times added to the owner's residual, so that
    nothing is lost for good: the mean of `values` is the mean that is returned plus the mean of the residuals.

    Args:
        values: [n].
        sizes: the pieces that `values` are made of.
        codec: makes the codes.
        gather: whether every worker's values are wanted; all codes then go to all workers, as those of a sparse codec.

    Returns:
        The mean [n], this worker's residual [n], and all workers' decoded values [K, n] if `gather`.

    Example:
        >>> from lightning_lopt.compression import TopK
        >>> compressed_mean(Communicator(), torch.tensor([1.0, 3.0]), [2], TopK(0.5))[:2]
        (tensor([0., 3.]), tensor([1., 0.]))
    """
    num_workers, width = comm.num_workers, values.dtype
    if gather or codec.sparse:
        received = comm.gather(_encode(codec, values, sizes))
        residual = values - codec.decode(received[comm.rank], sizes).to(width)
        if gather:
            workers = torch.stack([codec.decode(code, sizes).to(width) for code in received])
            return workers.mean(0), residual, workers
        mean = torch.zeros_like(values)
        for code in received:
            mean += codec.decode(code, sizes)
        return mean.div_(num_workers), residual, None
    bounds = [len(values) * k // num_workers for k in range(num_workers + 1)]
    pieces = _cut(sizes, bounds)
    parts = values.split([high - low for low, high in pairwise(bounds)])
    codes = _stack([_encode(codec, part, s) for part, s in zip(parts, pieces, strict=True)])
    sent = torch.cat([codec.decode(code, s) for code, s in zip(codes, pieces, strict=True)])
    own = pieces[comm.rank]
    mean = torch.zeros(sum(own), device=values.device)
    length = [codes.shape[1]] * num_workers
    for code in comm.all_to_all(codes.flatten(), length, length).view_as(codes):
        mean += codec.decode(code, own)
    mean /= num_workers
    coded = _encode(codec, mean, own)
    gathered = comm.gather(pad(coded, (0, codes.shape[1] - len(coded))))
    means = [codec.decode(code, s) for code, s in zip(gathered, pieces, strict=True)]
    residual = values - sent.to(width)
    residual[bounds[comm.rank] : bounds[comm.rank + 1]] += num_workers * (mean - means[comm.rank])
    return torch.cat(means).to(width), residual, None


def _encode(codec: Codec, values: Tensor, sizes: Sequence[int]) -> Tensor:
    """The code, padded so that several of them in a row are aligned for any type."""
    code = codec.encode(values.float(), sizes)
    return pad(code, (0, -len(code) % 8))


def _stack(codes: Sequence[Tensor]) -> Tensor:
    longest = max(len(code) for code in codes)
    return torch.stack([pad(code, (0, longest - len(code))) for code in codes])


def _cut(sizes: Sequence[int], bounds: Sequence[int]) -> list[list[int]]:
    """The sizes of the pieces between consecutive bounds, when consecutive pieces of `sizes` are cut there too."""
    edges = sorted({0, *accumulate(sizes), *bounds})
    return [[high - low for low, high in pairwise(edges) if start <= low < end] for start, end in pairwise(bounds)]
