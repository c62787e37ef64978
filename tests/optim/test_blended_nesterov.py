"""BlendedNesterov against the network whose last layer is zero, and as the outer optimizer of rounds."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from lightning_lopt import AdaMLP, BlendedNesterov, LearnedOptimizer, Rounds
from lightning_lopt.functional.phase import settings_in_phase

SHAPES = [(4, 3), (5,), (), (2, 3, 3, 3), (0, 4), (70, 130), (1, 9)]
EXACT = {"lr": 1.0, "momentum": 0.9, "blend": (1 / 3, 1 / 3, 1 / 3)}  # whose network has zeros for parameters


def trajectory(make, dtype):
    """Parameters after each of some rounds, in which some tensors have no gradient and one round is wild."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    outer = make([{"params": params[:3]}, {"params": params[3:]}])
    for t in range(12):
        for i, group in enumerate(outer.param_groups):
            group.update(local_lr=0.1 * (1 + t * i), local_steps=4 + t, local_momentum=0.8 * i)
        for j, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator).to(dtype) * (30 if t == 6 else 1)
            p.grad = None if (j + t) % 5 == 4 else grad
        outer.step()
        yield [p.detach().clone() for p in params]


def with_network(params, **options):
    return LearnedOptimizer(params, AdaMLP.base_step(**options).to(params[0]["params"][0].dtype))


@pytest.mark.parametrize(
    ("dtype", "options", "tolerance"),
    [(torch.float64, EXACT, 1e-11), (torch.float32, {}, 1e-4), (torch.float32, {"lr": 0.4, "momentum": 0.6}, 1e-4)],
    ids=["float64", "default", "other"],
)
def test_it_takes_the_steps_of_the_network(dtype, options, tolerance):
    ours, theirs = (trajectory(partial(make, **options), dtype) for make in (BlendedNesterov, with_network))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_rounds_with_it_are_those_with_the_network():
    ends = []
    for outer in (BlendedNesterov, partial(LearnedOptimizer, network=AdaMLP.base_step())):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        rounds = Rounds(model, optimizer, 3, outer)
        for _ in range(12):
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            rounds.step()
        assert rounds.round_idx == 4
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def run(local_lrs, phase, **settings):
    """Parameters of two groups after rounds with the given local rates, those of the second group constant."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES[:2]]
    outer = BlendedNesterov([{"params": [p]} for p in params], phase=phase, **settings)
    for local_lr in local_lrs:
        for group, lr in zip(outer.param_groups, (local_lr, 0.1), strict=True):
            group.update({} if lr is None else {"local_lr": lr}, local_steps=4)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        outer.step()
    return [p.detach() for p in params], outer


DECAYING = [0.4, 0.3, 0.1, 0.01, 0.0]


@pytest.mark.parametrize(
    "local_lrs",
    [[0.1] * 5, [None] * 5, [math.nan] * 5, [0.0] * 5, [0.1, 0.2, 0.3, 0.4, 0.4], [0.4, math.nan, 0.1, math.nan, 0.1]],
    ids=["constant", "missing", "nan", "zero", "warm-up", "now and then"],
)
def test_without_a_decay_the_phase_changes_no_bit(local_lrs):
    for ours, theirs in zip(run(local_lrs, 0.7)[0], run(local_lrs, 0.0)[0], strict=True):
        assert torch.equal(ours, theirs)


def test_the_phase_is_that_of_each_group():
    (decaying, constant), _ = run(DECAYING, 0.7)
    (without, reference), _ = run(DECAYING, 0.0)
    assert torch.equal(constant, reference)
    assert not torch.equal(decaying, without)


def test_a_round_has_the_settings_of_its_phase():
    """The last round of a decay, taken by hand with constant settings from the state before it."""
    _, outer = run(DECAYING[:3], 0.7)
    lr, momentum = settings_in_phase(1.1, 0.85, 0.1 / 0.4, 4, 0.7)
    twin = BlendedNesterov([{"params": [p.detach().clone()]} for group in outer.param_groups for p in group["params"]])
    twin.load_state_dict(copy.deepcopy(outer.state_dict()))
    for group, own in zip(twin.param_groups, [(lr, momentum), (1.1, 0.85)], strict=True):
        group.update(phase=0.0, lr=own[0], momentum=own[1])
    for each in (outer, twin):
        generator = torch.Generator().manual_seed(1)
        for group in each.param_groups:
            group["params"][0].grad = torch.randn(group["params"][0].shape, generator=generator)
        each.step()
    for a, b in zip(outer.param_groups, twin.param_groups, strict=True):
        assert torch.equal(a["params"][0], b["params"][0])


def test_a_decay_is_saved_and_new_groups_begin_their_own():
    _, outer = run(DECAYING[:3], 0.7)
    saved = copy.deepcopy(outer.state_dict())
    fresh = run([0.1], 0.7)[1]
    fresh.load_state_dict(saved)
    assert [group["local_decay"] for group in fresh.param_groups] == [(0.4, 0.1), (0.1, 0.1)]
    fresh.add_param_group({"params": [torch.zeros(2)], "local_lr": 0.05})
    fresh.step()  # a group without a pseudo-gradient in this round has a phase, too
    assert fresh.param_groups[2]["local_decay"] == (0.05, 0.05)
    for group in saved["param_groups"]:
        del group["phase"], group["local_decay"]
    fresh = run([0.1], 0.7)[1]
    fresh.load_state_dict(saved)
    fresh.step()
    assert [group["phase"] for group in fresh.param_groups] == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_state_dict_round_trip_is_bitwise(dtype):
    generator, outers = torch.Generator().manual_seed(0), []
    for _ in range(2):
        params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
        outers.append(BlendedNesterov(params, phase=0.5))
    for t in range(4):
        if t == 2:
            outers[1].load_state_dict(copy.deepcopy(outers[0].state_dict()))
            for a, b in zip(*(outer.param_groups[0]["params"] for outer in outers), strict=True):
                b.data.copy_(a.data)
        for j, p in enumerate(outers[0].param_groups[0]["params"]):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            outers[1].param_groups[0]["params"][j].grad = p.grad.clone()
        for outer in outers[: 1 if t < 2 else 2]:
            outer.param_groups[0].update(local_lr=0.1 / (1 + t), local_steps=4)
            outer.step()
    for a, b in zip(*(outer.param_groups[0]["params"] for outer in outers), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": 0.0}, "lr > 0"),
        ({"lr": float("inf")}, "finite lr"),
        ({"momentum": 1.0}, r"momentum in \[0, 1\)"),
        ({"blend": (0.5, 0.6, 0.2)}, "whose sum is 1"),
        ({"blend": (1.5, -0.5, 0.0)}, "weights >= 0"),
        ({"blend": (0.5, 0.5)}, "three weights"),
        ({"phase": -0.5}, "finite phase >= 0"),
        ({"phase": float("inf")}, "finite phase >= 0"),
    ],
)
def test_wrong_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        BlendedNesterov([torch.zeros(1)], **options)
