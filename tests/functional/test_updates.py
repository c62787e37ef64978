"""What each update does where the pseudo-gradient is and was exactly 0."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_lopt import AdaMLP
from lightning_lopt.functional import learned, plain
from lightning_lopt.functional.updates import FORMER_UPDATES, UPDATES

SHAPES = [(7,), (5, 6), (70, 40), (6, 4, 3, 3), (3, 5, 2)]
MOVING = {"published", *FORMER_UPDATES.values()}  # as the authors' code does, and as saved runs did
FORMS = {"separable": learned.step, "plain": plain.step}


def make(update, shape, inputs="mean"):
    """A network, parameters of two particles, their state, and where they are in use: not in some row, column, cell."""
    own = AdaMLP(inputs, update=update, step_mult=0.1, exp_mult=0.1, seed=0).double()
    network = own.functional({name: p.detach().expand(2, *p.shape) for name, p in own.named_parameters()})
    param = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    used = torch.ones_like(param, dtype=torch.bool)
    used[:, 1], used[0, ..., 1], used[1].view(-1)[4] = False, False, False
    return network, param, network.update.init_state(shape, 2, param.dtype, param.device), used


def steps(network, param, state, used, start=0, stop=4, step=learned.step):
    """The parameters after some steps."""
    param, generator = param.clone(), torch.Generator().manual_seed(start)
    for t in range(start, stop):
        workers = torch.randn(2, network.num_inputs, *param.shape[1:], generator=generator, dtype=param.dtype)
        workers = workers * used.unsqueeze(1)
        given = workers if network.num_inputs > 1 else None
        step(param, workers.mean(1), state, network, torch.tensor([t, t + 3]), given)
    return param


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [40 * 64, learned.BLOCK_SIZE["cpu"]], ids=["blocks", "whole"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("update", [update for update in UPDATES if update not in MOVING])
def test_unused_rows_columns_and_coordinates_stay(monkeypatch, update, shape, size, form):
    monkeypatch.setitem(learned.BLOCK_SIZE, "cpu", size)
    network, param, state, used = make(update, shape)
    assert torch.equal(steps(network, param, state, used, step=FORMS[form]) != param, used)


@pytest.mark.parametrize("update", [update for update in UPDATES if update not in MOVING])
def test_unused_coordinates_stay_with_worker_inputs(update):
    network, param, state, used = make(update, (5, 6), inputs=3)
    assert torch.equal(steps(network, param, state, used) != param, used)


@pytest.mark.parametrize("update", sorted(MOVING))
def test_the_published_and_the_former_update_move_what_is_unused(update):
    network, param, state, used = make(update, (5, 6))
    assert bool((steps(network, param, state, used) != param).all())


@pytest.mark.parametrize(("update", "former"), FORMER_UPDATES.items())
def test_what_is_used_for_the_first_time_moves_as_with_the_former_update(update, former, monkeypatch):
    """But for the roots."""
    monkeypatch.setattr(type(UPDATES[former]), "roots", UPDATES[update].roots)
    network, param, state, used = make(update, (5, 6))
    param = steps(network, param, state, used)
    in_use, others = torch.ones_like(used), copy.deepcopy(state)
    ours = steps(network, param, state, in_use, 4, 5)
    theirs = steps(network._replace(update=UPDATES[former]), param, others, in_use, 4, 5)
    assert torch.equal(ours, theirs)
    assert bool((ours != param).all())
    assert torch.equal(steps(network, ours, state, used, 5, 6) != ours, in_use)  # by what is left in the momentum
