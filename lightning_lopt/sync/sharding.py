"""Which worker does the outer step of which tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_lopt.comm import Communicator
from lightning_lopt.sync.anchors import AnchoredParameter
from lightning_lopt.sync.flat import FlatBuffer, ParameterSlice


class Shards:
    """Whole tensors, each owned by one worker, so that all own about as much.

    Whole tensors, not slices: what needs whole matrices (an orthogonalised step, statistics of rows and columns) is
    exact without a further reduction, and any outer optimizer works as it is. A tensor larger than 1/K of the model
    unbalances the shares.

    Args:
        comm: the collectives.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._owners: dict[AnchoredParameter, int] = {}
        self._loads = [0] * comm.num_workers

    def assign(self, tracked: Sequence[AnchoredParameter]) -> None:
        """Find owners for those that have none; the others keep theirs."""
        new = [t for t in tracked if t not in self._owners]
        for t in sorted(new, key=lambda t: -t.param.numel()):
            owner = min(range(len(self._loads)), key=self._loads.__getitem__)
            self._owners[t] = owner
            self._loads[owner] += max(1, t.param.numel())

    def owns(self, tracked: AnchoredParameter) -> bool:
        """Whether this worker owns a tensor."""
        return self._owners.get(tracked) == self._comm.rank

    def sort(self, parts: Sequence[ParameterSlice]) -> list[ParameterSlice]:
        """By owner: then each worker's share of a wire is one slice."""
        return sorted(parts, key=lambda part: self._owners[part.tracked])

    def collect(self, wire: FlatBuffer, *, gather: bool) -> None:
        """Send everybody its share of a sorted wire; of the own share, leave the mean over the workers in place.

        Summed in the order of the workers, and so the same in every run.
        """
        counts, share = self._shares(wire)
        received = self._comm.all_to_all(wire.body, counts, [len(share)] * len(counts)).view(len(counts), len(share))
        torch.mean(received, 0, out=share)
        wire.workers = received if gather else None

    def spread(self, wire: FlatBuffer) -> None:
        """Send the own anchors to all others, and take theirs."""
        counts, share = self._shares(wire)
        for part, view in zip(wire.parts[wire.own], wire.views[wire.own], strict=True):
            view.copy_(part.of(part.tracked.anchor))
        wire.body.copy_(self._comm.all_to_all(share.repeat(len(counts)), [len(share)] * len(counts), counts))
        for part, view in zip(wire.parts, wire.views, strict=True):
            part.put(part.tracked.anchor, view)

    def _shares(self, wire: FlatBuffer) -> tuple[list[int], torch.Tensor]:
        """The length of each worker's share, and this worker's; `wire.own` is set to the parts in it."""
        owners = [self._owners[part.tracked] for part in wire.parts]
        counts, num_parts = [0] * self._comm.num_workers, [0] * self._comm.num_workers
        for owner, size in zip(owners, wire.sizes, strict=True):
            counts[owner] += size
            num_parts[owner] += 1
        rank = self._comm.rank
        wire.own = slice(sum(num_parts[:rank]), sum(num_parts[: rank + 1]))
        return counts, wire.body[sum(counts[:rank]) : sum(counts[: rank + 1])]
