"""Objectives of the second list: replicas learn them, and each asks for what it says."""

from __future__ import annotations

import pytest
import torch

from examples.benchmarks.compare import objectives
from lightning_lopt.meta.local import LocalOptimizer

GENERATOR = torch.Generator().manual_seed(0)
CODES = torch.arange(2000) % 7
IMAGES = torch.rand(100, 1, 8, 8, generator=GENERATOR).cumsum(2) / 8
LABELS = torch.arange(100) % 10
SHOWN = IMAGES + LABELS.view(-1, 1, 1, 1)
TASKS = {
    "contrastive": lambda: objectives.contrastive(IMAGES, 8, "halves"),
    "diffusion": lambda: objectives.diffusion(IMAGES.flatten(1), 32, 2, 8, "noise"),
    "factorisation": lambda: objectives.factorisation(IMAGES[:10].flatten(1), 4, 32, "factors"),
    "distillation": lambda: objectives.distillation(SHOWN.flatten(1), LABELS, 16, 8, "student"),
    "residual": lambda: objectives.residual(SHOWN, LABELS, 4, 8, "residual"),
    "masked_patches": lambda: objectives.masked_patches(IMAGES, 4, 8, 8, "masked"),
    "which_text": lambda: objectives.which_text([CODES, CODES.flip(0)], 7, 8, "text"),
    "next_word": lambda: objectives.next_word(CODES, 7, 8, 8, "word"),
    "recurrent": lambda: objectives.recurrent(CODES, 7, 10, 8, 8, "recurrent"),
}


@pytest.mark.parametrize("name", TASKS)
def test_replicas_learn_the_objective(name):
    task, generator = TASKS[name](), torch.Generator().manual_seed(1)
    params, optimizer = task.init(2, generator), LocalOptimizer("adamw")
    state = optimizer.init(params)
    losses = [optimizer.step(task, params, task.batch(2, generator), torch.full((2,), 1e-2), state) for _ in range(60)]
    assert torch.stack(losses[-10:]).mean(0).lt(0.9 * torch.stack(losses[:3]).mean(0)).all()


def test_only_masked_patches_count_and_they_are_hidden():
    inputs, patches, mask = TASKS["masked_patches"]().data
    assert inputs.shape[1:] == (4, 17)
    assert mask.sum(1).eq(2).all()
    assert torch.equal(inputs[..., :-1], patches * (1 - mask))
    assert torch.equal(inputs[..., -1:], mask)


def test_noise_is_what_the_angle_leaves_of_the_image():
    inputs, noise = TASKS["diffusion"]().data
    noisy, angle = inputs.split([64, 1], 1)
    clean = (noisy - angle.sin() * noise) / angle.cos()
    distances = torch.cdist(clean[angle.squeeze() < 1], IMAGES.flatten(1))
    assert distances.min(1).values.max() < 1e-2


def test_halves_are_told_apart_within_a_block():
    task = TASKS["contrastive"]()
    towers = objectives.TwoTowers(32, block=8)
    towers.towers[1].load_state_dict(towers.towers[0].state_dict())
    twins = torch.rand(16, 4, 8, generator=GENERATOR).repeat(1, 2, 1)
    logits = towers(twins)
    assert logits.shape == (2, 8, 8)
    assert torch.allclose(logits.diagonal(dim1=1, dim2=2), torch.tensor(10.0))
    assert task._loss(100 * torch.eye(8).expand(2, 8, 8)) == 0


def test_the_unit_is_that_of_torch():
    module = objectives.Recurrent(7, 8)
    cell = torch.nn.GRUCell(8, 8)
    with torch.no_grad():
        for part, own in (("ih", module.from_input), ("hh", module.from_hidden)):
            getattr(cell, f"weight_{part}").copy_(own.weight)
            getattr(cell, f"bias_{part}").copy_(own.bias)
    tokens = CODES[:20].view(2, 10)
    hidden = torch.zeros(2, 8)
    for token in tokens.T:
        hidden = cell(module.tokens[token], hidden)
    assert torch.allclose(module(tokens)[:, -1], module.head(hidden), atol=1e-6)
