"""LAgg-A from LOpt-A: the same steps where the workers' norms are equal, and nearly the same losses elsewhere."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt import AdaMLP
from lightning_lopt.meta import Evaluation, ImageMLP, LocalTraining, with_worker_inputs
from lightning_lopt.meta.outer import SimulatedRound, learned_step


def evaluation(num_workers: int = 4, num_rounds: int = 40) -> Evaluation:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (400,), generator=generator)
    images = torch.rand(400, 4, 4, generator=generator) + labels[:, None, None] / 4
    task = ImageMLP(images, labels, hidden=(8,), batch_size=8)
    return Evaluation("small", task, LocalTraining(num_workers, 4, 0.3), num_rounds=num_rounds, num_runs=2)


def column_sum(network: AdaMLP, count: int) -> torch.Tensor:
    return network.layers[0].weight[:, :count].sum(1)


def test_workers_of_one_norm_make_the_same_step():
    """Only where every worker has c times the norm of the mean is the copy exact; here c is known."""
    network, num_workers = AdaMLP(seed=0), 2
    copy = with_worker_inputs(network, evaluation(num_workers))
    measured = (column_sum(copy, num_workers) / column_sum(network, 1))[0].item()
    mean, spread = torch.tensor([3.0, -3.0, 3.0, -3.0]), torch.tensor([4.0, 4.0, -4.0, -4.0])
    workers = {"w": -torch.stack([mean + spread, mean - spread]).unsqueeze(0)}  # rms 5, that of their mean 3
    with torch.no_grad():
        copy.layers[0].weight[:, :num_workers] *= 5 / 3 / measured
    ends = []
    for each in (network, copy):
        anchor = {"w": torch.zeros(1, 4)}
        step = learned_step(anchor, [each])
        step(anchor, SimulatedRound(workers, torch.tensor([2]), torch.tensor([0.3]), 4, 0.0, ()))
        ends.append(anchor["w"])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=0)  # the published epsilon of 1e-5 is not scaled
    assert ends[0].abs().min() > 1e-6


def test_the_copy_begins_at_the_loss_of_its_original():
    own, network = evaluation(), AdaMLP.bundled("lopt_a_short")
    copy = with_worker_inputs(network, own)
    ratio = column_sum(copy, 4) / column_sum(network, 1)
    torch.testing.assert_close(ratio, ratio[:1].expand(32))
    assert 1.1 < ratio[0] < 2  # of 4 workers: 1 if they agree, 2 if they are independent
    losses, ours = own.losses(network), own.losses(copy)
    progress = losses[0] - losses[-1]
    assert (progress > 0.05).all()
    # With columns of other weights: 0.026 and more; without the pseudo-gradients, too.
    assert ((ours - losses).abs() < 0.02 * progress).all()


@pytest.mark.parametrize("network", [AdaMLP(4), AdaMLP.base_step()])
def test_other_networks_are_refused(network):
    with pytest.raises(ValueError, match="must see the mean of the workers"):
        with_worker_inputs(network, evaluation())
