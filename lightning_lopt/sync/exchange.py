"""One exchange among the workers, from its launch until what arrived is settled."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.comm import CommonInteger, Communicator, jointly
from lightning_lopt.compression import Codec, LinearCodec
from lightning_lopt.functional.outliers import OutlierFilter
from lightning_lopt.functional.precision import state_dtype
from lightning_lopt.sync.background import Background
from lightning_lopt.sync.compressed import average_compressed
from lightning_lopt.sync.flat import FlatBuffer, ParameterSlice, pack
from lightning_lopt.sync.rules import as_real, combine
from lightning_lopt.sync.sharding import Shards
from lightning_lopt.sync.status import UNSTEPPED, GroupStatus, LocalSettings, WorkerStatus, gather_status
from lightning_lopt.sync.unstepped import Snapshot


@dataclass(frozen=True)
class Transport:
    """The way in which the payload of an exchange is sent; by default as a plain mean.

    Attributes:
        codec: Compression of the payload.
        shards: Division of the tensors among the workers: each then gets the means of its own only.
        gather: Whether every worker's payload is wanted, not only the mean.
    """

    codec: Codec | LinearCodec | None = None
    shards: Shards | None = None
    gather: bool = False


class Exchange:
    """One status message and one exchange of parameters and other tensors among all workers.

    The status tells all workers where each of them is, before anything else is sent. If all wait at the same point,
    nothing else is. Workers whose pseudo-gradients it shows to be outliers send zeros, and a mean is that of the
    others; if all are, nothing is sent.

    Its life: `launch`, then `wait` until everything has arrived; the owner then settles it, by an outer step and a
    merge. All workers must make and launch an exchange together.

    Args:
        comm: Collectives among the workers.
        device: Device on which the process group communicates.
        slices: Slices of the parameters to send.
        unstepped: This worker's tensors that no optimizer steps.
        optimizer_states: Floating-point states of the local optimizer to average.
        status: Status of this worker; the norm is filled in.
        equal: Values of some of the `COMMON` integers of `sync/status.py`, which must be the same on all workers.
        settings: Settings of this worker's local optimizer.
        round_idx: Index of the round that ends.
        everything: Whether the weights shall be the same on all workers afterwards.
        differences: Whether to send anchor - y, the pseudo-gradient, rather than y.
        transport: Way in which the payload is sent.
        outlier_filter: Choice of the workers to leave out, which remembers earlier rounds; it is not changed.

    Attributes:
        round_idx: Index of the round that ends.
        everything: Whether the weights shall be the same on all workers afterwards.
        flat_buffers: The flat buffers by type; after the exchange they hold means.
        unstepped: This worker's tensors that no optimizer steps, at the launch.
        launched: A copy of y for each slice; None if nothing changes between launch and arrival.
        optimizer_states: States of the local optimizer to average.
        mean_states: Their means.
        arrived: Global values of those that some worker changed, by name.
        status: Status of all workers.
        left_out: Workers that are in no mean.
        bytes_sent: Bytes that this worker sent.
        launch_seconds: Seconds that the launch took.
        transfer_seconds: Seconds from start to end, waiting for other workers included.
    """

    def __init__(
        self,
        *,
        comm: Communicator,
        device: torch.device,
        slices: Sequence[ParameterSlice],
        unstepped: Snapshot,
        optimizer_states: Sequence[Tensor] = (),
        status: WorkerStatus,
        equal: Mapping[CommonInteger, int | None],
        settings: LocalSettings | None = None,
        round_idx: int = 0,
        everything: bool = False,
        differences: bool = False,
        transport: Transport | None = None,
        outlier_filter: OutlierFilter | None = None,
    ) -> None:
        self._comm, self._device = comm, device
        self._own_status, self._equal, self._settings = status, equal, settings or LocalSettings()
        self._differences, self._transport = differences, transport or Transport()
        self._outlier_filter = outlier_filter or OutlierFilter()
        self.round_idx, self.everything = round_idx, everything
        self.unstepped = unstepped
        self.optimizer_states = list(optimizer_states)
        self.mean_states: list[Tensor] = []
        averaged = [as_real(item.value) for item in unstepped.items.values() if item.averaged]
        self.flat_buffers = pack(slices, [*averaged, *optimizer_states])
        self.launched: list[Tensor] | None = None
        self.arrived: dict[str, Tensor] = {}
        self.status = GroupStatus()
        self.left_out: list[int] = []
        self.bytes_sent = 0
        self.launch_seconds = self.transfer_seconds = 0.0
        self._background: Background | None = None

    @property
    def slices(self) -> list[ParameterSlice]:
        """The slices of all flat buffers."""
        return [s for flat_buffer in self.flat_buffers.values() for s in flat_buffer.slices]

    def means(self) -> list[tuple[ParameterSlice, Tensor]]:
        """Each slice with its part of a flat buffer."""
        flat_buffers = self.flat_buffers.values()
        return [pair for f in flat_buffers for pair in zip(f.slices, f.views, strict=True)]

    @property
    def local_steps(self) -> int:
        """Local steps that this worker took in the round."""
        return self._own_status.local_steps

    @property
    def skipped(self) -> bool:
        """Whether all workers were left out, so that nothing arrived."""
        return len(self.left_out) == self._comm.num_workers

    @property
    def _scale(self) -> float:
        """Factor from a mean over all workers, of which some send zeros, to one over those that are not left out."""
        return self._comm.num_workers / (self._comm.num_workers - len(self.left_out))

    @property
    def kept_norms(self) -> list[float]:
        """Norms of the pseudo-gradients that were not left out."""
        return [norm for worker, norm in enumerate(self.status.norms) if worker not in self.left_out]

    def squared_norm(self) -> float:
        """Squared norm of the pseudo-gradient: this worker's before the exchange, afterwards the mean of all."""
        return sum(float(flat_buffer.squared_norm) for flat_buffer in self.flat_buffers.values())

    def squared_drift(self, squared_norm: float) -> float:
        """Mean squared distance of the pseudo-gradients that were sent, as decoded, from their mean.

        Args:
            squared_norm: Squared norm of the averaged pseudo-gradient.
        """
        compressed = any(flat_buffer.residual is not None for flat_buffer in self.flat_buffers.values())
        return max(self._inside_total(self.squared_norm()) - (0.0 if compressed else squared_norm), 0.0)

    def _inside_total(self, value: float) -> float:
        """Sum over the parts that the ranks of this worker hold."""
        return float(self._comm.inside_total(torch.tensor(value, dtype=torch.float64, device=self._device)))

    def launch(self, *, background: bool) -> None:
        """Pack the parameters as they are now, and send them.

        Args:
            background: Whether to return at once; `wait` must then be called before the results are used.

        Raises:
            DisagreementError: The workers do not agree on an integer; in the background, `wait` raises it.
        """
        for flat_buffer in self.flat_buffers.values():
            flat_buffer.fill(differences=self._differences)
        if background:
            self.launched = [s.read(s.parameter.param).clone() for s in self.slices]
            self._background = Background(self._run, self._device)
        else:
            self._run()

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error, in the background."""
        return self._background is not None and self._background.failed

    def wait(self) -> None:
        """Return when the results are here.

        Raises:
            DisagreementError: The workers do not agree on an integer.
        """
        if self._background is not None:
            self._background.wait()
            self._background = None

    def _run(self) -> None:
        start, bytes_before = time.perf_counter(), self._comm.bytes_sent
        own = replace(self._own_status, norm=math.sqrt(self._inside_total(self.squared_norm())))
        equal, changed = {**self._equal, UNSTEPPED: self.unstepped.described}, [*self.unstepped.changed.values()]
        self.status = gather_status(
            self._comm, self._device, equal, own, changed, self._settings, self.unstepped.num_pieces
        )
        self.left_out = self._outlier_filter.outliers(self.status.norms)
        if not self.status.all_wait and not self.skipped:
            self._send_all()
        self.bytes_sent = self._comm.bytes_sent - bytes_before
        self.transfer_seconds = time.perf_counter() - start

    def _send_all(self) -> None:
        """Replace the flat buffers and the states by their means over the workers; combine the unstepped tensors."""
        sent = self.unstepped.sent(self.status.changed)
        names = [name for name, item in sent.items() if item.averaged]
        averaged = dict(zip(names, self._append([as_real(sent[name].value) for name in names]), strict=True))
        self.mean_states = self._append(self.optimizer_states)
        for flat_buffer in self.flat_buffers.values():
            if len(flat_buffer.flat) > 1:
                if self._comm.rank in self.left_out:
                    flat_buffer.flat.zero_()
                self._send(flat_buffer)
                if self.left_out:
                    self._leave_out(flat_buffer)
        others = [name for name in sent if name not in averaged]
        combined = combine([sent[name] for name in others], self._comm, self.left_out)
        self._average_inside([mean for name, mean in averaged.items() if not sent[name].is_piece])
        self.arrived = {name: sent[name].settled(mean) for name, mean in averaged.items()}
        self.arrived |= zip(others, combined, strict=True)

    def _average_inside(self, means: Sequence[Tensor]) -> None:
        """Average over the ranks of this worker, which have each seen other data; nothing else keeps them equal."""
        if self._comm.inside_size > 1 and means:
            totals = jointly([mean.double() for mean in means], lambda flat: flat.copy_(self._comm.inside_total(flat)))
            for mean, total in zip(means, totals, strict=True):
                mean.copy_(total / self._comm.inside_size)

    def _append(self, extras: Sequence[Tensor]) -> list[Tensor]:
        views: dict[int, Tensor] = {}
        for dtype, flat_buffer in self.flat_buffers.items():
            of_type = [i for i, extra in enumerate(extras) if state_dtype(extra) == dtype]
            views |= zip(of_type, flat_buffer.append([extras[i] for i in of_type]), strict=True)
        return [views[i] for i in range(len(extras))]

    def _send(self, flat_buffer: FlatBuffer) -> None:
        """Replace a flat buffer by its mean over the workers."""
        comm, transport, payload = self._comm, self._transport, flat_buffer.payload
        extras = flat_buffer.flat[len(payload) :]
        if transport.codec is not None and len(payload):
            average_compressed(comm, flat_buffer, transport.codec, gather=transport.gather, scale=self._scale)
            comm.mean_(extras)
        elif transport.shards is not None:
            transport.shards.reduce_scatter(flat_buffer, gather=transport.gather)
            comm.mean_(extras)
        elif transport.gather:
            stacked = comm.gather(flat_buffer.flat)
            torch.mean(stacked, 0, out=flat_buffer.flat)
            flat_buffer.worker_payloads = stacked[:, : len(payload)]
        else:
            comm.mean_(flat_buffer.flat)

    def _leave_out(self, flat_buffer: FlatBuffer) -> None:
        """Make a mean over all workers one over those that sent something, and give the others its value."""
        kept = [k for k in range(self._comm.num_workers) if k not in self.left_out]
        flat_buffer.flat.mul_(self._scale)
        if flat_buffer.worker_payloads is not None:
            flat_buffer.worker_payloads[self.left_out] = flat_buffer.worker_payloads[kept].mean(0)

    def keep_compression_state(self) -> None:
        """Keep the values of each slice that compression lost, none if it was sent as it is, and the codec's states."""
        for flat_buffer in self.flat_buffers.values():
            lost = flat_buffer.residual
            lost = torch.zeros_like(flat_buffer.payload) if lost is None else lost
            for s, values in zip(flat_buffer.slices, flat_buffer.split(lost), strict=True):
                assert s.parameter.residual is not None
                s.write(s.parameter.residual, values)
            for s, codec_state in zip(flat_buffer.slices, flat_buffer.codec_states or (), strict=False):
                s.parameter.codec_state = codec_state

    # -- checkpoints of an exchange in flight ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that arrived and is the same on all workers; waits for it."""
        self.wait()
        return {
            "round_idx": self.round_idx,
            "local_steps": self.local_steps,
            "flat_buffers": None if self._transport.shards else self._flat_states(),
            "arrived": {name: value.clone() for name, value in self.arrived.items()},
            "status": self.status.state_dict(),
            "left_out": self.left_out,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`, in an exchange of the same slices."""
        self._load_flat_states(state["flat_buffers"])
        self.status, self.left_out = GroupStatus.from_state_dict(state["status"]), state["left_out"]
        self.arrived = {name: value.to(self._device) for name, value in state["arrived"].items()}

    def local_state(self) -> dict[str, Any]:
        """Everything that differs between the workers; waits for it."""
        self.wait()
        return {
            "flat_buffers": self._flat_states() if self._transport.shards else None,
            "launched": self.launched,
            "unstepped": {name: item.value for name, item in self.unstepped.items.items()},
            "residuals": [flat_buffer.residual for flat_buffer in self.flat_buffers.values()],
        }

    def load_local_state(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `local_state`."""
        self._load_flat_states(state["flat_buffers"])
        launched = zip(state["launched"], self.slices, strict=True)
        self.launched = [y.to(s.parameter.param.device) for y, s in launched]
        self.unstepped = self.unstepped.with_values(state["unstepped"], self._device)
        residuals = {residual.dtype: residual for residual in state["residuals"] if residual is not None}
        for dtype, flat_buffer in self.flat_buffers.items():
            flat_buffer.residual = residuals[dtype].to(flat_buffer.payload.device) if dtype in residuals else None

    def _flat_states(self) -> list[dict[str, Any]]:
        return [flat_buffer.state_dict() for flat_buffer in self.flat_buffers.values()]

    def _load_flat_states(self, states: Sequence[Mapping[str, Any]] | None) -> None:
        if states is not None:
            of_type = {state["payload"].dtype: state for state in states}
            for dtype, flat_buffer in self.flat_buffers.items():
                if dtype in of_type:
                    flat_buffer.load_state_dict(of_type[dtype])
                else:  # of extras alone, which are in `arrived`
                    flat_buffer.squared_norm.zero_()
