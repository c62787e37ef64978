"""Recipes of examples/meta_train.py: distributions of tasks, networks and hyperparameters."""

from __future__ import annotations

import argparse
import copy
import datetime
import inspect
import random
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lopt import AdaMLP
from lightning_lopt.meta import (
    AbstractTask,
    Evaluation,
    ImageMLP,
    LocalOptimizer,
    LocalTraining,
    LogUniform,
    ModuleTask,
    image_vit,
    language_model,
    with_worker_inputs,
)
from lightning_lopt.meta.local import OptimizerKind
from lightning_lopt.meta.tasks import resize

Images = tuple[Tensor, Tensor]
Pairs = Sequence[tuple[AbstractTask, LocalTraining]]


@dataclass(frozen=True)
class Recipe:
    """Arguments of `MetaTraining` and the Trainer.

    Attributes:
        tasks: Tasks, each with its local training.
        network: Network to train, at its initialisation.
        steps: Steps of the meta-optimizer.
        windows: Windows accumulated in each step.
        options: Further arguments of `MetaTraining`.
    """

    tasks: Pairs
    network: AdaMLP
    steps: int
    windows: int = 1
    options: dict[str, Any] = field(default_factory=dict)


Maker = Callable[[Sequence[Images], int], Recipe]  # of the data and a seed


def regression(sizes: Sequence[int], batch_size: int, noise: float, seed: int, spread: float = 0.7) -> ModuleTask:
    """A ReLU MLP fits a teacher with inputs of unequal scale and noise, by mean squared error; targets have variance 1.

    Args:
        sizes: Widths of all layers; the last is 1.
        batch_size: Samples per local step.
        noise: Standard deviation of the noise of the targets.
        seed: Seed of the data.
        spread: Standard deviation of the logarithm of an input's scale.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2000, sizes[0], generator=generator)
    inputs *= torch.exp(spread * torch.randn(sizes[0], generator=generator))
    teacher = torch.randn(sizes[0], 6, generator=generator) * sizes[0] ** -0.5
    targets = torch.tanh(2 * inputs @ teacher).sum(1, keepdim=True)
    targets += noise * torch.randn(targets.shape, generator=generator)

    def make() -> nn.Module:
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    name = f"regression {'-'.join(map(str, sizes))}"
    return ModuleTask(make, (inputs, targets / targets.std()), F.mse_loss, batch_size, max_loss=3.0, name=name)


class LowRank(nn.Module):
    """A frozen linear layer plus a product of two factors of rank 2, of which the second begins at 0, as in LoRA."""

    weight: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", linear.bias.detach())
        self.down = nn.Parameter(torch.randn(2, linear.in_features) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.bias) + inputs @ self.down.T @ self.up.T


def fine_tuning(data: Images, batch_size: int, low_rank: bool = False) -> ModuleTask:
    """An MLP that has learned half of the images, at 8×8, goes on with the others, mirrored.

    Args:
        data: Images and labels.
        batch_size: Samples per local step.
        low_rank: Whether the hidden layers are frozen and `LowRank` changes of them are trained.
    """
    images, labels = resize(data[0].float() / 255, 8).flatten(1), data[1].long()
    half = len(images) // 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden, head = (nn.Linear(64, 24), nn.Linear(24, 24)), nn.Linear(24, 10)
        model = nn.Sequential(hidden[0], nn.ReLU(), hidden[1], nn.ReLU(), head)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(400):
            chosen = torch.randint(half, (64,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
        if low_rank:
            model = nn.Sequential(LowRank(hidden[0]), nn.ReLU(), LowRank(hidden[1]), nn.ReLU(), head)
    mirrored = images.unflatten(1, (8, 8)).flip(2).flatten(1)
    name = "low-rank fine-tuning" if low_rank else "fine-tuning"
    rest = mirrored[half:], labels[half:]
    return ModuleTask(lambda: copy.deepcopy(model), rest, F.cross_entropy, batch_size, max_loss=3.5, name=name)


ALPHABET = "abcdefghijklmnopqrstuvwxyz ._=\n"  # all other characters are one more


def source_code_text() -> Tensor:
    """Python's own source code as numbers of characters."""
    text = "".join(map(inspect.getsource, (argparse, random, typing, datetime))).lower()
    return torch.tensor([ALPHABET.find(character) % (len(ALPHABET) + 1) for character in text])


def source_code(hidden: Sequence[int]) -> ImageMLP:
    """The next character of Python's own source code from the five before it."""
    codes = source_code_text()
    places = torch.linspace(0, len(codes) - 6, 20_000).long()
    contexts = F.one_hot(codes[places[:, None] + torch.arange(5)], len(ALPHABET) + 1).float()
    return ImageMLP(contexts, codes[places + 5], hidden=hidden, batch_size=32)


def autoencoder(images: Tensor, size: int, width: int, batch_size: int) -> ModuleTask:
    """Grey images, resized, through a hidden layer of some width and back, by mean squared error."""
    pixels = resize(images.float() / 255, size).flatten(1)

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(size**2, width), nn.ReLU(), nn.Linear(width, size**2))

    return ModuleTask(make, (pixels, pixels), F.mse_loss, batch_size, name=f"autoencoder {size**2}-{width}-{size**2}")


def quick(data: Sequence[Images], seed: int) -> Recipe:
    """A few minutes on a laptop."""
    tasks = []
    for images, labels in data:
        tasks.append(ImageMLP(images, labels, hidden=(32,), batch_size=32, size=8))
        # Few images, so that unrolls also visit the regime in which the training loss goes to 0.
        tasks.append(ImageMLP(images[:1000], labels[:1000], hidden=(32, 32), batch_size=32, size=8))
    training = LocalTraining(8, [1, 2, 4, 8, 16], (0.05, 1.0), decay_share=0.5)
    network = AdaMLP.base_step(seed=seed)
    options = {"lr": 5e-3, "decays_lr": 5e-4, "warmup_steps": 10}
    return Recipe([(task, training) for task in tasks], network, 100, options=options)


@torch.no_grad()
def scale_last_layer(network: AdaMLP, factor: float) -> AdaMLP:
    """Multiply the last layer of a network, in place, so that its published update takes smaller or larger steps."""
    for p in network.layers[-1].parameters():
        p *= factor
    return network


def published(
    inputs: Literal["mean"] | int,
    steps: int,
    batch_size: int = 128,
    ada_features: bool = True,
    size: int | None = None,
    hidden: Sequence[int] = (128, 128),
    last_scale: float = 1.0,
    **options: Any,
) -> Maker:
    """LOpt-A (inputs "mean") or LAgg-A (inputs 8) of arXiv 2312.02204: K = 8, H = 4, an MLP on 28×28 images.

    Args:
        inputs: Inputs of the network.
        steps: Steps of the meta-optimizer: 5,000 for LOpt-A and 10,000 for LAgg-A in the paper.
        batch_size: Images per local step.
        ada_features: False for the ablations LOpt and LAgg.
        size: Side in pixels to which the images are resized; None leaves them.
        hidden: Widths of the hidden layers of the MLP.
        last_scale: Factor of the network's last layer at its initialisation. With 0.1 the first steps are small: no
            unroll diverges, and the meta-loss leaves chance at once.
        options: Departures from the paper's options of `MetaTraining`.
    """

    def recipe(data: Sequence[Images], seed: int) -> Recipe:
        task = ImageMLP(*data[0], hidden=hidden, batch_size=batch_size, size=size)
        network = scale_last_layer(AdaMLP(inputs, ada_features=ada_features, seed=seed), last_scale)
        return Recipe([(task, LocalTraining(8, 4, 0.5))], network, steps, options={**options})

    return recipe


def from_lopt_a(steps: int, batch_size: int, **options: Any) -> Maker:
    """LAgg-A for 8 workers, of which the bundled `lopt_a` is the start (`with_worker_inputs`).

    Args:
        steps: Steps of the meta-optimizer.
        batch_size: Images per local step.
        options: Departures from the paper's options of `MetaTraining`.
    """
    maker = published(8, steps, batch_size, **options)

    def recipe(data: Sequence[Images], seed: int) -> Recipe:
        made = maker(data, seed)
        evaluation = Evaluation("start", *made.tasks[0], num_runs=2)
        return replace(made, network=with_worker_inputs(AdaMLP.bundled("lopt_a"), evaluation))

    return recipe


def default(data: Sequence[Images], seed: int) -> Recipe:
    """The bundled default: small tasks that differ in all that users' tasks differ in. Needs two sets of images."""
    if len(data) != 2:
        raise SystemExit(f"--recipe default needs two sets of images, not {len(data)}: --data FASHION_MNIST CIFAR10.")
    fashion, cifar = data

    def images(data: Images, hidden: Sequence[int], batch_size: int, count: int | None = None) -> ImageMLP:
        return ImageMLP(data[0][:count], data[1][:count], hidden=hidden, batch_size=batch_size, size=8)

    def local(
        num_workers: int,
        local_steps: int,
        low: float,
        high: float,
        kind: OptimizerKind = "sgd",
        scale: tuple[float, float] = (0.5, 2.0),
    ) -> LocalTraining:
        optimizer = LocalOptimizer(kind, weight_decay=0.01 if kind == "adamw" else 0.0)
        return LocalTraining(num_workers, local_steps, (low, high), 0.5, optimizer, scale)

    tasks = [
        (images(fashion, (16,), 16), local(4, 4, 0.05, 1.0)),
        (images(cifar, (32,), 16), local(8, 2, 0.05, 1.0)),
        (images(fashion, (16, 16), 16, 1000), local(4, 8, 0.05, 1.0)),
        (images(cifar, (16, 16), 8, 1000), local(4, 4, 0.03, 0.6)),
        (images(fashion, (), 8), local(4, 1, 0.03, 0.5)),
        (source_code((16, 16)), local(4, 4, 0.1, 1.0)),
        (images(cifar, (16,), 16), local(4, 4, 3e-4, 1e-2, "adamw")),
        (images(fashion, (16, 16), 8), local(4, 8, 3e-4, 1e-2, "adamw")),
        (images(cifar, (32,), 8, 1000), local(2, 16, 3e-4, 3e-3, "adamw")),
        (source_code((24,)), local(4, 4, 1e-3, 1e-2, "adamw")),
        (images(fashion, (16,), 8), local(4, 4, 0.005, 0.2, "momentum")),
        (images(cifar, (16, 16), 16), local(2, 8, 0.005, 0.2, "momentum")),
        (regression((8, 16, 1), 16, noise=0.3, seed=5), local(4, 4, 0.01, 0.2)),
        (regression((16, 16, 16, 1), 8, noise=0.3, seed=6), local(2, 8, 0.01, 0.2)),
        (regression((8, 16, 1), 8, noise=0.0, seed=7), local(4, 2, 1e-3, 1e-2, "adamw")),
        (regression((8, 16, 1), 16, noise=0.5, seed=8), local(2, 4, 0.001, 0.02, "momentum")),
        (regression((8, 16, 1), 16, noise=0.3, seed=9, spread=3.0), local(4, 8, 1e-3, 1e-2, "adamw")),
        (fine_tuning(fashion, 16), local(2, 16, 3e-4, 3e-3, "adamw", scale=(1.0, 1.0))),
        (fine_tuning(fashion, 16, low_rank=True), local(4, 8, 0.03, 0.5, scale=(1.0, 1.0))),
        (fine_tuning(cifar, 16, low_rank=True), local(2, 8, 1e-3, 2e-2, "adamw", scale=(1.0, 1.0))),
    ]
    options = {
        "log_floor": 0.1,
        "num_particles": 12,
        "truncation": 25,
        "unroll_length": LogUniform(10, 400),
        "sigma": 0.02,
        "max_window_norm": 30.0,
        "lr": 3e-3,
        "decays_lr": 5e-5,
        "warmup_steps": 10,
        "final_lr": 2e-4,
    }
    network = AdaMLP.base_step(seed=seed)
    return Recipe(tasks, network, steps=90, windows=len(tasks), options=options)


def controller_tasks(data: Sequence[Images]) -> Pairs:
    """The tasks of `default`, and others with Muon, attention, squared errors, wider models, and few local steps.

    None is a held-out task of the benchmarks: those have transformers of width 24 on 16×16 images of Fashion-MNIST and
    on Shakespeare, where these have 8×8 images of CIFAR-10 and Python's source code, and an autoencoder of
    Fashion-MNIST at 28×28, where these have CIFAR-10 at 8×8 and 16×16.
    """
    fashion, cifar = data

    def images(data: Images, hidden: Sequence[int], batch_size: int, count: int | None = None) -> ImageMLP:
        return ImageMLP(data[0][:count], data[1][:count], hidden=hidden, batch_size=batch_size, size=8)

    def local(num_workers: int, local_steps: int, low: float, high: float, kind: OptimizerKind) -> LocalTraining:
        optimizer = LocalOptimizer(kind, weight_decay=0.01 if kind == "adamw" else 0.0)
        return LocalTraining(num_workers, local_steps, (low, high), 0.5, optimizer, (0.5, 2.0))

    def vit() -> ModuleTask:
        return image_vit(*cifar, patch=2, width=16, depth=1, num_heads=2, batch_size=16, size=8)

    text = language_model(
        source_code_text(), len(ALPHABET) + 1, context=16, width=16, depth=1, num_heads=2, batch_size=8
    )
    return [
        *default(data, 0).tasks,
        (images(fashion, (16, 16), 16), local(4, 4, 1e-3, 6e-2, "muon")),
        (images(cifar, (32,), 8), local(4, 8, 1e-3, 6e-2, "muon")),
        (source_code((16,)), local(8, 2, 1e-3, 2e-2, "muon")),
        (images(fashion, (24, 24), 8, 1000), local(2, 8, 1e-3, 3e-2, "muon")),
        (vit(), local(4, 4, 3e-4, 1e-2, "adamw")),
        (vit(), local(2, 8, 1e-3, 2e-2, "muon")),
        (text, local(4, 8, 1e-3, 1e-2, "adamw")),
        (autoencoder(cifar[0], 8, 16, 16), local(4, 8, 3e-4, 1e-2, "adamw")),
        (autoencoder(cifar[0], 16, 32, 16), local(4, 8, 3e-4, 5e-3, "adamw")),
        (images(cifar, (128, 64), 16), local(4, 4, 3e-4, 1e-2, "adamw")),
        (images(fashion, (32,), 16), local(4, 1, 1e-3, 6e-2, "muon")),
        (images(fashion, (24, 16), 16), local(4, 1, 1e-3, 5e-2, "adamw")),
        (images(cifar, (24,), 16), local(8, 1, 0.01, 0.5, "momentum")),
    ]


PAPER: dict[str, Any] = {"estimator": "published_pes"}
SHORT: dict[str, Any] = {**PAPER, "batch_size": 64, "num_particles": 2, "truncation": 25}  # a sixteenth of the work
# A curriculum: each stage starts from the export of the one before (--init), with a schedule of its own. The steps are
# absolute, so those of a stage of few pixels are too large for one of many: there --init-scale helps.
# The mean loss over an unroll rests on its first rounds: lopt_a_28x28_late takes longer unrolls, and log(loss + 0.1).
STAGE: dict[str, Any] = {"last_scale": 0.1, "warmup_steps": 20, "restart_schedule": True}
RECIPES: dict[str, Maker] = {
    "quick": quick,
    "paper": published("mean", 5_000, **PAPER),
    "paper_lagg_a": published(8, 10_000, **PAPER),
    "paper_lopt": published("mean", 5_000, ada_features=False, **PAPER),
    "paper_lagg": published(8, 10_000, ada_features=False, **PAPER),
    "lopt_a_8x8": published(
        "mean", 2_000, 32, size=8, hidden=(32,), unroll_length=LogUniform(50, 500), lr=6e-3, **STAGE
    ),
    "lopt_a_14x14": published("mean", 1_500, 32, size=14, num_particles=4, lr=3e-3, **STAGE),
    "lopt_a_28x28": published("mean", 220, 64, num_particles=4, lr=1.5e-3, final_lr=3e-4, **STAGE),
    "lopt_a_28x28_late": published(
        "mean",
        400,
        64,
        num_particles=4,
        log_floor=0.1,
        unroll_length=LogUniform(500, 1500),
        lr=1e-3,
        final_lr=1e-4,
        **STAGE,
    ),
    "lopt_a": published("mean", 300, lr=1e-3, final_lr=1e-4, **STAGE),
    "lagg_a_28x28_late": from_lopt_a(
        100,
        64,
        num_particles=4,
        log_floor=0.1,
        unroll_length=LogUniform(500, 1000),
        lr=5e-4,
        final_lr=5e-5,
        warmup_steps=10,
    ),
    "lopt_a_short": published("mean", 500, **SHORT),
    "lagg_a_short": published(8, 500, **SHORT),
    "lopt_short": published("mean", 500, ada_features=False, **SHORT),
    "lagg_short": published(8, 500, ada_features=False, **SHORT),
    "default": default,
}
