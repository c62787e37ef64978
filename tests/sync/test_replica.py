"""One worker's replica: the parameters that a sync follows, and their first values."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from lightning_lopt import DisagreementError, Rounds, SlowMomentum, SyncOptions
from lightning_lopt.sync.replica import Replica
from tests.threads import run_threads


def _different_models(rank, make_comm):
    model = nn.Linear(3, 1 + rank)
    Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, comm=make_comm())


def test_different_models_are_an_error():
    with pytest.raises(DisagreementError, match=r"has 'weight \(1, 3\) torch.float32', rank 1 has 'weight \(2, 3\)"):
        run_threads(_different_models, 2)


def _start(rank, make_comm, models):
    model = models[rank]
    Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, comm=make_comm())
    return [t.clone() for t in model.state_dict().values()]


def test_all_start_from_rank_0():
    models = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2)]
    weight = models[0][0].weight.detach().clone()
    assert not torch.equal(weight, models[1][0].weight)
    first, second = run_threads(_start, 2, models)
    assert torch.equal(first[0], weight)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _outside(rank, make_comm, sizes):
    """A parameter that only the optimizer holds."""
    model = nn.Linear(2, 2, bias=False)
    outside = nn.Parameter(torch.full((sizes[rank],), float(rank + 3)))
    rounds = Rounds(model, torch.optim.SGD([*model.parameters(), outside], lr=1.0), 1, comm=make_comm())
    start = outside.tolist()
    outside.data -= rank
    rounds.step()
    return start, outside.tolist()


def test_parameters_that_only_the_optimizer_holds_start_from_rank_0():
    assert run_threads(_outside, 2, [2, 2]) == [([3.0, 3.0], [2.5, 2.5])] * 2


def test_parameters_that_only_the_optimizer_holds_have_one_shape():
    with pytest.raises(DisagreementError, match=r"'parameter 1 of the optimizer \(2,\) .* has .* \(3,\)"):
        run_threads(_outside, 2, [2, 3])


def _unfreeze(rank, make_comm):
    """A parameter that is unfrozen, or added, in mid-training joins the syncs: its first one is an average."""
    model = nn.ParameterList([torch.zeros(2), torch.zeros(2), torch.zeros(2)])
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(list(model)[:2], lr=1.0)
    rounds = Rounds(model, optimizer, 1, partial(SlowMomentum, momentum=0.0), comm=make_comm())

    def move():
        with torch.no_grad():
            for p in model:
                if p.requires_grad:
                    p.sub_(float(rank))
        rounds.step()
        return [p[0].item() for p in model]

    seen = []
    model[2].requires_grad_(False)
    seen.append(move())
    model[1].requires_grad_(True)
    seen.append(move())
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": [model[2]]})
    seen += [move(), move()]
    return seen


def test_unfrozen_and_added_parameters():
    expected = [[-0.5, 0, 0], [-1, -0.5, 0], [-1.5, -1, -0.5], [-2, -1.5, -1]]
    assert run_threads(_unfreeze, 2) == [expected, expected]


class _Odd(nn.Module):
    def __init__(self, parameter):
        super().__init__()
        self.x, self.odd = nn.Parameter(torch.zeros(1)), nn.Parameter(parameter)


@pytest.mark.parametrize(
    "parameter", [torch.ones(2, dtype=torch.cfloat), torch.eye(2).to_sparse()], ids=["complex", "sparse"]
)
def test_parameters_in_training_that_are_not_dense_and_real(parameter):
    model = _Odd(parameter)
    with pytest.raises(ValueError, match=r"odd is torch.*sync_rules={'odd': 'local'}"):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1)
    options = SyncOptions(sync_rules={"odd": "local"})
    Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1, options=options).step()


def test_a_parameter_in_training_has_no_other_rule():
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"weight is a parameter in training, whose rule can be 'mean' .* not 'max'"):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1, options=SyncOptions(sync_rules={"w*": "max"}))


def _own(rank, make_comm, listed, sizes, state=None):
    """A parameter that stays each worker's own: from the start, over syncs, and in its local state."""
    model = _Odd(torch.full((sizes[rank],), float(rank)))
    if listed:
        model._ddp_params_and_buffers_to_ignore = ["odd"]
    options = SyncOptions(sync_rules={} if listed else {"od*": "local"})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rounds = Rounds(model, optimizer, 1, partial(SlowMomentum, momentum=0.5), comm=make_comm(), options=options)
    if state is not None:
        rounds.load_state_dict(state[0][0])
        rounds.load_local_state(state[rank][1])
    with torch.no_grad():
        model.x -= rank
        model.odd -= 1
    rounds.step()
    with torch.no_grad():
        model.odd -= 1
    rounds.swap_in("mean")
    evaluated = model.odd.tolist()
    rounds.swap_out()
    assert rounds.rules() == {"x": "mean", "odd": "local"}
    return rounds.state_dict(), rounds.local_state(), model.x.item(), evaluated


@pytest.mark.parametrize("sizes", [[1, 1], [1, 2]], ids=["one shape", "other shapes"])
@pytest.mark.parametrize("listed", [False, True], ids=["rule", "list of DDP"])
def test_what_stays_each_workers_own(listed, sizes):
    first = run_threads(_own, 2, listed, sizes)
    assert [r[2:] for r in first] == [(-0.5, [-2.0] * sizes[0]), (-0.5, [-1.0] * sizes[1])]
    again = run_threads(_own, 2, listed, sizes, first)
    assert [r[3] for r in again] == [[-4.0] * sizes[0], [-3.0] * sizes[1]]


def test_nothing_to_train():
    model = nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1)


def test_a_state_of_parameters_of_another_shape():
    state = Rounds(model := nn.Linear(2, 1), torch.optim.SGD(model.parameters(), lr=1.0), 1).state_dict()
    model = nn.Linear(3, 1)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1)
    with pytest.raises(ValueError, match=r"parameter 0 has the shape \(1, 2\), here it is \(1, 3\)"):
        rounds.load_state_dict(state)


def test_anchors_are_compared_in_rounds_that_all_workers_know():
    """Those who have counted other syncs, since they joined later, must compare in the same ones."""
    model = nn.Linear(2, 1)
    replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.1))
    replica.adopt()

    def compared(rounds):
        return [i for i in rounds if replica.checksum(i) is not None]

    assert compared(range(3, 203)) == [3, 4, 100, 101, 200, 201]
    replica.compare_next()
    assert compared(range(203, 302)) == [203, 204, 300, 301]
