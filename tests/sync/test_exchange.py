"""One exchange: what is sent and when, who waits, and that all send the same coordinates."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_lopt import DisagreementError, Rounds, SyncOptions
from tests.processes import run_workers
from tests.sync_support import Given, Point
from tests.threads import run_threads


def _late(rank):
    model = Point(torch.zeros(4))
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 3, options=SyncOptions(overlap_steps=2))
    seconds = []
    for step in range(3):
        if rank == 1 and step == 0:
            time.sleep(1.0)
        start = time.monotonic()
        rounds.step()
        seconds.append(time.monotonic() - start)
    return seconds, rounds.last_report


def test_nobody_waits_at_the_launch():
    """A worker comes a second late: with overlap the other one goes on, and waits at the finish only."""
    (seconds, report), _ = run_workers(_late, 2)
    assert max(seconds[:2]) < 0.3
    assert seconds[2] > 0.5
    assert report.transfer_seconds > 0.5


def _count_collectives(rank):
    """The names of all torch.distributed calls per step, with H = 3."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rounds = Rounds(model, optimizer, 3)
    calls: list[str] = []
    names = ["all_reduce", "broadcast", "all_gather", "barrier", "all_gather_object", "gather_object", "reduce"]
    for name in names:
        setattr(dist, name, _recording(name, getattr(dist, name), calls))
    per_step = []
    for _ in range(6):
        model(torch.randn(4, 2)).square().mean().backward()
        optimizer.step()
        rounds.step()
        per_step.append(len(calls))
        calls.clear()
    return per_step, rounds.comm.bytes_sent


def _recording(name, function, calls):
    def wrapper(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    return wrapper


def test_nothing_travels_between_syncs():
    # a sync: the agreement, the floats, and the integers (BatchNorm's counter)
    assert [steps for steps, _ in run_workers(_count_collectives, 2)] == [[0, 0, 3, 0, 0, 3]] * 2


def _other_coordinates(rank, make_comm, overlap_steps):
    masks = [[k != rank for k in range(4)]] * 2
    model = Point(torch.zeros(4))
    options = SyncOptions(selection=Given(masks), overlap_steps=overlap_steps)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 2, comm=make_comm(), options=options)
    rounds.step()
    rounds.step()


@pytest.mark.parametrize("overlap_steps", [0, 1])
def test_workers_with_other_coordinates_are_an_error(overlap_steps):
    with pytest.raises(DisagreementError, match="coordinates to send"):
        run_threads(_other_coordinates, 2, overlap_steps)


def _nothing_changed(rank, make_comm):
    """The bytes of a sync of a model with a large buffer that nobody, one worker, and nobody again has changed."""
    model = Point(torch.zeros(4))
    model.register_buffer("table", torch.zeros(10_000))
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1, comm=make_comm())
    sent = []
    for round_idx in range(3):
        if round_idx == 1 and rank == 1:
            model.table += 2
        rounds.step()
        sent.append(rounds.last_report.bytes_sent)
    return sent, model.table.unique().tolist()


def test_only_buffers_that_somebody_changed_are_sent():
    for (before, changed, after), values in run_threads(_nothing_changed, 2):
        assert before == after < 1_000
        assert changed - before == 40_000  # 2 (K - 1)/K × 4 bytes
        assert values == [1.0]
