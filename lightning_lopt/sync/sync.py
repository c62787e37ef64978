"""One synchronisation: the merge rule that every method here shares.

    g = anchor - mean_i y_i          averaged pseudo-gradient, a gradient's sign; on the coordinates that are sent
    anchor <- Outer(anchor, g)       plain averaging: anchor <- mean_i y_i, computed as such
    x_i = anchor + (z_i - y_i)       the merge (or overwrite, or blend); y_i at the launch, z_i at the finish

The anchor (the global parameters) and the pseudo-gradient are float32 (float64 for float64 parameters).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lopt.comm import Communicator
from lightning_lopt.functional.merge import merge
from lightning_lopt.functional.outliers import Norms
from lightning_lopt.sync.anchors import AnchoredParameters, size
from lightning_lopt.sync.buffers import Buffers
from lightning_lopt.sync.cargo import Cargo
from lightning_lopt.sync.exchange import Exchange
from lightning_lopt.sync.flat import ParameterSlice, pack
from lightning_lopt.sync.flight import Flight
from lightning_lopt.sync.options import SyncOptions
from lightning_lopt.sync.outer_step import OuterFactory, OuterStep, average, fingerprint, local_settings
from lightning_lopt.sync.outliers import Guard
from lightning_lopt.sync.report import RoundReport
from lightning_lopt.sync.sharding import Shards
from lightning_lopt.sync.status import EQUAL, SyncPoint, WorkerStatus, gather_status
from lightning_lopt.sync.swap import Swap

EvalWeights = Literal["anchor", "mean"]


class Sync:
    """Anchor, outer optimizer and buffers of one worker, and the exchange with the others.

    Creating one checks that all workers have the same model and gives them the parameters and buffers of rank 0.

    Args:
        model: its buffers travel too: floating-point ones that some worker changed are averaged, of integers the
            maximum is taken.
        optimizer: the local optimizer, whose parameters are synchronised.
        outer_optimizer: makes a `torch.optim.Optimizer` from parameter groups of anchors; None averages.
        comm: the collectives.
        options: what is sent, and how it lands.

    Attributes:
        device: of the parameters.
        swap: what evaluation sees instead of this worker's weights.
        told: where all workers stood at the last sync, or when all waited at the same place.
        common: whether all workers held the same weights after the last sync.

    Raises:
        ValueError: nothing to train, parameters that are not dense and real, or an outer optimizer that belongs to
            another number of workers.
        DisagreementError: the workers' models differ.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        outer_optimizer: OuterFactory | None,
        comm: Communicator,
        options: SyncOptions,
    ) -> None:
        self._parameters = AnchoredParameters(optimizer)
        self._guard = Guard(comm, self._parameters)
        self._optimizer = optimizer
        self._comm = comm
        self._options, self._codec = options, options.codec
        self.device = next(t.param.device for t in self._parameters)
        self.swap = Swap()
        self._flight: Flight | None = None
        self.common = True
        self.told: list[WorkerStatus] = []
        named = [*model.named_parameters(), *model.named_buffers()]
        comm.check_same_shapes(named, self.device)
        comm.broadcast_([tensor for _, tensor in named])
        for t in self._parameters:
            if t.param.requires_grad:
                t.adopt(t.param)
        self._buffers = Buffers(model)
        self._shards = Shards(comm) if options.sharded else None
        self._step = None
        if outer_optimizer is not None:
            self._step = OuterStep(outer_optimizer, self._parameters.groups, comm, self._shards)
        self._cargo = Cargo(self._parameters, options, self._step, self._shards)
        comm.agree(
            self.device,
            {
                "the outer optimizer (as a digest)": fingerprint(self.outer),
                "how parameters travel (as a digest)": options.fingerprint,
            },
        )

    @property
    def outer(self) -> Optimizer | None:
        """The outer optimizer, None for averaging."""
        return None if self._step is None else self._step.optimizer

    @torch.no_grad()
    def launch(self, round_idx: int, own: WorkerStatus, *, everything: bool = False, same_steps: bool = True) -> None:
        """Send this worker's present parameters.

        A sync that is still in flight is given up: wait for it, and use nothing of it. Where all workers wait at the
        same place, nothing is sent, and there is nothing to finish.

        Args:
            round_idx: index of the round that ends, the same on all workers.
            own: where this worker stands. From a `"launch"` this returns at once; otherwise `finish` must follow before
                the next local step.
            everything: send everything, uncompressed, and make the weights the same on all workers.
            same_steps: whether those who do not wait must have taken as many local steps.
        """
        start = time.perf_counter()
        self.wait()
        tracked = self._cargo.in_training()
        parts = self._cargo.parts(tracked, round_idx, everything=everything)
        averages_states = self._options.local_state == "average"
        states = self._parameters.local_states([part.tracked for part in parts]) if averages_states else []
        values = [
            round_idx,
            own.local_steps if same_steps and own.needs_sync else None,
            everything,
            size(tracked),
            sum(part.checksum for part in parts),
            sum(state.numel() for state in states),
            self._guard.checksum(),
        ]
        in_flight = own.place == "launch"
        equal = dict(zip(EQUAL, values, strict=True))
        exchange = self._exchange(parts, equal, states)
        exchange.fill(differences=self._step is not None or self._codec is not None)
        exchange.own, exchange.settings = own, self._settings()
        exchange.shards = self._shards
        exchange.gather = self._step is not None and self._step.gathers
        if not everything and all(t.known for t in tracked):
            exchange.codec = self._codec
        launched = [part.of(part.tracked.param).clone() for part in exchange.parts] if in_flight else None
        self._flight = Flight(round_idx, own.local_steps, everything, exchange, states, launched)
        exchange.start(self.device, background=in_flight)
        self._flight.launch_seconds = time.perf_counter() - start
        if not in_flight and exchange.told.met:
            self.told, self._flight = exchange.told.workers, None

    def check(self, place: SyncPoint) -> None:
        """Make sure that all workers are at the same place; leaves alone what is in flight.

        Raises:
            DisagreementError: they are not.
        """
        self.wait()
        equal = dict.fromkeys(EQUAL)
        gather_status(
            self._comm, self.device, equal, WorkerStatus(0, place), [False] * self._buffers.number, self._settings()
        )

    def _settings(self) -> list[float]:
        """What the outer optimizer must know of the local one's groups."""
        power = math.inf if self._options.local_state == "reset" else self._options.picks.num_turns
        return [] if self._step is None else local_settings(self._optimizer.param_groups, power)

    def _exchange(
        self, parts: list[ParameterSlice], equal: Mapping[str, int | None], states: Sequence[Tensor] = ()
    ) -> Exchange:
        """Pack these parts, and all buffers."""
        changed = self._buffers.changed()
        buffers = self._buffers.snapshot(changed)
        wires = pack(parts, [*buffers, *states])
        exchange = Exchange(self._comm, equal, wires, buffers, changed, states)
        exchange.norms_before = self._guard.norms
        return exchange

    def wait(self) -> None:
        """Return when nothing is on the wire; what was launched can still be finished.

        Raises:
            DisagreementError: the workers do not agree on the round, its steps, or the parameters in training.
        """
        if self._flight is not None:
            self._flight.exchange.wait()

    @property
    def in_flight(self) -> bool:
        """Whether a sync was launched and not finished."""
        return self._flight is not None

    @torch.no_grad()
    def finish(self) -> RoundReport:
        """Step the anchors by what arrived, and merge.

        Raises:
            DisagreementError: the workers do not agree on the round, its steps, or the parameters in training.
        """
        start = time.perf_counter()
        self.wait()
        received, bytes_before = time.perf_counter(), self._comm.bytes_sent
        flight, self._flight = self._flight, None
        assert flight is not None
        exchange = flight.exchange
        self.told = exchange.told.workers
        squares, fell_back = ((0.0, 0.0), False) if exchange.skipped else self._land(flight)
        self._guard.see(exchange, flight.round_idx)
        if self._comm.rank in exchange.left_out:
            self._come_back(flight)
        leaves_common = self._options.leaves_common_weights and not flight.leaves_drift
        self.common = flight.everything or exchange.skipped or leaves_common
        return flight.report(squares, (start, received), self._comm.bytes_sent - bytes_before, fell_back=fell_back)

    def _land(self, flight: Flight) -> tuple[tuple[float, float], bool]:
        """Take up what arrived; return the workers' mean squared norm, that of their mean, and `fell_back`."""
        wires = flight.exchange.wires.values()
        local_square = sum(float(wire.square) for wire in wires)
        rule = "overwrite" if flight.everything else self._options.merge
        if self._step is None:
            square, fell_back = average(wires), False
            if self._shards is not None:
                (square,) = self._comm.total([square], self.device)
        else:
            told = flight.exchange.told
            keys = {"round_idx": flight.round_idx, "local_steps": max(w.local_steps for w in told.workers)}
            scratch = flight.launched is None and isinstance(rule, str)
            rates, momenta = told.settings[: len(told.settings) // 2], told.settings[len(told.settings) // 2 :]
            square, fell_back = self._step.step(wires, keys, rates, momenta, scratch=scratch)
        if self._shards is not None:
            for wire in wires:
                self._shards.spread(wire)
        for i, part in enumerate(flight.exchange.parts):
            t = part.tracked
            y = None if flight.launched is None else flight.launched[i]
            part.put(t.param, merge(part.of(t.anchor), y, part.of(t.param), rule))
            t.known = True
        self._settle(flight)
        return (local_square, square), fell_back

    def _come_back(self, flight: Flight) -> None:
        """Forget what made this worker diverge, except where its optimizer now has the others' state."""
        self.restore_anchor()
        averaged = bool(flight.states) and not flight.exchange.skipped
        kept = {part.tracked for part in flight.exchange.parts if averaged}
        self._parameters.reset_local_states([t for t in self._parameters if t not in kept])

    def _settle(self, flight: Flight) -> None:
        """Take up what compression lost, the local optimizer's states, and the buffers."""
        if self._codec is not None:
            flight.keep_lost()
        for state, mean in zip(flight.states, flight.exchange.states, strict=True):
            state.copy_(mean)
        if self._options.local_state == "reset":
            self._parameters.reset_local_states([part.tracked for part in flight.exchange.parts])
        self._buffers.land(flight.exchange.buffers, flight.exchange.arrived)

    @torch.no_grad()
    def swap_in(self, weights: EvalWeights) -> None:
        """Put the global weights and their buffers into the model, until `swap.undo`.

        Args:
            weights: `"anchor"`, the last synced ones, needs no communication; `"mean"` averages the workers as they
                are now, and all of them must call it.
        """
        if self.swap.active:
            return
        tracked, exchange = [t for t in self._parameters if t.known], None
        if weights == "mean":
            self.wait()
            exchange = self._exchange([ParameterSlice(t) for t in tracked], {"parameters in training": size(tracked)})
            exchange.fill(differences=False)
            exchange.start(self.device, background=False)
        if exchange is None or exchange.skipped:
            new = [(t.param, t.anchor.clone()) for t in tracked]
            new += [(buffer, synced.clone()) for buffer, synced in self._buffers.pairs()]
        else:
            new = [(part.tracked.param, mean) for part, mean in exchange.pairs()]
            new += self._buffers.named(exchange.arrived)
        self.swap.put(new)

    @torch.no_grad()
    def restore_anchor(self) -> None:
        """Go back to the last synced weights and buffers, without communication; forget what is in flight."""
        self._flight = None
        self._parameters.restore_anchors()
        self._buffers.restore()
        self.common = True

    def state_dict(self, *, alone: bool = False) -> dict[str, Any]:
        """Anchors, the buffers of the last sync and the state of the outer optimizer; the same on all workers.

        Args:
            alone: do not talk to the other workers, and leave out what is in flight and the outer state of tensors
                that others step. Otherwise all must call it, and rank 0 gets everything.
        """
        if not alone:
            self.wait()
        return {
            "anchors": self._parameters.anchor_state(),
            "buffers": self._buffers.synced_state(),
            "outer": None if self._step is None else self._step.state_dict(alone=alone),
            "outer_kind": type(self.outer).__name__,
            "norms": self._guard.norms._asdict(),
            "common": self.common,
            "flight": self._flight.state_dict() if not alone and self._flight is not None else None,
        }

    def local_state(self) -> dict[str, Any]:
        """What differs between the workers: parameters, buffers, what compression lost, and y of a sync in flight."""
        return {
            **self._parameters.own_state(),
            "buffers": self._buffers.own_state(),
            "flight": None if self._flight is None else self._flight.own_state(),
        }

    @torch.no_grad()
    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what `local_state` returned, after `load_state_dict`."""
        self._parameters.load_own_state(state)
        self._buffers.load_own_state(state["buffers"])
        if self._flight is not None:
            self._flight.load_own_state(state["flight"])

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, for the same parameters in the same groups.

        Raises:
            ValueError: another number of parameters, or another kind of outer optimizer (one or none).
        """
        tracked, count, kind = self._cargo.in_training(), len(list(self._parameters)), type(self.outer).__name__
        if count != len(state["anchors"]) or kind != state["outer_kind"]:
            raise ValueError(
                f"This checkpoint holds {len(state['anchors'])} parameters and the outer optimizer "
                f"{state['outer_kind']}; here there are {count} parameters and {kind}. Resume with the "
                "strategy that wrote it, or start from its weights alone."
            )
        self._parameters.load_anchor_state(state["anchors"])
        self._buffers.load_synced_state(state["buffers"])
        if self._step is not None:
            self._step.load_state_dict(state["outer"])
        self._guard.norms, self.common, flight = Norms(**state["norms"]), state["common"], state["flight"]
        self._flight = None
        if flight is not None:
            exchange = self._exchange(self._cargo.parts(tracked, flight["round_idx"], everything=False), {})
            exchange.shards = self._shards
            self._flight = Flight(flight["round_idx"], flight["local_steps"], False, exchange, [], None)
            self._flight.load_state_dict(flight)
