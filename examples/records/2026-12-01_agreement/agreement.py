"""Variants of the blended Nesterov step that see the update of every worker, against that step.

PYTHONPATH=.:examples python examples/records/2026-12-01_agreement/agreement.py FASHION_MNIST CIFAR10 [--unlike] > OUT.jsonl

The tasks are those of `recipes.default`, with γ in the middle and near the upper end of its range, each constant and along
a cosine, three runs each, paired. With --unlike, on the tasks with labels alone, each worker has its own part of the data:
the examples in the order of label + Gaussian noise, cut into K.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import recipes
import torch
from meta_train import load_images

from lightning_lopt.functional.ada import factoring, squared_norm
from lightning_lopt.functional.blended import (
    BlendedSettings,
    base_forms,
    complement_of_round,
    damp_model,
    nesterov,
    norm_ratio,
    zero_where_unused,
)
from lightning_lopt.functional.damping import damped
from lightning_lopt.functional.whitening import KEEP, update_grams
from lightning_lopt.meta.outer import BlendedStep
from lightning_lopt.meta.simulation import Simulation
from lightning_lopt.meta.unroll import step_anchors

BASE = "base step"
VARIANTS = {
    "W": "Gram matrices summed over the workers' updates, not of their mean",
    "A": "step times sqrt(r), its norm kept; r = |mean_k g_k| / mean_k |g_k| for each coordinate",
    "B": "step times r, its norm kept",
    "C": "step times sqrt(r)",
    "S": "as A, before the step is orthogonalised and whitened",
    "T": "lr times 0.8 + 0.4 a, a = (K ρ - 1) / (K - 1) in [0, 1], ρ = |mean g_k|² / mean |g_k|² of the tensor",
}


def scaled(step, factor, keep_norm):
    result = step * factor
    if not keep_norm:
        return result
    old, new = (x.square().sum((2, 3, 4), keepdim=True) for x in (step, result))
    return result * (old / new.clamp(min=1e-30)).sqrt()


def step_tensor(tensor, settings, factor, variant):
    """`functional.blended._step`, with a variant."""
    param, state = tensor.param, tensor.state
    factors = factoring(tuple(param.shape[1:]))
    grad = damped(tensor.grad, factor)
    grads = (tensor.worker_grads * factor.view(-1, *[1] * (tensor.worker_grads.dim() - 1))).to(param.dtype)
    num_workers = grads.shape[1]
    ratio = factors.matrices(grads.mean(1).abs() / grads.abs().mean(1).clamp(min=1e-30))
    complement = complement_of_round(1 - settings.momentum[:, None], tensor.round_idx, tensor.retained_momentum)
    shrink = norm_ratio(state, squared_norm(grad)).clamp(max=1)
    if variant == "W":
        before, sums = (state.left_gram.clone(), state.right_gram.clone()), [0, 0]
        for k in range(num_workers):
            state.left_gram.zero_(), state.right_gram.zero_()
            update_grams(state, grads[:, k].contiguous())
            sums = [total + gram / num_workers for total, gram in zip(sums, (state.left_gram, state.right_gram))]
        for gram, old, new in zip((state.left_gram, state.right_gram), before, sums):
            gram.copy_(KEEP * old + new)
    else:
        update_grams(state, grad)
    matrices = factors.matrices(grad)
    state.momentum.mul_(shrink.view(-1, 1, 1, 1, 1)).lerp_(matrices, complement[..., None, None, None])
    step = nesterov(matrices, state.momentum, complement)
    if variant == "S":
        step = scaled(step, ratio.sqrt(), keep_norm=True)
    forms = base_forms(step, state, factors, param)
    weights = (settings.lr[:, None] * settings.blend)[..., None, None, None]
    step = zero_where_unused((weights * forms).sum(1, keepdim=True), forms)
    if variant in "ABC":
        step = scaled(step, ratio if variant == "B" else ratio.sqrt(), keep_norm=variant != "C")
    if variant == "T":
        share = grads.mean(1).flatten(1).square().sum(1) / grads.flatten(2).square().sum(2).mean(1).clamp(min=1e-30)
        signal = ((share - 1 / num_workers) / (1 - 1 / num_workers)).clamp(0, 1)
        step = step * (0.8 + 0.4 * signal).view(-1, 1, 1, 1, 1)
    param.sub_(factors.restore(step, param))


class AgreeingStep(BlendedStep):
    """The blended Nesterov step with a variant."""

    def __init__(self, anchor, variant):
        some = next(iter(anchor.values()))
        self.by_hand, self.variant = BlendedSettings.by_hand(len(some), some), variant
        super().__init__(anchor, self.by_hand)

    def __call__(self, anchor, training):
        if self.variant == BASE:
            return super().__call__(anchor, training)

        def step(tensors):
            factor = damp_model(tensors, [tensor.state for tensor in tensors])
            for tensor in tensors:
                step_tensor(tensor, self.by_hand, factor, self.variant)

        step_anchors(
            anchor, training.workers, self.states, step, training.round_idx, worker_grads=True, **training.settings
        )


def split_by_label(task, num_workers):
    """The task with its examples in parts, one after the other."""
    generator = torch.Generator().manual_seed(5)
    labels = task.data[1].float()
    order = (labels + torch.randn(len(labels), generator=generator)).argsort()
    size = len(order) // num_workers
    parts = [
        order[k * size : (k + 1) * size][torch.randperm(size, generator=generator)] for k in range(num_workers)
    ]
    return task.on([part[torch.cat(parts)].contiguous() for part in task.data])


@torch.no_grad()
def final(task, training, rates, kinds, num_rounds, seed, unlike, variant):
    """Logarithm of the loss over the last three rounds, + 1e-4, of each run."""
    split = split_by_label(task, training.num_workers) if unlike else task
    count, num_workers = len(rates), training.num_workers
    generator = torch.Generator().manual_seed(seed)
    starts = [training.init(task, generator) for _ in range(count)]
    anchor = {name: torch.cat([start[name] for start in starts]).clone() for name in starts[0]}
    x = torch.arange(num_rounds) / num_rounds
    cosine = 0.5 * (1 + torch.cos(math.pi * x))
    gammas = torch.stack([r * (torch.ones_like(x) if k == "constant" else cosine) for r, k in zip(rates, kinds)], 1)
    simulation = Simulation(task, anchor, num_workers, AgreeingStep(anchor, variant), training.optimizer)
    sample = tuple(part.flatten(0, 1) for part in task.batch(24, generator))
    sample = tuple(part.expand(count, *part.shape) for part in sample)
    losses = []
    for t in range(num_rounds):
        if unlike:
            size = len(task.data[0]) // num_workers
            most, own = size - task.batch_size + 1, size * torch.arange(num_workers).repeat(count)
            places = [
                torch.randint(most, (count * num_workers,), generator=generator) + own
                for _ in range(training.steps[0])
            ]
            batches = [split.read(place) for place in places]
        else:
            batches = [task.batch(count * num_workers, generator) for _ in range(training.steps[0])]
        simulation.round(batches, gammas[t], torch.full((count,), t))
        if t >= num_rounds - 3:
            losses.append(task.loss(anchor, sample))
    bounded = torch.stack(losses).nan_to_num(nan=task.max_loss, posinf=task.max_loss).clamp(0, task.max_loss)
    return bounded.mean(0).add(1e-4).log()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs=2, type=Path)
    parser.add_argument("--unlike", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks = recipes.default([load_images(folder) for folder in args.data], 0).tasks
    if args.unlike:
        tasks = [(task, local) for task, local in tasks if task.data[1].dim() == 1]
    for i, (task, training) in enumerate(tasks):
        low, high = training.local_lr
        rates = torch.tensor([(low * high) ** 0.5, high**0.85 * low**0.15]).repeat_interleave(6)
        kinds = (["constant"] * 3 + ["cosine"] * 3) * 2
        num_rounds = max(20, min(60, 800 // training.steps[0]))
        began = time.process_time()
        of = partial(final, task, training, rates, kinds, num_rounds, 77 + i, args.unlike)
        base = of(BASE)
        line = {"task": i, "name": str(task), "optimizer": training.optimizer.kind}
        line |= {"K": training.num_workers, "H": training.steps[0], "rounds": num_rounds}
        for variant in VARIANTS:
            ratios = (of(variant) - base).view(4, 3)  # γ in the middle, constant and decaying; at the upper end
            line[variant] = [[round(ratio, 3) for ratio in row] for row in ratios.tolist()]
        line["cpu_s"] = round(time.process_time() - began, 1)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
