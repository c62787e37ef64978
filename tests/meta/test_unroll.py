"""Simulated rounds against the authors' code."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt.meta.tasks import ImageMLP
from lightning_lopt.meta.unroll import local_round, outer_step, zero_states
from tests.golden import golden_network


def golden_params(data, round_idx: int) -> dict[str, torch.Tensor]:
    params = {}
    for i in range(3):
        params[f"layers.{i}.weight"] = torch.from_numpy(data[f"params/w{i}"][round_idx]).double().mT.clone()
        params[f"layers.{i}.bias"] = torch.from_numpy(data[f"params/b{i}"][round_idx]).double()
    return params


@pytest.mark.parametrize("name", ["local_sgd", "lopt_a", "lagg_a"])
def test_rounds_equal_the_authors_in_every_particle(vectors, name):
    data = vectors(f"rounds_{name}.npz")
    num_workers, num_particles = int(data["K"]), 2
    images = torch.from_numpy(data["batches_x"]).double()
    labels = torch.from_numpy(data["batches_y"]).long()
    task = ImageMLP(images.flatten(0, 3), labels.flatten(), hidden=(10, 7), batch_size=8, num_classes=4)
    anchor = {key: torch.stack([p] * num_particles) for key, p in golden_params(data, 0).items()}
    states = zero_states(anchor, "published")
    local_lr = torch.full((num_particles,), float(data["gamma"]), dtype=torch.float64)
    network = None if name == "local_sgd" else repeat(golden_network(data, torch.float64), num_particles)

    for t in range(len(images)):
        batches = [
            (images[t, :, h].repeat(num_particles, 1, 1), labels[t, :, h].repeat(num_particles, 1)) for h in range(4)
        ]
        workers, losses = local_round(task, anchor, batches, local_lr, num_workers)
        if network is None:
            anchor = {key: w.mean(1) for key, w in workers.items()}
        else:
            outer_step(anchor, workers, states, network, torch.full((num_particles,), t))
        loss = losses.mean((0, 2))
        torch.testing.assert_close(loss, torch.full_like(loss, float(data["loss"][t])), rtol=0, atol=1e-11)
        for key, wanted in golden_params(data, t + 1).items():
            torch.testing.assert_close(anchor[key], wanted.expand_as(anchor[key]), rtol=0, atol=1e-11)


def repeat(network, num_particles):
    """The same meta-parameters for every particle."""

    def copies(tensor):
        return tensor.expand(num_particles, *tensor.shape[1:])

    return network._replace(
        weights=tuple(map(copies, network.weights)),
        biases=tuple(map(copies, network.biases)),
        decays=type(network.decays)(*map(copies, network.decays[:3])),
    )
