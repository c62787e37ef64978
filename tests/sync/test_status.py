"""What workers tell one another before a sync: who is where, and what must be equal."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lightning_lopt import DisagreementError, Rounds, SlowMomentum, SyncOptions
from lightning_lopt.sync.status import SyncPoint
from tests.processes import run_cases
from tests.sync_support import Point, flat
from tests.threads import run_threads


def _new(make_comm=None, options=None, outer=None):
    model = Point(torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return model, optimizer, Rounds(model, optimizer, 4, outer, comm=make_comm and make_comm(), options=options)


def _train(model, optimizer, rounds, gradient, num_steps):
    for _ in range(num_steps):
        model.x.grad = torch.full_like(model.x, gradient)
        optimizer.step()
        rounds.step()


def _different_rounds(rank, make_comm):
    _, _, rounds = parts = _new(make_comm)
    _train(*parts, 1.0, 3)
    if rank == 1:
        rounds.round_idx += 1
    rounds.step()


def test_workers_in_different_rounds_are_an_error():
    with pytest.raises(DisagreementError, match=r"disagree on the round \(between 0 and 1, here [01]\)"):
        run_threads(_different_rounds, 2)


def _different_settings(rank, make_comm):
    _new(make_comm, SyncOptions(density=(rank + 1) / 2))


def test_workers_with_other_settings_are_an_error():
    with pytest.raises(DisagreementError, match="the sync options"):
        run_threads(_different_settings, 2)


def _evaluating(rank, make_comm):
    """Worker 0 asks for the mean, with buffers and parameter groups in the message, while worker 1 syncs."""
    _, _, rounds = parts = _new(make_comm)
    _train(*parts, 1.0, 3)
    if rank == 0:
        rounds.swap_in("mean")
    else:
        rounds.step()


def test_a_worker_that_evaluates_while_another_syncs_is_an_error():
    with pytest.raises(
        DisagreementError, match="worker 0 at the evaluation of the workers' mean, worker 1 at the sync"
    ):
        run_threads(_evaluating, 2)


def _bytes_of_status(rank, make_comm):
    """Bytes of a check, of an evaluation and of a sync, beside those of the parameters."""
    model = Point(torch.zeros(4))
    model.register_buffer("table", torch.zeros(3))
    optimizer = torch.optim.SGD([{"params": [model.x]}, {"params": [], "lr": 2.0}], lr=1.0)
    rounds = Rounds(model, optimizer, 1, SlowMomentum, comm=make_comm())
    sent = [rounds.comm.bytes_sent]
    payload = 4 * (4 + 1)  # with the squared norm
    rounds.check(SyncPoint.CHECKPOINT)
    sent.append(rounds.comm.bytes_sent)
    rounds.local_step = 1  # or all have the global weights
    rounds.swap_in("mean")
    sent.append(rounds.comm.bytes_sent - payload)
    rounds.swap_out()
    rounds.local_step = 0
    rounds.step()
    sent.append(rounds.comm.bytes_sent - 2 * payload)
    return [after - before for before, after in pairwise(sent)]


def test_messages_of_all_points_have_one_length():
    for check, evaluation, sync in run_threads(_bytes_of_status, 2):
        assert check == evaluation == sync


PLACES = [("validation", "epoch end"), ("checkpoint", "validation"), ("checkpoint", "sync")]


def _apart(rank, places):
    _, _, rounds = parts = _new()
    _train(*parts, 1.0, 3)
    point = SyncPoint(places[rank])
    come = rounds.check if point is SyncPoint.CHECKPOINT else rounds.join
    with pytest.raises(DisagreementError) as error:
        rounds.step() if point is SyncPoint.SYNC else come(point)
    return str(error.value)


def _together(rank, options):
    """Meetings and checks between two syncs; what they send, and what they change."""
    model, optimizer, rounds = _new(options=options)
    other, other_optimizer, others = _new(options=options)
    _train(other, other_optimizer, others, 1.0 + rank, 10)
    seen = []
    for num in (2, 1, 7):
        _train(model, optimizer, rounds, 1.0 + rank, num)
        before = rounds.comm.num_collectives
        rounds.check(SyncPoint.CHECKPOINT)
        if not options.overlap_steps:
            rounds.join(SyncPoint.VALIDATION)
        seen.append(rounds.comm.num_collectives - before)
    return seen, torch.equal(flat(model), flat(other)), rounds.round_idx, rounds.equal_steps


def _new_group(rank, _):
    """One worker gives its optimizer another group, whose settings would make its message longer."""
    model, optimizer, rounds = _new(outer=SlowMomentum)
    _train(model, optimizer, rounds, 1.0, 3)
    if rank == 1:
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    with pytest.raises(DisagreementError) as error:
        rounds.step()
    return str(error.value)


def _case(rank, function, *args):
    return function(rank, *args)


@pytest.fixture(scope="module")
def results():
    apart = {str(places): (_apart, places) for places in PLACES}
    together = {str(overlap): (_together, SyncOptions(overlap_steps=overlap)) for overlap in (0, 2)}
    return run_cases(_case, 2, apart | together | {"group": (_new_group, None)})


def test_a_group_that_only_one_worker_has_is_an_error(results):
    for said in results["group"]:
        assert "the number of the local optimizer's parameter groups (between 1 and 2" in said


def _new_groups(rank, make_comm):
    model, optimizer, rounds = _new(make_comm, outer=SlowMomentum)
    sent = []
    for i in range(3):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 2.0 + i + rank})
        _train(model, optimizer, rounds, 1.0, 4)
        before = rounds.comm.num_collectives
        rounds.check(SyncPoint.CHECKPOINT)
        sent.append(rounds.comm.num_collectives - before)
        assert rounds.sync.outer is not None
    return [group["local_lr"] for group in rounds.sync.outer.param_groups], sent


def test_the_outer_optimizer_sees_the_settings_of_new_groups():
    assert run_threads(_new_groups, 2) == [([1.0, 3.0, 4.0, 5.0], [1, 1, 1])] * 2


@pytest.mark.parametrize("places", PLACES)
def test_who_waits_at_different_places_is_told(results, places):
    for said in results[str(places)]:
        assert f"worker 0 at the {places[0]}" in said
        assert f"worker 1 at the {places[1]}" in said


@pytest.mark.parametrize("overlap", [0, 2], ids=["at once", "in flight"])
def test_who_is_together_goes_on_as_if_nothing_had_been(results, overlap):
    for seen, equal, rounds, in_step in results[str(overlap)]:
        assert equal
        assert (rounds, in_step) == (2, True)
        assert max(seen) <= 3  # a message each; the check waits for the agreement and transfer of what is in flight
