"""Simulated rounds: workers that diverge are left out as of real ones."""

from __future__ import annotations

import pytest
import torch

from examples.benchmarks.compare import methods
from lightning_lopt import AdaMLP
from lightning_lopt.functional.outliers import OutlierFilter
from lightning_lopt.meta.local import LocalOptimizer
from lightning_lopt.meta.outer import average_anchors
from lightning_lopt.meta.simulation import Simulation, leave_out
from lightning_lopt.meta.tasks import ImageMLP

NAN = float("nan")


def _leave_out(filters, anchor, grads):
    """Two runs of three workers with one parameter; their weights and optimizer states afterwards."""
    anchor = {"p": torch.tensor(anchor)[:, None]}
    workers = {"p": (anchor["p"][:, None] - torch.tensor(grads)[..., None])}
    optimizer = LocalOptimizer("momentum")
    state = optimizer.init({"p": torch.zeros(6, 1)})
    state.steps += 1
    state.first["p"] += 1
    leave_out(filters, anchor, workers, state)
    return workers["p"][..., 0].tolist(), state


def test_the_others_mean_takes_the_place_of_who_is_left_out():
    filters = [OutlierFilter(), OutlierFilter()]
    workers, state = _leave_out(filters, [10.0, 0.0], [[1.0, NAN, 3.0], [-1.0, -2.0, -50.0]])
    assert workers == [[9.0, 8.0, 7.0], [1.0, 2.0, 1.5]]
    assert state.steps.tolist() == [1, 0, 1, 1, 1, 0]
    assert state.first["p"].flatten().tolist() == [1, 0, 1, 1, 1, 0]
    assert [each.num_left_out for each in filters] == [1, 1]


def test_the_norms_of_the_round_before_count():
    filters = [OutlierFilter(), OutlierFilter()]
    _leave_out(filters, [0.0, 0.0], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    workers, _ = _leave_out(filters, [0.0, 0.0], [[1.0, 20.0, 20.0], [20.0, 20.0, 20.0]])
    assert workers == [[-1.0, -1.0, -1.0], [-20.0, -20.0, -20.0]]  # in the second run all have changed alike
    assert [each.num_left_out for each in filters] == [2, 0]


def test_a_round_that_all_fail_keeps_the_anchor():
    filters = [OutlierFilter(), OutlierFilter()]
    workers, _ = _leave_out(filters, [5.0, 6.0], [[NAN, NAN, NAN], [1.0, 1.0, 1.0]])
    assert workers == [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]]
    assert [each.num_left_out for each in filters] == [3, 0]


@pytest.mark.parametrize("method", ["slowmo", "diloco", "fedadam", "learned"])
def test_a_round_that_all_fail_moves_nothing_and_is_not_remembered(method):
    """As if it had not been, in one of two runs; the other one goes on."""

    def train(fail):
        generator = torch.Generator().manual_seed(0)
        task = ImageMLP(torch.rand(60, 2, 3, generator=generator), torch.arange(60) % 3, hidden=(5,), batch_size=4)
        anchor = {name: torch.cat([p, p]) for name, p in task.init(1, generator).items()}
        options = {"learned": {}, "fedadam": {"lr": 0.01}}.get(method, {"lr": 0.5, "momentum": 0.9})
        outer = methods.outer([methods.Setting(method, 0.1, options)] * 2, anchor, AdaMLP.base_step())
        simulation, rates = Simulation(task, anchor, 2, outer), torch.full((2,), 0.1)
        for round_idx in range(4):
            images, labels = task.batch(4, generator)
            before = {name: a.clone() for name, a in anchor.items()}
            if round_idx == 2:
                if not fail:
                    continue
                images[:2] = NAN
            simulation.round([(images, labels)], rates, torch.full((2,), round_idx))
            for name, a in anchor.items():
                assert torch.equal(a[0], before[name][0]) == (round_idx == 2)
                assert not torch.equal(a[1], before[name][1])
        return {name: a[0] for name, a in anchor.items()}

    torch.testing.assert_close(train(True), train(False))


def test_a_batch_of_nan_costs_its_worker_a_round_and_no_more():
    generator = torch.Generator().manual_seed(0)
    task = ImageMLP(torch.rand(60, 2, 3, generator=generator), torch.arange(60) % 3, hidden=(5,), batch_size=4)
    anchor = task.init(1, generator)
    simulation = Simulation(task, anchor, 3, average_anchors, LocalOptimizer("adamw"))
    for round_idx in range(3):
        images, labels = task.batch(3, generator)
        if round_idx == 1:
            images[1] = NAN
        simulation.round([(images, labels)], torch.tensor([0.1]), torch.tensor([round_idx]))
        assert all(a.isfinite().all() for a in anchor.values())
    assert simulation.left_out == [1]
