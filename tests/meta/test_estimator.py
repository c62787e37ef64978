"""Windows over particles: what is shared within a pair, where unrolls restart, what the estimate is worth."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lightning_lopt import AdaMLP
from lightning_lopt.meta.base import AbstractTask
from lightning_lopt.meta.estimator import Estimator
from lightning_lopt.meta.local import LocalTraining
from lightning_lopt.meta.particles import Particles
from lightning_lopt.meta.tasks import ImageMLP
from lightning_lopt.meta.truncation import LogUniform


def make(dtype=torch.float32, training=None, **keywords) -> Estimator:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 9, generator=generator, dtype=dtype)
    task = ImageMLP(images, (images.sum(1) * 100).long() % 3, hidden=(4,), batch_size=5)
    training = LocalTraining(num_workers=2, **{"local_steps": [1, 2], "local_lr": (0.1, 1.0), **(training or {})})
    settings = {"num_particles": 3, "unroll_length": LogUniform(4, 9), "meta_loss": "local", "seed": 0}
    particles = Particles(task, training, **{name: keywords.pop(name, value) for name, value in settings.items()})
    return Estimator(
        particles, **{"kind": "pes", "truncation": 6, "sigma": 0.01, "log_floor": None, "seed": 0, **keywords}
    )


def test_an_unperturbed_pair_has_no_gradient():
    window = make(sigma=1e-12, dtype=torch.float32).window(AdaMLP(seed=0), 0)
    assert all(not g.any() for g in window.gradient.values())
    assert window.rounds == 6 * 6


def test_windows_depend_on_seed_and_iteration_alone():
    network = AdaMLP(seed=0)
    first, again, other = (make(seed=seed).window(network, 0) for seed in (1, 1, 2))
    torch.manual_seed(7)
    assert first.loss == again.loss != other.loss
    assert all(torch.equal(g, again.gradient[name]) for name, g in first.gradient.items())


def test_state_dict_goes_on_bitwise_and_is_a_snapshot():
    network, one, two = AdaMLP(seed=0), make(), make()
    for iteration in range(3):
        one.window(network, iteration)
    state = copy.deepcopy(one.state_dict())
    two.load_state_dict(state)
    for iteration in range(3, 6):
        ours, theirs = one.window(network, iteration), two.window(network, iteration)
        assert ours.loss == theirs.loss
        assert all(torch.equal(g, theirs.gradient[name]) for name, g in ours.gradient.items())


def test_losses_are_clipped_and_diverged_ones_count_as_the_worst():
    limit = 1.5 * math.log(3)
    clipped = make()._clip(torch.tensor([0.5, 9.0, torch.nan, torch.inf]))
    torch.testing.assert_close(clipped, torch.tensor([0.5, limit, limit, limit]))


def test_a_task_that_diverges_gives_a_finite_gradient():
    window = make(training={"local_lr": 1e20}).window(AdaMLP(seed=0), 0)
    assert math.isfinite(window.loss)
    assert all(g.isfinite().all() for g in window.gradient.values())


def test_gradient_points_along_the_finite_difference():
    """Along its own direction, the mean of independent estimates is the slope of the loss within 4 standard errors."""
    network = AdaMLP(seed=0, step_mult=0.01).double()
    settings = {
        "truncation": 3,
        "unroll_length": LogUniform(3, 3),
        "num_particles": 64,
    }

    def fresh(sigma: float, seed: int) -> Estimator:
        training = {"local_steps": 1, "local_lr": 0.3}
        estimator = make(torch.float64, training=training, sigma=sigma, seed=seed, **settings)
        estimator.particles.length[:] = 3  # not out of phase: every window is a whole unroll
        return estimator

    estimates = [fresh(1e-3, seed).window(network, 0).gradient for seed in range(24)]
    flat = torch.stack([torch.cat([g.flatten() for g in gradient.values()]) for gradient in estimates])
    direction = flat[:12].mean(0) / flat[:12].mean(0).norm()
    slopes = flat[12:] @ direction

    def loss_at(distance: float, seed: int) -> float:
        moved = copy.deepcopy(network)
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(moved.parameters()).detach() + distance * direction, moved.parameters()
        )
        return fresh(1e-12, seed).window(moved, 0).loss

    wanted = sum((loss_at(1e-3, s) - loss_at(-1e-3, s)) / 2e-3 for s in range(12, 24)) / 12
    error = slopes.std().item() / len(slopes) ** 0.5
    assert wanted > 0
    assert abs(slopes.mean().item() - wanted) < 4 * error


class Bowl(AbstractTask):
    """½ |x|² from x = 1: without data or chance, so that unrolls have an exact gradient."""

    device, dtype, max_loss = torch.device("cpu"), torch.float64, 10.0

    def to(self, device):
        return self

    def init(self, num_replicas, generator):
        return {"x": torch.ones(num_replicas, 3, dtype=self.dtype)}

    def draw(self, num_replicas, generator):
        return torch.zeros(num_replicas, 1)

    def read(self, drawn):
        return (drawn,)

    def loss(self, params, batch):
        return 0.5 * params["x"].square().sum(1)


def bowl_estimator(kind: str, num_particles: int, sigma: float, log_floor: float | None) -> Estimator:
    training = LocalTraining(num_workers=1, local_steps=1, local_lr=0.05)
    particles = Particles(Bowl(), training, num_particles, LogUniform(7, 7), "local", seed=0)
    return Estimator(particles, kind, truncation=3, sigma=sigma, log_floor=log_floor, seed=0)


@pytest.mark.parametrize(
    ("kind", "log_floor"), [("pes", None), ("pes", 1e-3), ("published_pes", None), ("truncated_es", None)]
)
def test_slope_of_whole_unrolls_with_resets_inside_windows(kind, log_floor):
    """Unrolls of 7 rounds in windows of 3, out of phase: only the PES mean is the slope, within 4 standard errors."""
    network = AdaMLP(seed=2, step_mult=0.03).double()
    start = torch.nn.utils.parameters_to_vector(network.parameters()).detach()

    def objective(theta) -> float:
        moved = copy.deepcopy(network)
        torch.nn.utils.vector_to_parameters(theta, moved.parameters())
        estimator = bowl_estimator("pes", 1, 1e-12, log_floor)
        estimator.particles.length[:] = 7
        losses = [estimator.particles.round(repeated(moved), 1, [torch.Generator()])[0].item() for _ in range(7)]
        return sum(x if log_floor is None else math.log(x + log_floor) for x in losses) / 7

    estimator = bowl_estimator(kind, 256, 1e-4, log_floor)
    windows = [estimator.window(network, i).gradient for i in range(84)][14:]
    flat = torch.stack([torch.cat([g.flatten() for g in gradient.values()]) for gradient in windows])
    direction = torch.zeros_like(start)
    direction[-9] = 1.0  # the bias of the direction output: all coordinates step further
    slopes = (flat @ direction).view(-1, 7).mean(1)
    wanted = (objective(start + 1e-5 * direction) - objective(start - 1e-5 * direction)) / 2e-5
    assert wanted != 0
    error = slopes.std().item() / len(slopes) ** 0.5
    assert (abs(slopes.mean().item() - wanted) < 4 * error) == (kind == "pes")
    assert error < 0.1 * abs(wanted)


def repeated(network: AdaMLP):
    return network.functional({name: torch.stack([p.detach()] * 2) for name, p in network.named_parameters()})


def test_truncated_es_starts_both_signs_from_one_state():
    estimator, network = make(kind="truncated_es"), AdaMLP(seed=0)
    for iteration in range(3):
        estimator.window(network, iteration)
        for anchor in estimator.particles.anchor.values():
            pos, neg = anchor.chunk(2)
            assert torch.equal(pos, neg)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"truncation": 0}, "truncation must be at least 1"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"kind": "es"}, "estimator must be one of"),
    ],
)
def test_bad_arguments_are_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        make(**keywords)


def test_a_checkpoint_of_another_task_is_refused():
    with pytest.raises(ValueError, match=r"The checkpoint is of ImageMLP\(60 images, 9-4-3.* with 3 particles"):
        make(num_particles=2).load_state_dict(make().state_dict())
