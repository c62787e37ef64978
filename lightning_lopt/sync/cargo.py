"""What there is to send, and which parts of it a sync does."""

from __future__ import annotations

import torch

from lightning_lopt.selection import Everything, drawn_ahead
from lightning_lopt.sync.anchors import AnchoredParameter, AnchoredParameters
from lightning_lopt.sync.flat import ParameterSlice, cut
from lightning_lopt.sync.options import SyncOptions
from lightning_lopt.sync.outer_step import OuterStep
from lightning_lopt.sync.sharding import Shards


class Cargo:
    """The parameters in training, with all that belongs to each of them.

    Args:
        parameters: of the local optimizer.
        options: says what a sync sends.
        step: the outer step, None for averaging.
        shards: which tensors each worker steps; None for all.
    """

    def __init__(
        self, parameters: AnchoredParameters, options: SyncOptions, step: OuterStep | None, shards: Shards | None
    ) -> None:
        self._parameters, self._step, self._shards = parameters, step, shards
        self._compressed = options.codec is not None
        self.picks = drawn_ahead(options.picks)

    def in_training(self) -> list[AnchoredParameter]:
        """All parameters in training, those that were unfrozen or added since the last sync included."""
        for group in self._parameters.follow():
            if self._step is not None:
                self._step.add_group(group)
        tracked = self._parameters.in_training()
        if self._shards is not None:
            self._shards.assign(tracked)
        if self._compressed:
            for t in tracked:
                t.residual = torch.zeros_like(t.anchor) if t.residual is None else t.residual
        return tracked

    def parts(self, tracked: list[AnchoredParameter], round_idx: int, *, everything: bool) -> list[ParameterSlice]:
        """What the sync of a round sends of them, or all."""
        selection = Everything() if everything else self.picks
        parts = cut(tracked, selection.pick([t.param.numel() for t in tracked], round_idx))
        return parts if self._shards is None else self._shards.sort(parts)
