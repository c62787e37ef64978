"""The small models: they learn as replicas what they learn alone, and their tasks check their data."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from lightning_lopt.meta.local import LocalOptimizer
from lightning_lopt.meta.models import LanguageModel, VisionTransformer, image_conv, image_vit, language_model

LABELS = torch.arange(60) % 3
IMAGES = torch.rand(60, 8, 8, generator=torch.Generator().manual_seed(0)) + LABELS[:, None, None]
SMALL = {"width": 8, "depth": 1, "num_heads": 2}
TASKS = {
    "conv": lambda: image_conv(IMAGES, LABELS, channels=(4, 8), batch_size=10, num_validation=20),
    "vit": lambda: image_vit(IMAGES, LABELS, **SMALL, batch_size=10),
    "lm": lambda: language_model(torch.arange(600) ** 2 % 7, 7, context=9, **SMALL, batch_size=4),
}


@pytest.mark.parametrize("name", TASKS)
def test_replicas_learn_what_they_learn_alone(name):
    task, generator = TASKS[name](), torch.Generator().manual_seed(0)
    params, optimizer = task.init(3, generator), LocalOptimizer("adamw")
    alone, losses = {key: p[1:2].clone() for key, p in params.items()}, []
    state, state_alone, rates = optimizer.init(params), optimizer.init(alone), torch.full((3,), 1e-2)
    for _ in range(40):
        batch = task.batch(3, generator)
        losses.append(optimizer.step(task, params, batch, rates, state))
        if len(losses) <= 5:
            optimizer.step(task, alone, tuple(part[1:2] for part in batch), rates[:1], state_alone)
        if len(losses) == 5:
            for key, p in params.items():
                torch.testing.assert_close(p[1], alone[key][0], rtol=1e-3, atol=1e-4)
    assert losses[0].max() < task.max_loss
    assert (losses[-1] < losses[0] - 0.1).all()


def test_the_language_model_sees_no_later_token_and_is_trained_on_the_next():
    task = TASKS["lm"]()
    inputs, targets = task.data
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    model = LanguageModel(7, 9, 8, 1, 2)
    changed = inputs[:1].clone()
    changed[0, 5] = (changed[0, 5] + 1) % 7
    difference = (model(inputs[:1]) - model(changed)).abs().amax(-1)[0]
    assert torch.equal(difference[:5], torch.zeros(5))
    assert (difference[5:] > 0).all()
    assert task.max_loss == pytest.approx(1.5 * math.log(7))


def test_patches_are_patches():
    model = VisionTransformer((2, 4, 6), patch=2, width=8, depth=0, num_heads=1, num_classes=3)
    images, seen = torch.rand(1, 2, 4, 6), []
    model.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    functional_call(model, dict(model.named_parameters()), (images,))
    wanted = F.unfold(images, 2, stride=2).mT
    assert torch.equal(seen[0], wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: image_vit(IMAGES, LABELS, patch=3), "patches of side 3"),
        (lambda: image_vit(IMAGES, LABELS, width=10, num_heads=4), "must divide width=10"),
        (lambda: image_conv(IMAGES.flatten(1), LABELS), r"\[N, \(channels,\) height, width\]"),
        (lambda: image_conv(IMAGES, LABELS[:5]), "one label per image"),
        (lambda: language_model(torch.arange(500), 7), r"integers in \[0, 7\)"),
        (lambda: language_model(torch.zeros(10), 7), "there are 10"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
