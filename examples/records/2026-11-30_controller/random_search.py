"""Search the constants of the blended Nesterov step at random, on the tasks and unrolls of the recipe `controller`.

PYTHONPATH=.:examples python examples/records/2026-11-30_controller/random_search.py FASHION_MNIST CIFAR10 OUT.jsonl [--unrolls 31680] [--points 256] [--seed 0]

The control of a meta-training with as many unrolls: 30 sweeps of 16 pairs on 33 tasks are 31,680. lr, 1 - momentum and the
blend are drawn at random; the first point is the base step. Successive halving: each stage has the same number of unrolls,
and half of the points of the one before, down to eight. All points of a stage share their starts, data, γ and its schedules, and a point's
score is the mean over tasks and unrolls of the objective's difference to the base step's, in units of its root mean square
on the task and clipped as in `ControllerTraining`. OUT.jsonl has a line per stage and task, and the same command goes on
where they end.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from meta_train import load_images
from recipes import controller_tasks

from lightning_lopt.functional.blended import BlendedSettings
from lightning_lopt.meta import Horizons
from lightning_lopt.meta.controller_training import CLIP, LARGEST_DIFFERENCE, RMS_FLOOR
from lightning_lopt.meta.outer import BlendedStep
from lightning_lopt.meta.particles import seeded
from lightning_lopt.meta.whole_unrolls import whole_unrolls

LAST = 8  # points of the last stage
TOGETHER = 64  # unrolls that run side by side
RUNS = 4  # of a horizon


def draw_points(count, seed):
    """The base step, then random points: lr 0.4 to 4, momentum 0.4 to 0.98, any blend; [count, 5]."""
    generator = seeded(seed, "points")
    u = torch.rand(count, 2, generator=generator)
    blend = -torch.rand(count, 3, generator=generator).log()
    points = torch.cat([0.4 * 10 ** u[:, :1], 1 - 0.6 * 30 ** -u[:, 1:], blend / blend.sum(1, keepdim=True)], 1)
    base = BlendedSettings.by_hand(1, points)
    points[0] = torch.cat([base.lr, base.momentum, base.blend[0]])
    return points


def objectives(task, training, points, runs, *seed):
    """Objective of each point in each of some runs of one horizon, [points, runs]."""
    generator = seeded(*seed, 0)
    horizon = Horizons().draw(training, generator)
    local_lr = training.draw_schedules(runs, horizon.num_rounds, generator)

    def of(some):
        def outer(anchor):
            lr, momentum, *blend = some.repeat_interleave(runs, 0).T
            return BlendedStep(anchor, BlendedSettings(lr, momentum, torch.stack(blend, 1)))

        return whole_unrolls(task, training, horizon, local_lr, len(some), outer, seeded(*seed, 1))

    return torch.cat([of(some) for some in points.split(TOGETHER // runs)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs=2, type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--unrolls", type=int, default=31_680)
    parser.add_argument("--points", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks = controller_tasks([load_images(folder) for folder in args.data])
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(line["stage"], line["task"]): line["differences"] for line in lines}
    points, kept = draw_points(args.points, args.seed), torch.arange(args.points)
    stages = 1 + int(math.log2(args.points / LAST))
    for stage in range(stages):
        runs = max(1, args.unrolls // (stages * len(tasks) * len(kept)))
        scores = []
        for i, (task, training) in enumerate(tasks):
            if (stage, i) not in done:
                began = time.process_time()
                with_base = points[torch.cat([torch.tensor([0]), kept])]
                parts = [
                    objectives(task, training, with_base, min(RUNS, runs - first), args.seed, stage, i, first)
                    for first in range(0, runs, RUNS)
                ]
                values = torch.cat(parts, 1)
                done[stage, i] = [[round(x, 4) for x in row] for row in (values[1:] - values[:1]).tolist()]
                line = {"stage": stage, "task": i, "cpu_s": round(time.process_time() - began, 1)}
                with args.out.open("a") as file:
                    file.write(json.dumps({**line, "differences": done[stage, i]}) + "\n")
            differences = torch.tensor(done[stage, i]).clamp(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)
            rms = differences.square().mean().sqrt().clamp(min=RMS_FLOOR)
            scores.append((differences / rms).clamp(-CLIP, CLIP).mean(1))
        means, order = torch.stack(scores).mean(0).sort()
        kept = kept[order]
        print(f"stage {stage}, {len(kept)} points, {runs} runs on each task; the best three:", flush=True)
        for point, score in zip(points[kept[:3]].tolist(), means.tolist(), strict=False):
            print(f"  {score:+.3f}: lr {point[0]:.3f}, momentum {point[1]:.3f}, blend {[round(x, 3) for x in point[2:]]}")
        kept = kept[: len(kept) // 2]


if __name__ == "__main__":
    main()
