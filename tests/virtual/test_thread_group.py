"""The collectives of virtual workers are those of processes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_lopt.comm import Communicator, DisagreementError
from lightning_lopt.virtual.thread_group import ThreadGroup, VirtualGroup
from tests.processes import run_workers


def _collectives(rank, make_comm=Communicator):
    comm = make_comm()
    own = torch.arange(4.0) + rank
    mean, largest, first = own.clone(), own.clone(), own.clone()
    comm.mean_(mean)
    comm.max_(largest)
    comm.broadcast_([first])
    stacked = comm.gather(own)
    pieces = comm.all_to_all(own, [1, 3], [1 + 2 * rank] * 2)
    total = comm.total([rank, 1.0], own.device)
    agreed = comm.agree(own.device, {"same": 3}, [rank])
    objects = comm.gather_objects(f"of {rank}")
    tensors = [mean, largest, first, stacked, pieces]
    return [t.tolist() for t in tensors], total, agreed, objects, comm.bytes_sent, comm.num_collectives


def _virtually(function, num_workers=2):
    group = ThreadGroup(num_workers)
    groups = [VirtualGroup(k, num_workers, group) for k in range(num_workers)]
    return group.run([partial(function, k, partial(Communicator, backend=g)) for k, g in enumerate(groups)])


def test_collectives():
    assert _virtually(_collectives) == run_workers(_collectives, 2)


def _disagree(rank, make_comm):
    make_comm().agree(torch.device("cpu"), {"steps": rank})


def test_a_disagreement_is_an_error():
    with pytest.raises(DisagreementError, match="disagree on steps"):
        _virtually(_disagree)


def _fail(rank, make_comm):
    comm = make_comm()
    if rank == 1:
        raise OSError("this worker fails")
    comm.mean_(torch.zeros(1))


def test_nobody_waits_for_a_worker_that_failed():
    with pytest.raises(OSError, match="this worker fails"):
        _virtually(_fail, 3)
