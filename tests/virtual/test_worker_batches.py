"""Every virtual worker gets the batches that it would have as a process."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_lopt.virtual.worker_batches import FirstWorkerLoader, interleave


@pytest.mark.parametrize("batch_size", [3, None])
def test_batches_are_those_of_every_rank(batch_size):
    data = torch.arange(20)

    def batches(rank, epoch):
        sampler = DistributedSampler(data, 3, rank, shuffle=True, seed=5)
        sampler.set_epoch(epoch)
        return [batch.tolist() for batch in DataLoader(data, batch_size, sampler=sampler)]

    shared = DataLoader(data, batch_size, sampler=DistributedSampler(data, 3, 0, shuffle=True, seed=5))
    interleave(shared, 3)
    first_loader = FirstWorkerLoader(shared, 3)
    for epoch in (0, 1):
        first_loader.sampler.set_epoch(epoch)
        first = [batch.tolist() for batch in first_loader]
        others = [[batch.tolist() for batch in turn] for turn in first_loader.others]
        assert len(first_loader) == len(first)
        assert first == batches(0, epoch)
        assert [list(column) for column in zip(*others, strict=True)] == [batches(1, epoch), batches(2, epoch)]


class _Hides(BatchSampler):
    def __init__(self, sampler):
        super().__init__(range(4), 2, False)
        self.hidden = sampler


def test_a_batch_sampler_that_hides_its_sampler_is_refused():
    loader = DataLoader(range(8), batch_sampler=_Hides(DistributedSampler(range(8), 2, 0)))
    vars(loader)["sampler"] = loader.batch_sampler.hidden
    with pytest.raises(ValueError, match="no attribute `sampler`"):
        interleave(loader, 2)
