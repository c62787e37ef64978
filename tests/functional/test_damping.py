"""How much of a pseudo-gradient counts that grew: laws over sequences of rounds."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_lopt import AdaMLP, LearnedOptimizer
from lightning_lopt.functional.ada import AdaState
from lightning_lopt.functional.damping import GROWTH, damping

CPU = torch.device("cpu")


def run(norms, scales=None, first_round=2):
    """The damping of each round of one vector."""
    state, seen = AdaState.zeros((3,), 1, torch.float64, CPU), []
    for t, (norm, scale) in enumerate(zip(norms, scales or [0.0] * len(norms), strict=True)):
        grad = norm * torch.tensor([[0.6, 0.0, 0.8]], dtype=torch.float64)
        local_scale = torch.tensor([scale], dtype=torch.float64)
        seen.append(damping([grad], [state], [torch.tensor([first_round + t])], [local_scale]).item())
    return seen


def test_what_shrinks_or_grows_slowly_counts_in_full():
    assert run([1.0, 0.1, 0.1 * GROWTH, 0.1 * GROWTH**2 * 0.999, 1e-6]) == [1.0] * 5


def test_nothing_to_compare_with_counts_in_full():
    assert run([0.0, 0.0, 1e6]) == [1.0] * 3
    assert run([1.0, 8.0, 8.0, 80.0], first_round=0)[:3] == [1.0] * 3
    assert run([1.0, 8.0, 8.0, 80.0], first_round=0)[3] < 1.0


@pytest.mark.parametrize("factor", [3.0, 100.0, 1e6])
def test_one_wild_round_moves_less_the_wilder_it_is(factor):
    before, wild, after = run([1.0, factor, 1.0])
    assert wild * factor == pytest.approx(GROWTH**2 / factor)  # the norm that is left
    assert (before, after) == (1.0, 1.0)


@pytest.mark.parametrize("factor", [2.0, 30.0, 1e4, 1e30])
def test_what_stays_large_counts_again(factor):
    needed = math.ceil(math.log(factor) / math.log(GROWTH))
    seen = run([1.0] + [factor] * (needed + 1))
    assert seen[1:] == sorted(seen[1:])
    assert seen[-1] == 1.0
    assert seen[1] < 1.0


def test_rare_examples_count():
    """Where nearly all rounds have nothing to teach, one of 300 does."""
    assert run(([1.0] + [1e-4] * 299) * 4) == [1.0] * 1200


@pytest.mark.parametrize("rise", [2.0, 16.0, 1000.0])
def test_more_steps_or_a_higher_rate_are_no_growth(rise):
    assert run([1.0, rise], [0.1, 0.1 * rise])[-1] == 1.0
    assert run([rise, 1.0, rise], [0.1 * rise, 0.1, 0.1 * rise])[-1] == 1.0  # one short round
    assert run([1.0, rise], [0.1, float("nan")])[-1] < 1.0
    assert run([1.0, 1.0, rise], [0.1, float("nan"), 0.1 * rise])[-1] == 1.0


def test_all_tensors_share_one_factor_and_new_ones_do_not_count():
    shared = {"dtype": torch.float64, "device": CPU, "num_particles": 2}
    states = [AdaState.zeros((2,), **shared), AdaState.zeros((5,), **shared), AdaState.zeros((), **shared)]
    states[0].norm_limit[:] = torch.tensor([3.0, 30.0])
    states[1].norm_limit[:] = torch.tensor([1.0, 10.0])
    grads = [torch.full((2, 2), 4.0), torch.zeros(2, 5), torch.full((2,), 1e9)]
    rounds = [torch.tensor([9, 9])] * 3
    factor = damping([g.double() for g in grads], states, rounds, [torch.zeros(2)] * 3)
    assert factor.tolist() == [pytest.approx(10 / 32), 1.0]


def test_sums_over_shards_are_those_over_all_tensors():
    def states():
        both = [AdaState.zeros((2,), 1, torch.float64, CPU) for _ in range(2)]
        for i, state in enumerate(both):
            state.norm_limit[:] = i + 1.0
        return both

    grads, unknown = [torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[0.0, 5.0]]).double()], torch.zeros(1)
    seen, late = [], torch.tensor([9])
    for grad, state in zip(grads, states(), strict=True):
        damping([grad], [state], [late], [unknown], total=lambda sums: seen.append(sums) or sums)
    whole = damping(grads, states(), [late] * 2, [unknown] * 2)
    assert damping([], [], [], [], total=lambda sums: sums + seen[0] + seen[1]).item() == whole.item() < 1


@pytest.mark.parametrize("wild", [1e3, 1e9, 1e25])
def test_a_wild_round_hardly_moves_an_optimizer(wild):
    param = torch.nn.Parameter(torch.zeros(4, 3))
    outer = LearnedOptimizer([param], AdaMLP.base_step())
    for factor in (1.0, 1.0, 1.0, wild):
        before = param.detach().clone()
        param.grad = factor * torch.ones(4, 3)
        outer.step()
    assert (param - before).norm() < 20 / wild * math.sqrt(12)
    before = param.detach().clone()
    param.grad = torch.ones(4, 3)
    outer.step()
    assert 0.1 < (before - param).norm() < 10


def test_the_same_wild_gradient_thrice_is_still_damped():
    param = torch.nn.Parameter(torch.zeros(3))
    outer = LearnedOptimizer([param], AdaMLP.base_step())
    for size in (1e-5, 1e-5, 1e15, 1e15, 1e15):
        param.grad = size * torch.ones(3)
        outer.step()
    assert param.abs().max() < 1e-4
