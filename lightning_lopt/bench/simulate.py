"""Training runs in one process: K simulated workers, many settings and seeds side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_lopt.meta.tasks import ImageMLP, Tensors
from lightning_lopt.meta.unroll import local_round, outer_step, zero_states
from lightning_lopt.network import AdaMLP
from lightning_lopt.optim import SlowMomentum

LOSS_SAMPLES = 1024
BATCH_BYTES = 1 << 27  # of the images of one local step, which bounds how many settings run side by side


@dataclass(frozen=True)
class Setting:
    """A method with its hyperparameters.

    Attributes:
        method: a key of `GRIDS`.
        local_lr: γ.
        options: what the outer optimizer takes.
    """

    method: str
    local_lr: float
    options: Mapping[str, float] = field(default_factory=dict)


def _slowmo(local_lr: float) -> Iterator[dict[str, float]]:
    """The grid of arXiv 2312.02204: η = α·γ."""
    rates = (1, 0.5, 0.1, 0.05, 0.01, 0.005, 0.001, 5e-4, 1e-4, 5e-5, 1e-5)
    for rate, momentum in product(rates, (0.99, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)):
        yield {"lr": rate / local_lr, "momentum": momentum}


def _diloco(local_lr: float) -> Iterator[dict[str, float]]:
    for lr, momentum in product((0.1, 0.3, 0.5, 0.7, 1.0), (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)):
        yield {"lr": lr, "momentum": momentum}


GRIDS: dict[str, Callable[[float], Iterator[dict[str, float]]]] = {
    "local_sgd": lambda local_lr: iter([{}]),
    "learned": lambda local_lr: iter([{}]),
    "slowmo": _slowmo,
    "diloco": _diloco,
}


def settings(method: str, local_lrs: Sequence[float]) -> list[Setting]:
    """All settings of a method's grid.

    Example:
        >>> len(settings("slowmo", [1.0, 0.5, 0.3, 0.1]))
        440
    """
    return [Setting(method, lr, options) for lr in local_lrs for options in GRIDS[method](lr)]


OuterStep = Callable[[Tensors, int], None]


def _outer(particles: Sequence[Setting], anchor: Tensors, network: AdaMLP) -> OuterStep:
    """What moves the anchor {[P, *S]}, given the workers {[P, K, *S]} and the round."""
    method = particles[0].method
    if method == "local_sgd":
        return lambda workers, round_idx: _average(anchor, workers)
    if method == "learned":
        named = {name: p.detach().expand(len(particles), *p.shape) for name, p in network.named_parameters()}
        theta, states = network.functional(named), zero_states(anchor)
        return lambda workers, t: outer_step(anchor, workers, states, theta, torch.full((len(particles),), t))
    groups = [
        {"params": [a[i] for a in anchor.values()], "local_lr": setting.local_lr, **setting.options}
        for i, setting in enumerate(particles)
    ]
    optimizer = SlowMomentum(groups) if method == "slowmo" else SGD(groups, nesterov=True, momentum=0.9)
    return lambda workers, round_idx: _optimizer_step(optimizer, anchor, workers)


def _average(anchor: Tensors, workers: Tensors) -> None:
    for name, a in anchor.items():
        a.copy_(workers[name].mean(1))


def _optimizer_step(optimizer: Optimizer, anchor: Tensors, workers: Tensors) -> None:
    """One step of an optimizer with a parameter group per particle."""
    grads = [a - workers[name].mean(1) for name, a in anchor.items()]
    for i, group in enumerate(optimizer.param_groups):
        for p, grad in zip(group["params"], grads, strict=True):
            p.grad = grad[i]
    optimizer.step()


@torch.no_grad()
def simulate(
    task: ImageMLP,
    group: Sequence[Setting],
    seeds: Sequence[int],
    num_workers: int,
    local_steps: int,
    num_rounds: int,
    network: AdaMLP,
) -> Tensor:
    """Train with every setting from every seed; a seed fixes the initial weights and the data for all settings.

    Args:
        task: the model and its data.
        group: settings of one method.
        seeds: of the runs.
        num_workers: K >= 1.
        local_steps: H >= 1.
        num_rounds: rounds of each run.
        network: of the method ``"learned"``.

    Returns:
        The loss of the global weights on a fixed sample of the training data, in nats, before the first round and
        after each, [settings, seeds, num_rounds + 1].
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    starts = [task.init(1, generator) for generator in generators]
    anchor = {name: _tile([start[name] for start in starts], len(group)) for name in starts[0]}
    particles = [setting for setting in group for _ in seeds]
    local_lr = torch.tensor([setting.local_lr for setting in particles])
    step = _outer(particles, anchor, network)
    images = task.images[:LOSS_SAMPLES].expand(len(particles), -1, -1)
    labels = task.labels[:LOSS_SAMPLES].expand(len(particles), -1)

    def batch() -> tuple[Tensor, Tensor]:
        images, labels = zip(*(task.batch(num_workers, generator) for generator in generators), strict=True)
        return _tile(images, len(group)), _tile(labels, len(group))

    losses = [task.loss(anchor, (images, labels))]
    for round_idx in range(num_rounds):
        workers, _ = local_round(task, anchor, (batch() for _ in range(local_steps)), local_lr, num_workers)
        step(workers, round_idx)
        losses.append(task.loss(anchor, (images, labels)))
    return torch.stack(losses, 1).unflatten(0, (len(group), len(seeds)))


def _tile(tensors: Sequence[Tensor], times: int) -> Tensor:
    """What belongs to each seed, [n, *], in a row for every setting, [settings * seeds * n, *]."""
    joined = torch.cat(list(tensors))
    return joined.repeat(times, *[1] * (joined.dim() - 1))


def groups(task: ImageMLP, all_settings: Sequence[Setting], num_runs: int) -> Iterator[Sequence[Setting]]:
    """Cut settings of one method into groups whose data fits the memory; `num_runs` is workers times seeds."""
    size = max(1, BATCH_BYTES // (num_runs * task.batch_size * task.images[0].nbytes))
    for start in range(0, len(all_settings), size):
        yield all_settings[start : start + size]
