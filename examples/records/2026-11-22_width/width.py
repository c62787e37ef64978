"""width.py DATA OUT: outer steps that were meta-trained on narrow networks, on one that is 8 times wider.

muLO multiplies the learned step of every matrix whose inputs grew by base width / width.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightning_lopt import AdaMLP
from examples.benchmarks.compare.clients import Shared
from examples.benchmarks.compare.data import fashion_mnist
from examples.benchmarks.compare.simulate import _losses
from lightning_lopt.meta import ImageMLP
from lightning_lopt.meta.base import Tensors
from lightning_lopt.meta.outer import SimulatedOuterStep, SimulatedRound, average_anchors, learned_step, optimizer_step, views
from lightning_lopt.meta.simulation import Simulation

BASE, NUM_WORKERS, LOCAL_STEPS, NUM_ROUNDS, LOCAL_LR, SEEDS = 128, 8, 4, 40, 0.5, (0, 1, 2)


def learned(name: str, scale: float, anchor: Tensors) -> SimulatedOuterStep:
    """The step of a bundled network, times `scale` on all matrices but the first."""
    whole = learned_step(anchor, [AdaMLP.bundled(name)])

    def step(anchor: Tensors, training: SimulatedRound) -> None:
        before = {key: a.clone() for key, a in anchor.items()}
        whole(anchor, training)
        for key, a in anchor.items():
            if a.dim() == 3 and key != "layers.0.weight":
                a.copy_(before[key].lerp_(a, scale))

    return step


def diloco(anchor: Tensors) -> SimulatedOuterStep:
    """DiLoCo as tuned at width 128."""
    groups = [{"params": params} for params in views(anchor)]
    return optimizer_step(torch.optim.SGD(groups, lr=0.5, momentum=0.9, nesterov=True))


def methods(width: int) -> dict[str, Callable[[Tensors], SimulatedOuterStep]]:
    """Functions that make an outer step for anchors, by name."""
    found: dict[str, Callable[[Tensors], SimulatedOuterStep]] = {"local_sgd": lambda anchor: average_anchors, "diloco": diloco}
    for name in ("default", "lopt_a_short"):
        found[name] = partial(learned, name, 1.0)
        if width > BASE:
            found[f"{name}, muLO"] = partial(learned, name, BASE / width)
    return found


def train(task: ImageMLP, outer: Callable[[Tensors], SimulatedOuterStep]) -> Tensor:
    """Train; return the losses before the first round and after each, [rounds + 1, seeds]."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    starts = [task.init(1, generator) for generator in generators]
    anchor = {key: torch.cat([start[key] for start in starts]) for key in starts[0]}
    data, rates = Shared(task), torch.full((len(SEEDS),), LOCAL_LR)
    simulation, losses = Simulation(task, anchor, NUM_WORKERS, outer(anchor)), [_losses(task, anchor)]
    for round_idx in range(NUM_ROUNDS):
        drawn = torch.stack([data.draw(LOCAL_STEPS, NUM_WORKERS, generator) for generator in generators], 1)
        rounds = torch.full((len(SEEDS),), round_idx)
        simulation.round((task.read(places.flatten()) for places in drawn), rates, rounds)
        losses.append(_losses(task, anchor))
    return torch.stack(losses)


@torch.no_grad()
def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    images, labels = fashion_mnist("train", folder)
    for width in (BASE, 8 * BASE):
        task = ImageMLP(images, labels, hidden=(width, width), batch_size=128)
        for method, outer in methods(width).items():
            losses = train(task, outer)
            with out.open("a") as file:
                for seed, curve in zip(SEEDS, losses.T.tolist(), strict=True):
                    row = {"width": width, "method": method, "seed": seed, "losses": [float(f"{x:.5g}") for x in curve]}
                    file.write(json.dumps(row) + "\n")
            print(f"{width:5d} {method:20s}", *(f"{x:.4f}" for x in sorted(losses[-5:].mean(0).tolist())), flush=True)


main(Path(sys.argv[1]), Path(sys.argv[2]))
