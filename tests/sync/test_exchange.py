"""One exchange: what is sent and when, who waits, and that all send the same coordinates."""

from __future__ import annotations

import math
import threading
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_lopt import DisagreementError, Rounds, SlowMomentum, SyncOptions, TopK
from lightning_lopt.comm import Communicator
from lightning_lopt.virtual.thread_group import ThreadGroup, VirtualGroup
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


def _drift(rank, make_comm, compression, apart):
    """The drift of rounds in which each worker moves by 1 and, with a sign of its own, by `apart`."""
    model = Point(torch.zeros(4096))
    options = SyncOptions(compression=compression)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1, comm=make_comm(), options=options)
    drifts = []
    for i in range(4):
        generator = torch.Generator().manual_seed(i)
        model.x.data += torch.randn(4096, generator=generator) + apart * (2 * rank - 1)
        rounds.step()
        drifts.append(rounds.last_report.drift)
    return drifts


@pytest.mark.parametrize("compression", [None, "bf16", "int8", TopK(0.02)], ids=str)
def test_equal_workers_have_no_drift(compression):
    for drifts in run_threads(_drift, 2, compression, 0.0):
        assert drifts == pytest.approx([0.0] * 4, abs=0.05)  # of norms of 64, up to rounding in float32


@pytest.mark.parametrize("compression", [None, "bf16", "int8"], ids=str)
def test_the_drift_of_unequal_workers(compression):
    for drifts in run_threads(_drift, 2, compression, 0.5):
        assert drifts == pytest.approx([0.5 * 64] * 4, rel=0.01)


def _unfrozen(rank, make_comm, outer):
    """Norms and drift while large parameters are frozen, and in the sync after they were unfrozen."""
    model = nn.ParameterList([torch.zeros(4), torch.full((4,), 1000.0)])
    model[1].requires_grad_(False)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1, outer, comm=make_comm())
    seen = []
    for i in range(3):
        model[1].requires_grad_(i > 0)
        with torch.no_grad():
            for p in model:
                p += 2.0 * rank * p.requires_grad
        rounds.step()
        norms = [worker.norm for worker in rounds.sync.worker_statuses]
        seen.append((rounds.last_report.pseudo_grad_norm, rounds.last_report.drift, norms))
    return seen


@pytest.mark.parametrize("outer", [None, partial(SlowMomentum, momentum=0.0)], ids=["average", "optimizer"])
def test_parameters_without_an_anchor_have_no_norm(outer):
    one, both = (2.0, 2.0, [0.0, 4.0]), (math.sqrt(8), math.sqrt(8), [0.0, math.sqrt(32)])
    for seen in run_threads(_unfrozen, 2, outer):
        for values, expected in zip(seen, (one, one, both), strict=True):
            assert values[:2] == pytest.approx(expected[:2])
            assert values[2] == pytest.approx(expected[2])


def _unfrozen_and_diverged(rank, make_comm):
    model = nn.ParameterList([torch.zeros(2), torch.zeros(2)])
    model[1].requires_grad_(False)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1, comm=make_comm())
    model[1].requires_grad_(True)
    model[1].data += math.nan if rank == 1 else 1.0
    rounds.step()
    return rounds.last_report.left_out, model[1].tolist()


@pytest.mark.filterwarnings("ignore:Round 0 leaves out")
def test_parameters_without_an_anchor_that_diverged_are_left_out():
    assert run_threads(_unfrozen_and_diverged, 2) == [(1, [1.0, 1.0])] * 2


class _SlowInBackground(VirtualGroup):
    """All-reduces that are slow in threads that a sync in flight runs in."""

    def all_reduce(self, tensor, op=None, group=None):
        if threading.current_thread().name not in self.own:
            time.sleep(0.05 * (1 + self._rank))
        super().all_reduce(tensor, op, group)


def _abandon(rank, group):
    backend = _SlowInBackground(rank, 2, group)
    backend.own = [threading.current_thread().name]
    model = Point(torch.zeros(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = SyncOptions(overlap_steps=2)
    rounds = Rounds(model, optimizer, 4, comm=Communicator(backend=backend), options=options)
    for num_steps, scale in (2, 1.0), (4, 10.0):
        for _ in range(num_steps):
            model.x.grad = torch.full((2,), scale * (1 + rank))
            optimizer.step()
            rounds.step()
        start = time.monotonic()
        rounds.abandon_round()
        assert time.monotonic() - start < 0.04  # a lost worker must not keep it waiting
    return model.x.tolist(), rounds.round_idx, rounds.step_idx


def test_collectives_do_not_meet_those_of_a_sync_that_was_abandoned():
    """It is in flight when the next round begins, which must end as if it had not been."""
    group = ThreadGroup(2, timedelta(seconds=20))
    assert group.run([partial(_abandon, rank, group) for rank in range(2)]) == [([-30.0, -30.0], 1, 4)] * 2


def _left_out(rank, make_comm):
    """The anchor after a round without worker 2, and after one in which nobody moves: only residuals are sent."""
    model = Point(torch.zeros(3))
    options = SyncOptions(compression="bf16")
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1, comm=make_comm(), options=options)
    values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0078125, 2.015625, 3.015625]), torch.full((3,), math.nan)]
    expected = (values[0] + values[1]) / 2
    model.x.data += values[rank]
    errors, workers = [], []
    for _ in range(2):
        rounds.step()
        errors.append((model.x - expected).abs().max().item())
        workers.append(rounds.last_report.workers)
    assert workers == [(0, 1), (0, 1, 2)]
    return errors, rounds.last_report.left_out


@pytest.mark.filterwarnings("ignore:Round 0 leaves out")
def test_what_a_round_with_a_worker_left_out_lost_comes_in_the_next():
    """Bfloat16 holds the values that are sent, but not their mean."""
    for (first, second), left_out in run_threads(_left_out, 3):
        assert first > 1e-3
        assert second < 1e-5
        assert left_out == 0


class _FailsOnce(VirtualGroup):
    """Of the means one fails, on all workers."""

    num_means = 0

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM, group=None):
        super().all_reduce(tensor, op)
        if op == dist.ReduceOp.SUM:
            self.num_means += 1
            if self.num_means == self.failing:
                raise ConnectionError


def _again(rank, group, failing, overlap_steps):
    backend = _FailsOnce(rank, 2, group)
    backend.failing = failing
    model = nn.BatchNorm1d(3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = SyncOptions(overlap_steps=overlap_steps, compression="bf16")
    rounds = Rounds(model, optimizer, 2, SlowMomentum, comm=Communicator(backend=backend), options=options)
    ended = []
    for step in range(8):
        optimizer.zero_grad()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        try:
            ended.append(rounds.step())
        except ConnectionError:
            assert rounds.sync.in_flight
            ended.append(rounds.sync_again())
    return ended, [*(p.anchor for p in rounds.sync.replica.parameters()), *model.buffers()]


def test_a_sync_that_failed_can_be_launched_again():
    """Anchors, momentum, buffers and residuals are those of a run without a failure."""
    runs = []
    for failing in (0, 3):
        group = ThreadGroup(2, timedelta(seconds=20))
        runs.append(group.run([partial(_again, rank, group, failing, 0) for rank in range(2)]))
    for (ended, state), (as_if, expected) in zip(*runs, strict=True):
        assert ended == as_if == [False, True] * 4
        assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))


def test_a_sync_that_failed_in_the_background_is_made_good_at_the_end_of_its_round():
    group = ThreadGroup(2, timedelta(seconds=20))
    (ended, state), (_, other) = group.run([partial(_again, rank, group, 3, 1) for rank in range(2)])
    assert ended == [False, True] * 4
    assert state[-1] == 8  # batches
    assert all(torch.equal(a, b) for a, b in zip(state[:2], other[:2], strict=True))
