"""A sync between its launch and its finish."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.sync.exchange import Exchange
from lightning_lopt.sync.report import RoundReport
from lightning_lopt.sync.status import GroupStatus


@dataclass
class Flight:
    """What must be known at the finish.

    Attributes:
        round_idx: index of the round that ends.
        local_steps: H of that round.
        everything: whether the weights shall be the same on all workers afterwards.
        exchange: what travels.
        states: the local optimizer's states that travel with it.
        launched: y of each part, a copy; None if nothing moves meanwhile.
        launch_seconds: that the launch took.
    """

    round_idx: int
    local_steps: int
    everything: bool
    exchange: Exchange
    states: list[Tensor]
    launched: list[Tensor] | None
    launch_seconds: float = 0.0

    @property
    def leaves_drift(self) -> bool:
        """Whether some worker took steps while it was in flight."""
        return any(worker.place == "launch" for worker in self.exchange.told.workers)

    def report(
        self, squares: tuple[float, float], times: tuple[float, float], num_bytes: int, *, fell_back: bool
    ) -> RoundReport:
        """What it did and cost.

        Args:
            squares: the workers' mean squared norm, and that of their mean.
            times: when the finish began, and when everything was here; it is done now.
            num_bytes: that were sent after the exchange.
            fell_back: as in `RoundReport`.
        """
        exchange, done = self.exchange, time.perf_counter()
        start, received = times
        local_square, square = squares
        return RoundReport(
            round_idx=self.round_idx,
            local_steps=self.local_steps,
            pseudo_grad_norm=math.sqrt(square),
            drift=math.sqrt(max(local_square - square, 0.0)),
            bytes_sent=exchange.bytes_sent + num_bytes,
            transfer_seconds=exchange.seconds,
            waited_seconds=exchange.seconds if self.launched is None else received - start,
            outer_seconds=done - received,
            sync_seconds=self.launch_seconds + done - start,
            left_out=len(exchange.left_out),
            fell_back=fell_back,
        )

    def keep_lost(self) -> None:
        """Keep what compression lost of each part; nothing where it was sent as it is."""
        for wire in self.exchange.wires.values():
            lost = torch.zeros_like(wire.body) if wire.residual is None else wire.residual
            for part, piece in zip(wire.parts, wire.split(lost), strict=True):
                assert part.tracked.residual is not None
                part.put(part.tracked.residual, piece)

    def state_dict(self) -> dict[str, Any]:
        """What arrived, the same on all workers; waits for it."""
        self.exchange.wait()
        return {
            "round_idx": self.round_idx,
            "local_steps": self.local_steps,
            "wires": None if self.exchange.shards else self._wires(),
            "arrived": {i: value.clone() for i, value in self.exchange.arrived.items()},
            "told": self.exchange.told.state_dict(),
            "left_out": self.exchange.left_out,
        }

    def own_state(self) -> dict[str, Any]:
        """What differs between the workers; waits for it."""
        self.exchange.wait()
        return {
            "wires": self._wires() if self.exchange.shards else None,
            "launched": self.launched,
            "buffers": self.exchange.buffers,
            "residuals": [wire.residual for wire in self.exchange.wires.values()],
        }

    def _wires(self) -> list[dict[str, Any]]:
        return [wire.state_dict() for wire in self.exchange.wires.values()]

    def _load_wires(self, states: list[dict[str, Any]] | None) -> None:
        for wire, state in zip(self.exchange.wires.values(), states or (), strict=states is not None):
            wire.load_state_dict(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, in a flight of the same parts."""
        self._load_wires(state["wires"])
        self.exchange.told, self.exchange.left_out = GroupStatus.of(state["told"]), state["left_out"]
        self.exchange.arrived = {i: v.to(self.exchange.buffers[i].device) for i, v in state["arrived"].items()}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore what `own_state` returned."""
        self._load_wires(state["wires"])
        parts, buffers = self.exchange.parts, self.exchange.buffers
        self.launched = [y.to(part.tracked.param.device) for y, part in zip(state["launched"], parts, strict=True)]
        self.exchange.buffers = [b.to(like.device) for b, like in zip(state["buffers"], buffers, strict=True)]
        for wire, residual in zip(self.exchange.wires.values(), state["residuals"], strict=True):
            wire.residual = None if residual is None else residual.to(wire.body.device)
