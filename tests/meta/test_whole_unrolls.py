"""Whole unrolls: their horizons, and the same start and data for all copies."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_lopt.meta import Horizons, ImageMLP, LocalTraining
from lightning_lopt.meta.outer import average_anchors, base_step
from lightning_lopt.meta.whole_unrolls import Horizon, whole_unrolls


def make() -> ImageMLP:
    images = torch.rand(40, 6, generator=torch.Generator().manual_seed(3))
    return ImageMLP(images, torch.arange(40) % 4, hidden=(5,), batch_size=8)


def test_horizons_are_those_that_were_given():
    training, generator = LocalTraining(num_workers=3, local_steps=5), torch.Generator().manual_seed(0)
    horizons = Horizons(num_rounds=(20, 90), step_factors=(1, 4), num_workers=(2, 16), max_steps=400)
    found = {tuple(horizons.draw(training, generator)) for _ in range(300)}
    # 400 steps: 80 rounds of 5; 20 of 20, or of 5 by 16 workers; at least 10 rounds of 20 by 16 workers.
    wanted = {(5, k, t) for k in (2, 3) for t in (20, 80)} | {(5, 16, 20), (20, 2, 20), (20, 3, 20), (20, 16, 10)}
    assert found == wanted


@pytest.mark.parametrize("name", ["num_rounds", "step_factors", "num_workers"])
def test_bad_horizons_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must be choices of at least 1"):
        Horizons(**{name: (1, 0)})
    if name != "num_workers":
        with pytest.raises(ValueError, match=f"{name} must be choices"):
            Horizons(**{name: ()})
    with pytest.raises(ValueError, match="max_steps must be at least 1, not 0"):
        Horizons(max_steps=0)


def test_copies_share_all_but_their_step():
    task, training = make(), LocalTraining(2, 3, 0.3)

    def run(outer, seed: int, copies: int = 2) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        rates = training.draw_schedules(4, 12, torch.Generator().manual_seed(1))
        return whole_unrolls(task, training, Horizon(3, 2, 12), rates, copies, outer, generator)

    same = run(lambda anchor: average_anchors, 0)
    assert same.shape == (2, 4)
    torch.testing.assert_close(same[0], same[1])
    assert len(set(same[0].tolist())) == 4
    torch.testing.assert_close(run(lambda anchor: average_anchors, 0, copies=1)[0], same[0])
    assert (run(lambda anchor: average_anchors, 1) != same).all()
    assert (run(base_step, 0) < same).all()


def test_a_diverged_run_counts_the_largest_loss():
    task, training = make(), LocalTraining(2, 3, 0.3)
    rates = torch.full((1, 4), 1e30)
    found = whole_unrolls(
        task,
        training,
        Horizon(3, 2, 4),
        rates,
        1,
        lambda anchor: lambda *_: anchor["layers.0.bias"].fill_(torch.nan),
        torch.Generator().manual_seed(0),
    )
    assert found.item() == pytest.approx(1.3 * math.log(task.max_loss + 1e-3))
