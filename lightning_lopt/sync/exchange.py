"""What a sync sends and what comes back, in the foreground or in flight."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_lopt.comm import Communicator
from lightning_lopt.functional.compression import Codec
from lightning_lopt.functional.outliers import Norms, outliers
from lightning_lopt.sync.anchors import flat_dtype
from lightning_lopt.sync.background import Background
from lightning_lopt.sync.buffers import maxima
from lightning_lopt.sync.compressed import compressed_mean
from lightning_lopt.sync.flat import FlatBuffer, ParameterSlice
from lightning_lopt.sync.sharding import Shards
from lightning_lopt.sync.status import GroupStatus, WorkerStatus, gather_status


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
        wires: dict[torch.dtype, FlatBuffer],
        buffers: list[Tensor],
        changed: Sequence[bool],
        states: Sequence[Tensor] = (),
    ) -> None:
        self._comm, self._equal, self._changed = comm, equal, changed
        self.wires, self.buffers, self.states = wires, buffers, list(states)
        self.own = WorkerStatus(0)
        self.settings: Sequence[float] = ()
        self.gather = False
        self.codec: Codec | None = None
        self.shards: Shards | None = None
        self.norms_before = Norms()
        self.told = GroupStatus()
        self.left_out: list[int] = []
        self.arrived: dict[int, Tensor] = {}
        self.bytes_sent = 0
        self.seconds = 0.0
        self._background: Background | None = None

    @property
    def parts(self) -> list[ParameterSlice]:
        return [part for wire in self.wires.values() for part in wire.parts]

    def pairs(self) -> list[tuple[ParameterSlice, Tensor]]:
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
        self.told = gather_status(
            self._comm, device, self._equal, replace(self.own, norm=norm), self._changed, self.settings
        )
        self.left_out = outliers(self.told.norms, self.norms_before)
        if not self.told.met and not self.skipped:
            self._send_all(self.told.changed)
        self.bytes_sent = self._comm.bytes_sent - bytes_before
        self.seconds = time.perf_counter() - start

    def _send_all(self, sent: Sequence[int]) -> None:
        """Replace the wires, these buffers and the states by their means over the workers."""
        floating = [i for i in sent if self.buffers[i].is_floating_point()]
        for i in floating:
            (self.arrived[i],) = self.wires[flat_dtype(self.buffers[i])].board([self.buffers[i]])
        self.states = [self.wires[flat_dtype(state)].board([state])[0] for state in self.states]
        for wire in self.wires.values():
            if len(wire.flat) > 1:
                if self._comm.rank in self.left_out:
                    wire.flat.zero_()
                self._send(wire)
                if self.left_out:
                    self._leave_out(wire)
        integers = [i for i in sent if not self.buffers[i].is_floating_point()]
        self.arrived |= zip(integers, maxima([self.buffers[i] for i in integers], self._comm), strict=True)

    def _send(self, wire: FlatBuffer) -> None:
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

    def _leave_out(self, wire: FlatBuffer) -> None:
        """Make a mean over all workers one over those that sent something, and give the others its value."""
        kept = [k for k in range(self._comm.num_workers) if k not in self.left_out]
        wire.flat.mul_(self._comm.num_workers / len(kept))
        if wire.workers is not None:
            wire.workers[self.left_out] = wire.workers[kept].mean(0)
