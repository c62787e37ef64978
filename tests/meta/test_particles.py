"""Particles: common starts and data of a pair, restarts of unrolls, losses of rounds, parts of several processes."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt import AdaMLP
from lightning_lopt.meta.local import LocalOptimizer, LocalTraining
from lightning_lopt.meta.particles import Particles
from lightning_lopt.meta.tasks import ImageMLP
from lightning_lopt.meta.truncation import LogUniform


def make_task(**keywords) -> ImageMLP:
    images = torch.rand(60, 9, generator=torch.Generator().manual_seed(0))
    return ImageMLP(images, (images.sum(1) * 100).long() % 3, hidden=(4,), batch_size=5, **keywords)


def make(task=None, meta_loss="local", num_particles=3, **training) -> Particles:
    local = LocalTraining(**{"num_workers": 2, "local_lr": (0.1, 1.0), "decay_share": 0.5, **training})
    return Particles(task or make_task(), local, num_particles, LogUniform(4, 9), meta_loss, seed=0)


def network(num_particles=3, spread=0.02):
    """θ ± ε."""
    generator = torch.Generator().manual_seed(1)
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(num_particles)
    theta = {}
    for name, p in AdaMLP(seed=0, step_mult=0.1).named_parameters():
        noise = spread * torch.randn(num_particles, *p.shape, generator=generator).repeat(2, *[1] * p.dim())
        theta[name] = p.detach() + signs.view(-1, *[1] * p.dim()) * noise
    return AdaMLP(seed=0, step_mult=0.1).functional(theta)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
def test_unrolls_restart_one_by_one_from_fresh_parameters_common_to_the_pair(kind):
    particles, meta, restarted = make(num_particles=6, optimizer=LocalOptimizer(kind)), network(6), 0
    for t in range(24):
        generators = particles.generators(t)
        particles.round(meta, 1, generators)
        fresh = particles.restart_finished(generators)
        assert torch.equal(fresh, particles.round_idx == 0)
        assert (particles.round_idx < particles.length).all()
        restarted += int(fresh.sum())
        for name, anchor in particles.anchor.items():
            pos, neg = anchor.chunk(2)
            assert torch.equal(pos[fresh], neg[fresh])
            assert not torch.equal(pos[~fresh], neg[~fresh])
            momentum = particles.simulation.outer.states[name].momentum
            assert not momentum[fresh.repeat(2)].any()
            assert momentum[~fresh.repeat(2)].any()
        steps = particles.round_idx.repeat(2).repeat_interleave(2)
        local = particles.simulation.local
        assert torch.equal(local.steps, steps)
        for accumulators in (local.first, local.second):
            for tensor in accumulators.values():
                assert torch.equal(tensor.flatten(1).any(1), steps > 0)
    assert restarted > 12


def test_the_local_rate_decays_to_zero_along_a_cosine():
    particles = make()
    particles.base_lr, particles.length = torch.tensor([0.4, 0.4, 0.4]), torch.tensor([8, 8, 8])
    particles.decays = torch.tensor([True, True, False])
    particles.round_idx = torch.tensor([0, 4, 4])
    torch.testing.assert_close(particles.local_lr(), torch.tensor([0.4, 0.2, 0.4]))


def test_the_updated_loss_is_that_of_the_anchor_on_fresh_data():
    particles, meta, generators = make(meta_loss="updated"), network(), make().generators(0)
    twin, twin_generators = make(), make().generators(0)
    loss = particles.round(meta, 2, generators)
    twin.round(meta, 2, twin_generators)
    for i in range(3):
        batch = tuple(part.flatten(0, 1)[None] for part in twin.task.batch(2, twin_generators[i]))
        for sign in (i, i + 3):
            anchor = {name: p[sign : sign + 1] for name, p in twin.anchor.items()}
            torch.testing.assert_close(loss[sign], twin.task.loss(anchor, batch)[0])


def test_the_validation_loss_sees_no_training_data():
    task = make_task(num_validation=10)
    particles, twin = (make(task, meta_loss=name) for name in ("validation", "local"))
    loss, generators = particles.round(network(), 1, particles.generators(0)), twin.generators(0)
    twin.round(network(), 1, generators)
    task.images.fill_(torch.nan)
    for i in range(3):
        batch = tuple(part.flatten(0, 1)[None] for part in task.validation.batch(2, generators[i]))
        anchor = {name: p[i : i + 1] for name, p in twin.anchor.items()}
        torch.testing.assert_close(loss[i], task.loss(anchor, batch)[0])
    with pytest.raises(ValueError, match="has no validation data"):
        make(meta_loss="validation")


def test_a_particle_does_not_depend_on_the_others():
    """What one process simulates equals what any other does, which sharing particles among processes rests on."""
    many, few = make(num_particles=5), make(num_particles=3)
    assert torch.equal(many.base_lr[:3], few.base_lr)
    for name, anchor in few.anchor.items():
        assert torch.equal(many.anchor[name][:3], anchor[:3])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="num_particles must be at least 1"):
        make(num_particles=0)
    with pytest.raises(ValueError, match="meta_loss must be one of"):
        make(meta_loss="test")
    task = make_task()
    task.images.fill_(torch.inf)
    with pytest.raises(ValueError, match="before the first step"):
        make(task)


def test_a_state_of_another_version_or_training_is_refused():
    with pytest.raises(ValueError, match="of version None, but this code reads"):
        make().load_state_dict({})
    with pytest.raises(ValueError, match=r"num_workers=2.*num_workers=3"):
        make(num_workers=3).load_state_dict(make().state_dict())
