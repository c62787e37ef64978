"""Workers that diverge are left out of simulated rounds as of real ones."""

from __future__ import annotations

import pytest
import torch

from examples.benchmarks.compare import methods
from examples.benchmarks.compare.methods import Local
from lightning_lopt import AdaMLP
from lightning_lopt.meta.guard import Guard
from lightning_lopt.meta.local import LocalOptimizer
from lightning_lopt.meta.outer import averaging
from lightning_lopt.meta.tasks import ImageMLP

NAN = float("nan")


def _check(guard, anchor, grads):
    """Two runs of three workers with one parameter; their weights and optimizer states after the guard."""
    anchor = {"p": torch.tensor(anchor)[:, None]}
    workers = {"p": (anchor["p"][:, None] - torch.tensor(grads)[..., None])}
    optimizer = LocalOptimizer("momentum")
    state = optimizer.init({"p": torch.zeros(6, 1)})
    state.steps += 1
    state.first["p"] += 1
    guard.check(anchor, workers, state)
    return workers["p"][..., 0].tolist(), state


def test_the_others_mean_takes_the_place_of_who_is_left_out():
    guard = Guard(2, 3)
    workers, state = _check(guard, [10.0, 0.0], [[1.0, NAN, 3.0], [-1.0, -2.0, -50.0]])
    assert workers == [[9.0, 8.0, 7.0], [1.0, 2.0, 1.5]]
    assert state.steps.tolist() == [1, 0, 1, 1, 1, 0]
    assert state.first["p"].flatten().tolist() == [1, 0, 1, 1, 1, 0]
    assert guard.left_out == [1, 1]


def test_the_norms_of_the_round_before_count():
    guard = Guard(2, 3)
    _check(guard, [0.0, 0.0], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    workers, _ = _check(guard, [0.0, 0.0], [[1.0, 20.0, 20.0], [20.0, 20.0, 20.0]])
    assert workers == [[-1.0, -1.0, -1.0], [-20.0, -20.0, -20.0]]  # in the second run all have changed alike
    assert guard.left_out == [2, 0]


def test_a_round_that_all_fail_keeps_the_anchor():
    guard = Guard(2, 3)
    workers, _ = _check(guard, [5.0, 6.0], [[NAN, NAN, NAN], [1.0, 1.0, 1.0]])
    assert workers == [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]]
    assert guard.left_out == [3, 0]


@pytest.mark.parametrize("method", ["slowmo", "diloco", "fedadam", "learned"])
def test_a_round_that_all_fail_moves_nothing_and_is_not_remembered(method):
    """As if it had not been, in one of two runs; the other one goes on."""

    def train(fail):
        generator = torch.Generator().manual_seed(0)
        task = ImageMLP(torch.rand(60, 2, 3, generator=generator), torch.arange(60) % 3, hidden=(5,), batch_size=4)
        anchor = {name: torch.cat([p, p]) for name, p in task.init(1, generator).items()}
        options = {"learned": {}, "fedadam": {"lr": 0.01}}.get(method, {"lr": 0.5, "momentum": 0.9})
        outer = methods.outer([methods.Setting(method, 0.1, options)] * 2, anchor, AdaMLP.base_step())
        local, rates = Local(task, anchor, 2, LocalOptimizer("sgd"), outer), torch.full((2,), 0.1)
        for round_idx in range(4):
            images, labels = task.batch(4, generator)
            before = {name: a.clone() for name, a in anchor.items()}
            if round_idx == 2:
                if not fail:
                    continue
                images[:2] = NAN
            local.round(iter([(images, labels)]), rates, round_idx)
            for name, a in anchor.items():
                assert torch.equal(a[0], before[name][0]) == (round_idx == 2)
                assert not torch.equal(a[1], before[name][1])
        return {name: a[0] for name, a in anchor.items()}

    torch.testing.assert_close(train(True), train(False))


def test_a_batch_of_nan_costs_its_worker_a_round_and_no_more():
    generator = torch.Generator().manual_seed(0)
    task = ImageMLP(torch.rand(60, 2, 3, generator=generator), torch.arange(60) % 3, hidden=(5,), batch_size=4)
    anchor = task.init(1, generator)
    optimizer = LocalOptimizer("adamw")
    method = Local(task, anchor, 3, optimizer, averaging(anchor))
    for round_idx in range(3):
        images, labels = task.batch(3, generator)
        if round_idx == 1:
            images[1] = NAN
        method.round(iter([(images, labels)]), torch.tensor([0.1]), round_idx)
        assert all(a.isfinite().all() for a in anchor.values())
    assert method.left_out == [1]
