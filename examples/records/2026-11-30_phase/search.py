"""Random search for the phase rule of the blended Nesterov step, on the training tasks of examples/recipes.py alone.

PYTHONPATH=.:examples python examples/records/2026-11-30_phase/search.py FASHION_MNIST CIFAR10 search.jsonl STAGE

With q = γ_t / γ_start, γ_start the local learning rate from which the present decay started, a point takes the step with

    lr · min(cap, q^-e),    1 - β_t = min(1 - β, max((1 - β) q^b, 1 - most)).

Variants: with kind 1 γ_start is the mean of γ since it last rose; with c > 0 q is the contraction
(1 - (1 - c d)^H) / (1 - (1 - c)^H) for d = γ_t / γ_start, and with d0 < 1 it is min(1, d / d0); with raw the momentum
reads d all the same. Points without e and b are constants.

Each training task has γ in the middle of its range and two decays: a cosine over 100 rounds and, in turn, one of the
others over 60. The file gets a line with the points of the stage, then a line per task and decay, with the log ratios of
the final loss to that of the base step by point and seed.
"""

import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from meta_train import load_images
from recipes import default

from examples.benchmarks.compare import simulate as sim
from examples.benchmarks.compare.clients import Shared
from examples.benchmarks.compare.methods import Setting
from lightning_lopt.functional.blended import BlendedSettings
from lightning_lopt.meta.outer import BlendedStep
from lightning_lopt.network import AdaMLP

BASE = {"lr": 1.1, "momentum": 0.85, "e": 0.0, "cap": 1.0, "b": 0.0, "most": 0.85, "kind": 0, "c": 0.0, "d0": 1.0, "raw": 0}
BLEND = (0.05, 0.45, 0.5)
SHAPES = {
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "linear": lambda x: 1 - x,
    "stable then linear": lambda x: min(1.0, (1 - x) / 0.3),
    "steps": lambda x: 1.0 if x < 0.5 else 0.2 if x < 0.75 else 0.04,
    "warm-up, cosine": lambda x: x / 0.1 if x < 0.1 else 0.5 * (1 + math.cos(math.pi * (x - 0.1) / 0.9)),
    "cosine to a tenth": lambda x: 0.1 + 0.45 * (1 + math.cos(math.pi * x)),
}


@dataclass(frozen=True)
class Schedule(sim.Experiment):
    """Settings of the runs, with any schedule of γ."""

    shape: str = "cosine"

    def factor(self, round_idx):
        return SHAPES[self.shape]((round_idx + (self.shape == "warm-up, cosine")) / self.num_rounds)


class Phased(BlendedStep):
    """The step with the settings of each run's point in each round."""

    def __init__(self, anchor, points):
        like = next(iter(anchor.values()))
        columns = {name: like.new_tensor([point[name] for point in points]) for name in BASE}
        super().__init__(anchor, BlendedSettings(columns["lr"], columns["momentum"], like.new_tensor([BLEND] * len(points))))
        self.columns, self.last, self.start, self.mean, self.age = columns, 0 * columns["lr"], 0 * columns["lr"], 0 * columns["lr"], 0

    def __call__(self, anchor, training):
        c, lr = self.columns, training.local_lr
        rises = lr > self.last
        self.start = torch.where(rises, lr, self.start)
        self.age = torch.where(rises, 0, self.age) + 1
        self.mean = torch.where(rises, lr, self.mean + (lr - self.mean) / self.age)
        self.last = lr
        d = lr / torch.where(c["kind"] == 1, self.mean, self.start)
        contraction = (1 - (1 - c["c"] * d) ** training.local_steps) / (1 - (1 - c["c"]) ** training.local_steps)
        own, d = d, torch.where(c["c"] > 0, contraction, (d / c["d0"]).clamp(max=1))
        of_momentum = torch.where(c["raw"] > 0, own, d)
        base = 1 - c["momentum"]
        keep = torch.minimum(base, torch.maximum(base * of_momentum ** c["b"], 1 - c["most"]))
        self._settings = BlendedSettings(c["lr"] * torch.minimum(c["cap"], d ** -c["e"]), 1 - keep, self._settings.blend)
        super().__call__(anchor, training)


def final_losses(task, training, shape, num_rounds, points, seeds):
    """Log final losses, [points, seeds]."""
    low, high = training.local_lr if isinstance(training.local_lr, tuple) else (training.local_lr,) * 2
    experiment = Schedule(training.num_workers, training.steps[0], num_rounds, training.optimizer, shape=shape)
    settings = [Setting("phased", (low * high) ** 0.5, {"point": json.dumps(point)}) for point in points]
    losses = []
    for group in sim.groups(task, settings, training.num_workers * len(seeds)):
        sim.outer = lambda particles, anchor, network: Phased(anchor, [json.loads(p.options["point"]) for p in particles])
        losses.append(sim.simulate(Shared(task), group, seeds, experiment, AdaMLP()).losses)
    limit = task.max_loss
    return torch.cat(losses)[..., -5:].nan_to_num(nan=limit).clamp(max=limit).mean(2).log()


def cells(tasks):
    """Tasks with their schedules and numbers of rounds."""
    others = ["linear", "stable then linear", "steps", "warm-up, cosine", "cosine to a tenth"]
    for i, (task, training) in sorted(enumerate(tasks), key=lambda pair: (pair[0] not in (2, 13, 16, 18), -pair[0])):
        yield i, task, training, "cosine", 100
        yield i, task, training, others[i % len(others)], 60


def cells_at_the_edge(tasks):
    """Tasks with γ at the upper end of its range and four times as many local steps, after some as before."""
    for i, (task, training) in enumerate(tasks):
        if i in (4, 2, 6, 9, 12, 13, 16, 18):
            yield i, task, training, "cosine", 100
        edge = replace(training, local_lr=training.local_lr[1], local_steps=4 * training.steps[0])
        yield i, task, edge, "cosine", 40


def random_point(generator):
    """A point; a fifth of them are constants that do not read the phase."""
    u = torch.rand(8, generator=generator).tolist()
    if u[0] < 0.2:
        return {**BASE, "lr": 1.1 * 4 ** u[1], "momentum": 1 - 0.15 * 0.2 ** u[2]}
    return {**BASE, "e": 1.5 * u[1], "cap": 4 ** u[2], "b": 1.5 * u[3], "most": 1 - 0.15 * 0.2 ** u[4], "kind": int(u[5] < 0.25)}


def sharper_point(generator):
    """A point of the second search: the factors rise sooner."""
    u = torch.rand(6, generator=generator).tolist()
    return {**BASE, "e": 0.8 * 6 ** u[0], "cap": 1.8 + 2.2 * u[1], "b": 3 * u[2], "most": 0.85 + 0.1 * u[3], "kind": int(u[4] < 0.3)}


def contracting_point(generator):
    """A point of the third search: in the place of d, q = (1 - (1 - c d)^H) / (1 - (1 - c)^H)."""
    u = torch.rand(6, generator=generator).tolist()
    c = [0.0, 0.1, 0.2, 0.4, 0.6, 0.9][int(6 * u[0])]
    return {**BASE, "c": c, "e": 0.4 + 0.8 * u[1], "cap": 1.6 * 2.5 ** u[2], "b": u[3], "most": 0.85 + 0.1 * u[4]}


BY_HAND = [  # of the fourth search; with "raw" only the rate reads c and d0
    {"b": 0.5, "most": 0.9},
    {"b": 1.0, "most": 0.92},
    {"b": 0.5, "most": 0.95},
    {"c": 0.4, "e": 0.8, "cap": 2.2, "b": 0.7, "most": 0.9},
    {"c": 0.1, "e": 0.8, "cap": 2.2, "b": 0.7, "most": 0.9},
    {"c": 0.2, "e": 1.0, "cap": 2.5, "b": 0.5, "most": 0.9},
    {"c": 0.4, "e": 1.0, "cap": 2.5, "b": 0.5, "most": 0.9, "raw": 1},
    {"c": 0.6, "e": 1.0, "cap": 3.0, "b": 0.5, "most": 0.9, "raw": 1},
    {"c": 0.2, "e": 1.0, "cap": 3.0, "b": 0.5, "most": 0.9, "raw": 1},
    {"d0": 0.5, "e": 0.5, "cap": 2.5, "b": 0.5, "most": 0.9, "raw": 1},
    {"d0": 0.5, "e": 1.0, "cap": 2.5, "b": 0.5, "most": 0.9, "raw": 1},
    {"d0": 0.5, "e": 1.0, "cap": 2.5, "b": 0.5, "most": 0.92, "raw": 1},
    {"d0": 0.25, "e": 0.5, "cap": 3.0, "b": 0.5, "most": 0.92, "raw": 1},
    {"e": 0.5, "cap": 4.0, "lr": 1.65},
]


AT_THE_EDGE = [  # of the fifth search
    {"c": 0.2, "e": 1.0, "cap": 2.5, "b": 0.5, "most": 0.9},
    {"c": 0.5, "e": 1.0, "cap": 2.5, "b": 0.5, "most": 0.9},
    {"c": 1.0, "e": 1.0, "cap": 2.5, "b": 0.5, "most": 0.9},
    {"c": 1.0, "e": 1.0, "cap": 4.0, "b": 0.5, "most": 0.9},
    {"c": 1.0, "e": 1.0, "cap": 4.0, "b": 0.5, "most": 0.95},
    {"c": 1.0, "e": 1.0, "cap": 4.0},
    {"c": 1.0, "e": 0.7, "cap": 2.5, "b": 0.35, "most": 0.9},
    {"b": 0.5, "most": 0.9},
    {"b": 0.5, "most": 0.95},
    {"e": 0.5, "cap": 1.25, "b": 0.5, "most": 0.9},
]
SAFER = [  # of the sixth search
    {"c": 1.0, "e": 0.7, "cap": 2.5, "b": 0.5, "most": 0.95, "raw": 1},
    {"c": 1.0, "e": 0.7, "cap": 2.5, "b": 0.5, "most": 0.9, "raw": 1},
    {"c": 1.0, "e": 0.5, "cap": 2.5, "b": 0.5, "most": 0.95, "raw": 1},
    {"c": 1.0, "e": 0.5, "cap": 1.6, "b": 0.5, "most": 0.95, "raw": 1},
    {"c": 1.0, "e": 0.7, "cap": 1.6, "b": 0.5, "most": 0.95, "raw": 1},
    {"b": 0.5, "most": 0.95},
    {"b": 1.0, "most": 0.95},
    {"b": 1.0, "most": 0.97},
    {"b": 1.5, "most": 0.93},
]
EXTRA = [  # of the second and the third search
    [{"lr": 2.5, "momentum": 0.89}, {"lr": 1.65}],
    [{"e": 0.5, "cap": 4.0}, {"e": 0.5, "cap": 2.0}, {"e": 0.5, "cap": 2.0, "b": 0.5, "most": 0.9}],
]


def points_of(stage):
    """Points of a stage, 0 to 5."""
    if stage > 2:
        return [{**BASE, **point} for point in (BY_HAND, AT_THE_EDGE, SAFER)[stage - 3]]
    draw, count = ((random_point, 40), (sharper_point, 24), (contracting_point, 27))[stage]
    generator = torch.Generator().manual_seed(stage)
    extra = EXTRA[stage - 1] if stage else []
    return [draw(generator) for _ in range(count)] + [{**BASE, **point} for point in extra]


def main():
    """Run a stage."""
    torch.set_num_threads(1)
    *folders, out, stage = sys.argv[1:]
    tasks, stage = default([load_images(Path(folder)) for folder in folders], 0).tasks, int(stage)
    points, seeds = points_of(stage), range(10 * stage, 10 * stage + (2 if stage else 3))
    with open(out, "a") as file:
        file.write(json.dumps({"stage": stage, "points": points}) + "\n")
    for i, task, training, shape, num_rounds in (cells_at_the_edge if stage > 3 else cells)(tasks):
        start = time.process_time()
        losses = final_losses(task, training, shape, num_rounds, [BASE, *points], seeds)
        ratios = losses[1:] - losses[:1]
        row = {"stage": stage, "task": i, "name": str(task), "optimizer": training.optimizer.kind, "schedule": shape}
        row |= {"K": training.num_workers, "H": training.steps[0], "rounds": num_rounds, "seeds": list(seeds)}
        row |= {"ratios": [[round(x, 4) for x in r] for r in ratios.tolist()], "cpu_s": round(time.process_time() - start, 1)}
        with open(out, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(stage, i, shape, f"best {ratios.mean(1).min():+.3f}", row["cpu_s"], flush=True)


if __name__ == "__main__":
    main()
