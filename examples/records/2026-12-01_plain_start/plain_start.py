"""The blended Nesterov step with a plain start, and with a plain end, against that step.

PYTHONPATH=.:examples python examples/records/2026-12-01_plain_start/plain_start.py FASHION_MNIST CIFAR10 OUT.jsonl

The tasks are every other one of `recipes.controller_tasks`, with γ at 0.7 of its range, 100 rounds of their own H and 25 of
eight times as many steps, four runs each, paired. A line has the logarithms of the losses' ratios to those of the step as it
is, after each round: of "averaging", of a "plain start", and, where the step goes on as it is, of the workers' "mean" before
each step, which a plain last step would end at.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import recipes
import torch
from meta_train import load_images

from lightning_lopt.functional import blended
from lightning_lopt.functional.ada import factoring, squared_norm
from lightning_lopt.functional.damping import damped
from lightning_lopt.functional.whitening import update_grams
from lightning_lopt.meta.evaluation import SAMPLE_BATCHES, Evaluation
from lightning_lopt.meta.outer import average_anchors, base_step
from lightning_lopt.meta.particles import seeded

RUNS, SEED = 4, 81
PRESENT = blended._step


def step_with_plain_start(tensor, settings, factor):
    """`functional.blended._step`, with forms that leave the plain one as the rounds go on."""
    param, state = tensor.param, tensor.state
    factors = factoring(tuple(param.shape[1:]))
    grad = damped(tensor.grad, factor)
    memory = 1 - settings.momentum[:, None], tensor.round_idx, tensor.retained_momentum
    complement = blended.complement_of_round(*memory)
    shrink = blended.norm_ratio(state, squared_norm(grad)).clamp(max=1)
    update_grams(state, grad)
    matrices = factors.matrices(grad)
    state.momentum.mul_(shrink.view(-1, 1, 1, 1, 1)).lerp_(matrices, complement[..., None, None, None])
    forms = blended.base_forms(blended.nesterov(matrices, state.momentum, complement), state, factors, param)
    plain = forms[:, :1]
    share = (2 / (tensor.round_idx.to(param) + 2)) ** 2
    mixed = plain + (1 - share).view(-1, 1, 1, 1, 1) * (forms - plain)
    weights = (settings.lr[:, None] * settings.blend)[..., None, None, None]
    step = blended.zero_where_unused((weights * mixed).sum(1, keepdim=True), forms)
    param.sub_(factors.restore(step, param))


def curves(evaluation):
    """Losses of each variant after each round, [T, N]."""
    task = evaluation.task
    sample = task.batch(SAMPLE_BATCHES, seeded(SEED, "sample"))
    sample = tuple(part.flatten(0, 1).expand(RUNS, -1, *part.shape[2:]) for part in sample)
    means = []

    def watched(anchor):
        step = base_step(anchor)

        def outer(anchor, training):
            means.append(task.loss({name: w.mean(1) for name, w in training.workers.items()}, sample).clone())
            step(anchor, training)

        return outer

    blended._step = PRESENT
    found = {"present": evaluation.losses_with(watched)[1:], "mean": torch.stack(means)}
    blended._step = step_with_plain_start
    found["plain start"] = evaluation.losses_with(base_step)[1:]
    found["averaging"] = evaluation.losses_with(lambda anchor: average_anchors)[1:]
    return {name: loss.nan_to_num(nan=task.max_loss).clamp(max=task.max_loss) for name, loss in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fashion_mnist", type=Path)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", type=int, help="indices; default: every other one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks = recipes.controller_tasks([load_images(args.fashion_mnist), load_images(args.cifar10)])
    for i in args.tasks or range(0, len(tasks), 2):
        task, training = tasks[i]
        low, high = training.local_lr
        for factor, rounds in ((1, 100), (8, 25)):
            local_steps = training.steps[len(training.steps) // 2] * factor
            fixed = replace(training, local_steps=local_steps, local_lr=low**0.3 * high**0.7, decay_share=0.0)
            found = curves(Evaluation(f"{i}", task, fixed, num_rounds=rounds, num_runs=RUNS, seed=SEED))
            ratios = {
                name: [round(x, 4) for x in (loss / found["present"]).log().mean(1).tolist()]
                for name, loss in found.items()
                if name != "present"
            }
            with args.out.open("a") as file:
                file.write(json.dumps({"task": i, "local_steps": local_steps, "factor": factor, **ratios}) + "\n")


if __name__ == "__main__":
    main()
