"""Global weights in the model for a while: which they are, and that training goes on as if nothing had been."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_lopt import Rounds, SyncOptions
from lightning_lopt.sync.swap import Swap
from tests.sync_support import Point, move
from tests.threads import run_threads

IN_FLIGHT = SyncOptions(density=0.5, overlap_steps=2, compression="int8")


def test_the_first_own_value_comes_back():
    """Also after other values were put in twice, and into a tensor of another type."""
    wide, narrow, swap = torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16), Swap()
    storage = wide.data_ptr()
    swap.put([(wide, torch.ones(2)), (narrow, torch.ones(2))])
    swap.put([(wide, torch.full((2,), 2.0))])
    assert (wide[0].item(), narrow[0].item(), narrow.dtype) == (2.0, 1.0, torch.bfloat16)
    swap.exchange()
    wide += 5
    swap.exchange()
    assert wide[0].item() == 2.0
    swap.undo()
    assert (wide[0].item(), narrow[0].item(), wide.data_ptr()) == (5.0, 0.0, storage)
    assert not swap.active


def test_a_buffer_that_is_written_meanwhile_keeps_it():
    """Also where it is written between two exchanges; a parameter does not."""
    buffers, weight, swap = [torch.zeros(1) for _ in range(3)], nn.Parameter(torch.zeros(1)), Swap()
    swap.put([(t, torch.ones(1)) for t in [*buffers, weight]])
    buffers[0] += 1
    swap.exchange()
    assert [t.item() for t in buffers] == [2.0, 0.0, 0.0]
    swap.exchange()
    buffers[1] += 2
    weight.data += 2
    swap.undo()
    assert [t.item() for t in [*buffers, weight]] == [2.0, 3.0, 0.0, 0.0]


def _swap(rank, make_comm):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    nn.init.zeros_(model[0].weight)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 3, comm=make_comm())
    with torch.no_grad():
        model[0].weight.sub_(rank)
        model[1].running_mean.add_(rank)
        model[1].num_batches_tracked.add_(1 + rank)
    rounds.step()
    seen, pointers = [], [t.data_ptr() for t in model.state_dict().values()]
    for weights in ("anchor", "mean"):
        rounds.swap_in(weights)
        seen.append((model[0].weight.item(), model[1].running_mean.item(), model[1].num_batches_tracked.item()))
        rounds.swap_out()
        assert model[0].weight.item() == -rank
        assert model[1].running_mean.item() == rank
    assert pointers == [t.data_ptr() for t in model.state_dict().values()]
    rounds.abandon_round()
    assert (model[0].weight.item(), model[1].running_mean.item(), rounds.step_idx) == (0, 0, 0)
    return seen


def test_global_weights_come_with_their_buffers():
    assert run_threads(_swap, 2) == [[(0, 0, 0), (-0.5, 0.5, 2)]] * 2


def _validated(rank, make_comm, everybody):
    spoiled = [(0, 0), (0, 1)] if everybody else [(0, 1)]
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 4, comm=make_comm())
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(math.nan if (0, rank) in spoiled else 1.0)
    rounds.step()
    rounds.swap_in("mean")
    return [(p.detach() - b).unique().tolist() for p, b in zip(model.parameters(), before, strict=True)]


@pytest.mark.parametrize("everybody", [False, True])
def test_validation_sees_the_mean_of_the_others_or_the_anchor(everybody):
    for differences in run_threads(_validated, 2, everybody):
        for values in differences:
            assert values == pytest.approx([0.0 if everybody else 1.0] * len(values))


def _evaluated(rank, make_comm):
    """The mean of the workers, in mid-flight, and then on as if nothing had been."""
    model = Point(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rounds = Rounds(model, optimizer, 4, comm=make_comm(), options=IN_FLIGHT)
    own = move(rounds, model, optimizer, rank, 3)[-1]
    rounds.swap_in("mean")
    seen = model.x.detach().clone()
    rounds.swap_out()
    assert torch.equal(model.x, own)
    return own, seen, move(rounds, model, optimizer, rank, 3)


def _unevaluated(rank, make_comm):
    model = Point(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rounds = Rounds(model, optimizer, 4, comm=make_comm(), options=IN_FLIGHT)
    return move(rounds, model, optimizer, rank, 6)[3:]


def test_evaluating_in_flight_leaves_no_trace():
    (own, seen, after), (other, _, _) = run_threads(_evaluated, 2)
    torch.testing.assert_close(seen, (own + other) / 2, rtol=0, atol=1e-15)
    assert torch.equal(after, run_threads(_unevaluated, 2)[0])


def test_nothing_changes_where_nothing_is_shown():
    """Whatever follows a change, as writing into a sharded model what is held, must not follow none."""
    calls = []
    swap = Swap(after=lambda: calls.append(True))
    swap.exchange()
    swap.undo()
    assert (calls, swap.active) == ([], False)
    swap.put([])  # a rank of a worker that holds none of the tensors goes along with the others
    assert swap.active
    swap.undo()
    assert len(calls) == 2
