"""Collectives between workers of one and of several ranks."""

from __future__ import annotations

import glob
import os
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_lopt import DiLoCo
from lightning_lopt.comm import CommonInteger, Communicator, DisagreementError
from tests.processes import run_workers
from tests.strategies.support import Classifier, loader, trainer
from tests.threads import run_threads

# Bytes that a rank sends, by the ranks of a worker: to gather 5 and 1 values, to swap slices of 3, for 5 and 1 means.
SENT = {
    1: [[3 * 24, 3 * 12, 36]] * 4,
    2: [[12 + 4, 8, 12 + 4], [8, 4, 8]] * 2,
    4: [[0, 0, 0]] * 4,
}


def _collectives(rank, ranks_per_worker):
    comm = Communicator(ranks_per_worker=ranks_per_worker)
    worker = torch.full((4,), float(comm.rank))
    mean, largest = worker.clone(), worker.clone()
    comm.mean_(mean)
    comm.max_(largest)
    slices = torch.arange(comm.num_workers).repeat_interleave(2) + 10 * comm.rank  # slice k holds k
    twos = [2] * comm.num_workers
    start = torch.full((2,), float(rank))
    comm.broadcast_([start])
    odd, one, sent = torch.arange(5.0) + comm.rank, torch.full((1,), float(comm.rank)), [comm.bytes_sent]
    stacked = [comm.gather(values).sum(0).tolist() for values in (odd, one)]
    sent.append(comm.bytes_sent)
    threes = [3] * comm.num_workers
    swapped = comm.all_to_all(odd.repeat(comm.num_workers)[: 3 * comm.num_workers], threes, threes).tolist()
    sent.append(comm.bytes_sent)
    comm.mean_(odd)
    comm.mean_(one)
    sent.append(comm.bytes_sent)
    return (
        comm.rank,
        mean[0].item(),
        largest[0].item(),
        comm.gather(worker)[:, 0].tolist(),
        comm.all_to_all(slices, twos, twos).tolist(),
        comm.total([1.0, float(comm.rank)], torch.device("cpu")),
        comm.agree(torch.device("cpu"), {CommonInteger("x"): 3}, [False, rank == 3]),
        start[0].item(),
        comm.gather_objects(rank),
        [*odd.tolist(), *one.tolist()],
        stacked,
        swapped,
        [after - before for before, after in pairwise(sent)],
    )


@pytest.mark.parametrize(("ranks_per_worker", "workers"), [(1, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (4, [0, 0, 0, 0])])
def test_collectives_are_between_workers(ranks_per_worker, workers):
    num_workers = 4 // ranks_per_worker
    ranks = list(range(num_workers))
    results = run_workers(_collectives, 4, ranks_per_worker)
    for rank, worker in enumerate(workers):
        assert results[rank] == (
            worker,
            sum(ranks) / num_workers,
            num_workers - 1,
            ranks,
            [worker + 10 * k for k in ranks for _ in range(2)],
            [num_workers, sum(ranks)],
            [False, True],
            0.0,
            [0, 1, 2, 3] if rank == 0 else None,
            [i + sum(ranks) / num_workers for i in (0, 1, 2, 3, 4, 0)],
            [[i * num_workers + sum(ranks) for i in of_each] for of_each in (range(5), range(1))],
            [float((3 * worker + i) % 5 + k) for k in ranks for i in range(3)],
            SENT[ranks_per_worker][rank],
        )


def _unequal_slices(rank):
    send = [[0, 2, 1], [1, 0, 3], [0, 0, 0]]  # by sender and receiver
    comm = Communicator()
    slices = 10 * rank + torch.arange(sum(send[rank]), dtype=torch.uint8)
    return comm.all_to_all(slices, send[rank], [lengths[rank] for lengths in send]).tolist(), comm.bytes_sent


def test_slices_may_be_unequal_and_empty():
    assert run_workers(_unequal_slices, 3) == [([10], 3), ([0, 1], 4), ([2, 11, 12, 13], 0)]


def _lost(rank):
    comm = Communicator(timedelta(seconds=3))
    if rank == 0:
        with pytest.raises(RuntimeError, match="gloo"):  # the strategies say which worker this may be
            comm.all_to_all(torch.zeros(200_000), [100_000] * 2, [100_000] * 2)
    return True


def test_an_all_to_all_without_a_partner_ends():
    assert run_workers(_lost, 2) == [True, True]


def _disagree(rank):
    comm = Communicator(ranks_per_worker=2)
    with pytest.raises(DisagreementError, match="disagree on x"):
        comm.agree(torch.device("cpu"), {CommonInteger("x"): int(rank == 3)})
    return True


def test_ranks_of_one_worker_that_disagree_are_an_error():
    assert run_workers(_disagree, 4) == [True] * 4


STEPS = CommonInteger("the steps", "Count them.", shown=True)
WEIGHTS = CommonInteger("the weights", "Weigh them.")
MODEL = CommonInteger("the model", "Build the same.")


def _disagree_on_two(rank, make_comm):
    with pytest.raises(DisagreementError) as error:
        make_comm().agree(torch.device("cpu"), {STEPS: 3 + rank, WEIGHTS: 12345 + rank, MODEL: 678})
    return str(error.value)


def test_a_disagreement_names_what_differs_and_shows_counts_only():
    start = "The workers disagree on the steps (between 3 and 4, here"
    for rank, said in enumerate(run_threads(_disagree_on_two, 2)):
        assert said == f"{start} {3 + rank}), the weights; this is worker {rank}. Count them. Weigh them."


@pytest.mark.parametrize("timeout", [60, "60", timedelta(seconds=-1)])
def test_time_limits_that_are_none(timeout):
    with pytest.raises(ValueError, match=r"positive datetime\.timedelta"):
        Communicator(timeout)


def test_ranks_that_do_not_divide():
    with pytest.raises(ValueError, match="1 processes cannot be workers of 2 ranks"):
        Communicator(ranks_per_worker=2)


def _addresses(rank):
    """Of this process's sockets while it trains: local addresses of those of IPv4 or IPv6, but for torch's store."""
    found = set()

    class Look(pl.Callback):
        def on_train_end(self, trainer, module):
            own = {os.readlink(fd) for fd in glob.glob("/proc/self/fd/*") if os.path.islink(fd)}
            for table in "/proc/self/net/tcp", "/proc/self/net/tcp6":
                for line in Path(table).read_text().splitlines()[1:]:
                    fields = line.split()
                    address, port = fields[1].split(":")
                    if f"socket:[{fields[9]}]" in own and int(port, 16) != int(os.environ["MASTER_PORT"]):
                        found.add(address)

    trainer(DiLoCo(2, overlap_steps=1, worker_speeds=[2, 1]), max_epochs=1, callbacks=[Look()]).fit(
        Classifier(seed=0), loader(32)
    )
    return found


def test_collectives_bind_to_the_interface_that_the_user_names():
    """`GLOO_SOCKET_IFNAME=lo` is set for all tests: every group of a strategy keeps to it."""
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    for found in run_workers(_addresses, 2, connect=False):
        assert found
        assert found <= loopback, found


def test_what_arrives_has_memory_of_its_own():
    """Also with nobody to receive it from: callers write to what they have sent while they read what has arrived."""
    comm, flat = Communicator(), torch.arange(3.0)
    for received in (comm.gather(flat), comm.all_to_all(flat, [3], [3]), comm.all_to_all_inside(flat, [3], [3])):
        assert received.flatten().tolist() == flat.tolist()
        assert received.data_ptr() != flat.data_ptr()
