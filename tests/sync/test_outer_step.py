"""The outer step: any optimizer on the anchors, its settings, its state, and averaging in the place of a wild step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from lightning_lopt import AdaMLP, DisagreementError, Fragments, LearnedOptimizer, Rounds, SlowMomentum, SyncOptions
from tests.sync_support import Given, Point
from tests.threads import run_threads


@pytest.mark.parametrize(
    ("outer", "reference"),
    [
        (partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True), "nesterov"),
        (partial(SlowMomentum, lr=0.8, momentum=0.5), "slow"),
        (partial(torch.optim.Adam, lr=0.1), "adam"),
    ],
    ids=["SGD", "SlowMomentum", "Adam"],
)
def test_outer_steps_on_random_coordinates(outer, reference):
    """Each coordinate has its own momentum, and only those that are sent move it (Adam counts steps per tensor)."""
    torch.manual_seed(0)
    masks = torch.rand(6, 8) < 0.5
    masks[:, 0], masks[:, 1] = True, False
    model = Point(torch.randn(2, 4, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rounds = Rounds(model, optimizer, 1, outer, options=SyncOptions(selection=Given(masks.tolist())))
    a, u, v = model.x.detach().flatten().clone(), torch.zeros(8).double(), torch.zeros(8).double()
    for t, mask in enumerate(masks):
        y = torch.randn(8, dtype=torch.float64)
        g = a - y
        if reference == "nesterov":
            u = torch.where(mask, 0.9 * u + g, u)
            step = 0.7 * (g + 0.9 * u)
        elif reference == "slow":
            u = torch.where(mask, 0.5 * u + g / 0.1, u)
            step = 0.8 * 0.1 * u
        else:
            u, v = torch.where(mask, 0.9 * u + 0.1 * g, u), torch.where(mask, 0.999 * v + 0.001 * g**2, v)
            step = 0.1 * (u / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        a = torch.where(mask, a - step, a)
        model.x.data = y.view(2, 4).clone()
        rounds.step()
        torch.testing.assert_close(model.x.detach().flatten(), torch.where(mask, a, y), rtol=0, atol=1e-12)
    states = [
        s for s in rounds.sync.outer.state[rounds.sync.outer.param_groups[0]["params"][0]].values() if s.numel() > 1
    ]
    assert all(s.shape == (2, 4) and s.flatten()[1] == 0 for s in states)


@pytest.mark.parametrize(
    ("outer", "what"),
    [
        (LearnedOptimizer, "its statistics of rows"),
        (torch.optim.Adafactor, "its state 'row_var'"),
        (torch.optim.Rprop, "its state 'step_size', which does not begin with 0"),
    ],
)
def test_outer_steps_that_need_whole_tensors_are_refused(outer, what):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=f"cannot step random coordinates of a tensor: {what}"):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 4, outer, options=SyncOptions(density=0.5))


def _different_outer(rank, make_comm, factories):
    model = nn.Linear(3, 1)
    Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, factories[rank], comm=make_comm())


@pytest.mark.parametrize(
    "factories",
    [
        [None, SlowMomentum],
        [partial(SlowMomentum, momentum=0.5), partial(SlowMomentum, momentum=0.9)],
        [partial(LearnedOptimizer, network=AdaMLP(seed=seed)) for seed in range(2)],
    ],
)
def test_different_outer_optimizers_are_an_error(factories):
    with pytest.raises(DisagreementError, match="outer optimizer"):
        run_threads(_different_outer, 2, factories)


def _lagg(rank, make_comm, num_inputs):
    model = nn.Linear(3, 2)
    outer = partial(LearnedOptimizer, network=AdaMLP(inputs=num_inputs, seed=0))
    Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, outer, comm=make_comm())


def test_lagg_belongs_to_its_number_of_workers():
    run_threads(_lagg, 2, 2)
    with pytest.raises(ValueError, match="belongs to 3 workers, but there are 2"):
        run_threads(_lagg, 2, 3)


@pytest.mark.parametrize(("kind", "match"), [("LBFGS", "needs closure"), ("SparseAdam", "needs sparse gradients")])
def test_an_outer_optimizer_that_no_sync_can_step(kind, match):
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=f"{kind} cannot be the outer optimizer: its step {match}"):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, getattr(torch.optim, kind))


class _Explode(torch.optim.SGD):
    max_update_ratio = 10.0


@pytest.mark.parametrize(("lr", "fell_back"), [(9.0, False), (11.0, True), (float("nan"), True)])
def test_a_step_that_is_too_large_or_not_finite_becomes_an_average(lr, fell_back):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    factory = partial(_Explode, lr=1.0)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 1, factory)
    rounds.sync.outer.param_groups[0]["lr"] = lr
    with torch.no_grad():
        model.weight.sub_(1)
    if fell_back:
        with pytest.warns(UserWarning, match="averaged instead"):
            rounds.step()
    else:
        rounds.step()
    assert rounds.last_report.fell_back == fell_back
    assert model.weight.item() == (2.0 if fell_back else 3.0 - lr)


def test_a_state_of_another_outer_optimizer():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = Rounds(model, optimizer, 1, SlowMomentum).state_dict()
    with pytest.raises(ValueError, match="outer optimizer SlowMomentum; here there are 2 parameters and SGD"):
        Rounds(model, optimizer, 1, partial(torch.optim.SGD, lr=1.0)).load_state_dict(state)


@pytest.mark.parametrize(
    ("momentum", "options", "wanted"),
    [
        (0.9, SyncOptions(), 0.9),
        (0.0, SyncOptions(), 0.0),
        (None, SyncOptions(), 0.81),
        (None, SyncOptions(local_state="reset"), 0.0),
        (0.9, SyncOptions(local_state="reset"), 0.0),
        (0.9, SyncOptions(selection=Fragments(2)), 0.81),
    ],
)
def test_the_outer_optimizer_is_told_the_local_momentum(momentum, options, wanted):
    """Of fragments each has twice the steps for it to fade; None is AdamW, whose first moment is one, too."""
    model, made = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), []
    if momentum is None:
        local: torch.optim.Optimizer = torch.optim.AdamW(model.parameters())
    else:
        local = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)

    def outer(params):
        made.append(torch.optim.SGD(params, lr=1.0))
        return made[0]

    rounds = Rounds(model, local, 4, outer, options=options)
    for _ in range(4):
        model(torch.randn(3, 2)).sum().backward()
        local.step()
        rounds.step()
    assert made[0].param_groups[0]["local_momentum"] == pytest.approx(wanted)


FROZEN = {
    "SlowMo": (partial(SlowMomentum, momentum=0.5), {}),
    "Nesterov": (partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True), {}),
    "Nesterov, sharded": (partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True), {"sharded": True}),
    "Nesterov, random coordinates": (partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True), {"density": 0.5}),
    "Nesterov, in flight": (partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True), {"overlap_steps": 1}),
    "Adam with decay": (partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5), {}),
    "learned": (partial(LearnedOptimizer, network="default"), {}),
    "learned, sharded": (partial(LearnedOptimizer, network="lopt_a_short"), {"sharded": True}),
}


def _freeze(rank, make_comm, outer, options):
    """Three rounds; then the second tensor is frozen for two, and trains again for one."""
    torch.manual_seed(0)
    model = nn.ParameterList([torch.randn(3, 4), torch.randn(2, 3)])
    optimizer = torch.optim.SGD(model, lr=0.1)
    rounds = Rounds(model, optimizer, 2, outer, comm=make_comm(), options=SyncOptions(**options))
    seen = []
    for round_idx in range(6):
        model[1].requires_grad_(round_idx not in (3, 4))
        for _ in range(2):
            with torch.no_grad():
                for p in model:
                    p.sub_(0.1 * (1 + rank) * p.requires_grad)
            rounds.step()
        anchor = rounds.sync.outer.param_groups[0]["params"][1]
        state = [v.clone() for v in rounds.sync.outer.state[anchor].values() if isinstance(v, torch.Tensor)]
        seen.append((model[1].detach().clone(), anchor.clone(), state))
    return seen


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_parameter_stays_and_its_state_waits(name):
    outer, options = FROZEN[name]
    for seen in run_threads(_freeze, 2, outer, options):
        (_, before, waiting), first, second, (_, after, _) = seen[2:]
        for _, _, state in (first, second):
            assert all(torch.equal(a, b) for a, b in zip(state, waiting, strict=True))
        if (
            not {"density", "overlap_steps"} & options.keys()
        ):  # else steps from before the freezing are yet to be averaged
            assert torch.equal(first[1], before)
            assert torch.equal(second[0], before)
        if "density" not in options:
            assert torch.equal(second[1], first[1])
        assert not torch.equal(after, second[1])


def _frozen_in_mid_round(rank, make_comm):
    model = nn.ParameterList([torch.zeros(1), torch.zeros(1)])
    rounds = Rounds(model, torch.optim.SGD(model, lr=0.1), 2, partial(torch.optim.SGD, lr=5.0), comm=make_comm())
    with torch.no_grad():
        model[1].fill_(2.0 * rank)
    rounds.step()
    model[1].requires_grad_(False)
    rounds.step()
    return model[1].item(), rounds.last_report.pseudo_grad_norm


def test_steps_from_before_the_freezing_are_averaged():
    assert run_threads(_frozen_in_mid_round, 2) == [(1.0, 1.0)] * 2


def _frozen_on_one(rank, make_comm):
    model = nn.ParameterList([torch.zeros(1), torch.zeros(1)])
    rounds = Rounds(model, torch.optim.SGD(model, lr=0.1), 1, comm=make_comm())
    model[rank].requires_grad_(False)
    rounds.step()


def test_workers_that_freeze_other_parameters_are_an_error():
    with pytest.raises(DisagreementError, match="parameters in training"):
        run_threads(_frozen_on_one, 2)
