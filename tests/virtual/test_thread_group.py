"""The collectives of virtual workers are those of processes."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt.comm import CommonInteger, Communicator, DisagreementError
from tests.processes import run_workers
from tests.threads import run_threads


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
    agreed = comm.agree(own.device, {CommonInteger("same"): 3}, [rank])
    objects = comm.gather_objects(f"of {rank}")
    tensors = [mean, largest, first, stacked, pieces]
    return [t.tolist() for t in tensors], total, agreed, objects, comm.bytes_sent, comm.num_collectives


def test_collectives():
    assert run_threads(_collectives, 2) == run_workers(_collectives, 2)


def _disagree(rank, make_comm):
    make_comm().agree(torch.device("cpu"), {CommonInteger("steps"): rank})


def test_a_disagreement_is_an_error():
    with pytest.raises(DisagreementError, match="disagree on steps"):
        run_threads(_disagree, 2)


def _stay_away(rank, make_comm):
    comm = make_comm()
    comm.mean_(torch.zeros(1))
    if rank != 1:
        comm.mean_(torch.zeros(1))


def test_one_that_does_not_come_is_named():
    with pytest.raises(TimeoutError, match=r"Virtual workers \[1\] did not come within 0:00:00.2"):
        run_threads(_stay_away, 3, limit=0.2)


def _fail(rank, make_comm):
    comm = make_comm()
    if rank == 1:
        raise OSError("this worker fails")
    comm.mean_(torch.zeros(1))


def test_nobody_waits_for_a_worker_that_failed():
    with pytest.raises(OSError, match="this worker fails"):
        run_threads(_fail, 3)
