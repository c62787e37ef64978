"""The division of the outer step among the workers: each owns some tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lopt.comm import Communicator
from lightning_lopt.functional.balance import least_loaded
from lightning_lopt.sync.anchors import AnchoredParameter
from lightning_lopt.sync.flat import FlatBuffer, ParameterSlice


class Shards:
    """Whole tensors, each owned by one worker, so that all own about as much.

    Whole tensors, not slices: a step that needs whole matrices (an orthogonalised step, statistics of rows and columns)
    is exact without a further reduction, and any outer optimizer works as it is. A tensor larger than 1/K of the model
    unbalances the shards.

    Args:
        comm: Collectives among the workers.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._owners: dict[AnchoredParameter, int] = {}
        self._loads = [0] * comm.num_workers

    def assign(self, parameters: Sequence[AnchoredParameter]) -> None:
        """Find an owner for each parameter that has none."""
        new = [p for p in parameters if p not in self._owners]
        self._owners.update(zip(new, least_loaded([p.param.numel() for p in new], self._loads), strict=True))

    def owns(self, parameter: AnchoredParameter) -> bool:
        """Whether this worker owns a parameter."""
        return self._owners.get(parameter) == self._comm.rank

    def sort(self, slices: Sequence[ParameterSlice]) -> list[ParameterSlice]:
        """Sort slices by owner, so that each worker's share of a flat buffer is contiguous."""
        return sorted(slices, key=lambda s: self._owners[s.parameter])

    def total(self, sums: Tensor) -> Tensor:
        """Sum numbers over the workers, each of which has those of the tensors that it owns."""
        total = self._comm.total(sums.flatten().tolist(), next(iter(self._owners)).anchor.device)
        return sums.new_tensor(total).view_as(sums)

    def reduce_scatter(self, flat_buffer: FlatBuffer, *, gather: bool) -> None:
        """Send every worker its share of a sorted buffer, and leave the mean of the own share in place.

        The sum is in the order of the workers, and so the same in every run.

        Args:
            flat_buffer: Buffer of sorted slices.
            gather: Whether every worker's values of the own share are wanted, too.
        """
        counts, own = self._shares(flat_buffer)
        received = self._comm.all_to_all(flat_buffer.payload, counts, [len(own)] * len(counts))
        received = received.view(len(counts), len(own))
        torch.mean(received, 0, out=own)
        flat_buffer.worker_payloads = received if gather else None

    def all_gather(self, flat_buffer: FlatBuffer) -> None:
        """Send the own anchors to all other workers, and take theirs."""
        counts, own = self._shares(flat_buffer)
        owned = flat_buffer.owned
        for s, view in zip(flat_buffer.slices[owned], flat_buffer.views[owned], strict=True):
            view.copy_(s.read(s.parameter.anchor))
        gathered = self._comm.all_to_all(own.repeat(len(counts)), [len(own)] * len(counts), counts)
        flat_buffer.payload.copy_(gathered)
        for s, view in zip(flat_buffer.slices, flat_buffer.views, strict=True):
            s.write(s.parameter.anchor, view)

    def _shares(self, flat_buffer: FlatBuffer) -> tuple[list[int], Tensor]:
        """The length of each worker's share, and the own share; `owned` is set to the slices in it."""
        owners = [self._owners[s.parameter] for s in flat_buffer.slices]
        counts, num_slices = [0] * self._comm.num_workers, [0] * self._comm.num_workers
        for owner, size in zip(owners, flat_buffer.sizes, strict=True):
            counts[owner] += size
            num_slices[owner] += 1
        rank = self._comm.rank
        flat_buffer.owned = slice(sum(num_slices[:rank]), sum(num_slices[: rank + 1]))
        return counts, flat_buffer.payload[sum(counts[:rank]) : sum(counts[: rank + 1])]
