"""The image MLP: its written-out backward pass against autograd, its batches, its errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_lopt.meta.base import AbstractTask
from lightning_lopt.meta.tasks import ImageMLP


def make(hidden=(7, 5), dtype=torch.float64, **keywords) -> ImageMLP:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(40, 6, 4, generator=generator, dtype=dtype)
    return ImageMLP(images, torch.arange(40) % 4, hidden=hidden, **{"batch_size": 8, **keywords})


@pytest.mark.parametrize("hidden", [(), (7,), (7, 5), (6, 6, 6)])
def test_sgd_step_equals_autograd_with_a_rate_per_replica(hidden):
    task, generator = make(hidden), torch.Generator().manual_seed(0)
    params = task.init(3, generator)
    batch = task.batch(3, generator)
    local_lr = torch.tensor([0.1, 0.0, 2.0], dtype=torch.float64)

    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    wanted_loss = task.loss(leaves, batch)
    wanted_loss.sum().backward()
    loss = task.sgd_step(params, batch, local_lr)

    torch.testing.assert_close(loss, wanted_loss.detach(), rtol=0, atol=1e-14)
    for name, leaf in leaves.items():
        rate = local_lr.view(-1, *[1] * (leaf.dim() - 1))
        torch.testing.assert_close(params[name], leaf.detach() - rate * leaf.grad, rtol=0, atol=1e-14)


def test_loss_is_that_of_an_ordinary_mlp():
    task, generator = make(), torch.Generator().manual_seed(0)
    params = task.init(2, generator)
    images, labels = task.batch(2, generator)
    for replica in range(2):
        hidden = images[replica]
        for i in range(3):
            hidden = F.linear(
                hidden.relu() if i else hidden,
                params[f"layers.{i}.weight"][replica],
                params[f"layers.{i}.bias"][replica],
            )
        wanted = F.cross_entropy(hidden, labels[replica])
        torch.testing.assert_close(task.loss(params, (images, labels))[replica], wanted, rtol=0, atol=1e-14)


def test_batches_are_images_with_their_labels():
    images = torch.arange(20, dtype=torch.float64).view(20, 1, 1)
    task = ImageMLP(images, torch.arange(20), batch_size=6)
    seen_images, seen_labels = task.batch(50, torch.Generator().manual_seed(0))
    assert seen_images.shape == (50, 6, 1)
    assert torch.equal(seen_images.squeeze(-1).long(), seen_labels)
    assert all(len(set(row.tolist())) == 6 for row in seen_labels)
    assert len(set(seen_labels.flatten().tolist())) == 20


def test_uint8_is_scaled_and_images_are_resized_by_area():
    images = torch.zeros(4, 4, 4, dtype=torch.uint8)
    images[:, :2, :2] = 255
    task = ImageMLP(images, torch.arange(4), batch_size=1, size=2)
    assert torch.equal(task.images, torch.tensor([1.0, 0, 0, 0]).expand(4, 4))
    assert task.sizes == (4, 128, 128, 4)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"images": torch.zeros(0, 8, 8), "labels": torch.zeros(0)}, "N >= 1"),
        ({"labels": torch.zeros(3)}, "one label per image"),
        ({"images": torch.zeros(4, 8, 8, dtype=torch.long)}, "uint8 or floating"),
        ({"images": torch.full((4, 8, 8), torch.nan)}, "not finite"),
        ({"labels": torch.tensor([0, 1, 2, -1])}, "run from -1 to 2"),
        ({"num_classes": 2}, "run from 0 to 3"),
        ({"batch_size": 5}, "between 1 and the number of examples 4"),
        ({"batch_size": 0}, "between 1 and the number of examples 4"),
        ({"hidden": (4, 0)}, "hidden must be widths"),
        ({"hidden": 32}, "hidden must be widths"),
        ({"num_validation": 1}, "num_validation must be 0 or at least batch_size=2"),
        ({"num_validation": 3}, "between 1 and the number of examples 1"),
        ({"images": torch.zeros(4, 64), "size": 4}, "can be resized"),
    ],
)
def test_bad_input_is_named(keywords, message):
    good = {"images": torch.zeros(4, 8, 8), "labels": torch.arange(4), "batch_size": 2}
    with pytest.raises(ValueError, match=message):
        ImageMLP(**{**good, **keywords})


@pytest.mark.parametrize("hidden", [(), (7,), (7, 5)])
def test_the_written_out_gradient_equals_the_generic_one(hidden):
    task, generator = make(hidden), torch.Generator().manual_seed(0)
    params, batch = task.init(3, generator), task.batch(3, generator)
    loss, grads = task.loss_and_grad(params, batch)
    wanted_loss, wanted = AbstractTask.loss_and_grad(task, params, batch)
    torch.testing.assert_close(loss, wanted_loss, rtol=0, atol=1e-14)
    assert list(grads) == list(params)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=0, atol=1e-14)


def test_the_generic_sgd_step_equals_the_fused_one():
    task, generator = make(), torch.Generator().manual_seed(0)
    params, batch = task.init(3, generator), task.batch(3, generator)
    generic, rates = {name: p.clone() for name, p in params.items()}, torch.tensor([0.1, 0.0, 2.0]).double()
    loss = task.sgd_step(params, batch, rates)
    torch.testing.assert_close(AbstractTask.sgd_step(task, generic, batch, rates), loss, rtol=0, atol=1e-14)
    for name, p in params.items():
        torch.testing.assert_close(p, generic[name], rtol=0, atol=1e-14)


def test_validation_images_are_held_out():
    images = torch.arange(20, dtype=torch.float64).view(20, 1, 1)
    task, generator = ImageMLP(images, torch.arange(20), batch_size=3, num_validation=6), torch.Generator()
    training, validation = (
        {int(x) for x in each.batch(200, generator)[1].flatten()} for each in (task, task.validation)
    )
    assert len(training) == 14
    assert len(validation) == 6
    assert not training & validation
