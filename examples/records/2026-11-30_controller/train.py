"""Meta-train the linear controller of the blended Nesterov step by evolution strategies on whole unrolls.

PYTHONPATH=.:examples python examples/records/2026-11-30_controller/train.py FASHION_MNIST CIFAR10 OUT [--start FILE] [--sweeps 40] [--seed 0]

A sweep takes 16 antithetic pairs of runs on each of 24 tasks. A pair shares its start, data, γ and schedule of γ, and one
perturbation for its whole unroll; half of the pairs keep γ constant. The differences of the pairs, in units of their
running root mean square on the task (at least 0.02) and clipped to ±2, are regressed on the perturbations of the sweep,
and the slopes go into a step with momentum. Weights are of standardised inputs. OUT/state.safetensors holds all that is
needed to go on after a kill: the same command does.

Since then: python examples/meta_train.py --recipe controller.
"""

import argparse
import json
import math
import time
from pathlib import Path

import recipes
import torch
from meta_train import load_images

from safetensors.torch import load_file, save_file

from lightning_lopt import Controller
from lightning_lopt.functional.blended import BlendedSettings
from lightning_lopt.functional.control import INPUTS, OUTPUTS, ControllerWeights, observe
from lightning_lopt.meta import ImageMLP, LocalOptimizer, LocalTraining, outer
from lightning_lopt.meta.local import half_cosine
from lightning_lopt.meta.simulation import Simulation

PAIRS, SIGMA, LR, MOMENTUM, DECAY, FLOOR = 16, 0.2, 0.018, 0.8, 0.95, 0.02
RIDGE, AVERAGED = 0.2, 10
NARROW = ("local_steps", "age", "grad_over_param", "aspect", "retained", "momentum_over_grad", "level")
ENDS = torch.tensor([2.0 if name in NARROW else 5.0 for name in INPUTS])  # in standard deviations
SHAPES = {
    "constant": torch.ones_like,
    "cosine": lambda x: 0.5 * (1 + torch.cos(math.pi * x)),
    "linear": lambda x: 1 - x,
    "stable, then linear": lambda x: ((1 - x) / 0.3).clamp(max=1),
    "warm-up, cosine": lambda x: torch.where(
        x < 0.1, (x + 0.02) / 0.12, 0.5 * (1 + torch.cos(math.pi * (x - 0.1).clamp(min=0) / 0.9))
    ),
}
DECAYS = ["cosine", "linear", "stable, then linear", "cosine", "warm-up, cosine"]


def mixture(folders):
    """The tasks of the default's recipe, and four with Muon."""
    data = [load_images(Path(folder)) for folder in folders]

    def images(index, hidden, batch_size, count=None):
        return ImageMLP(*(part[:count] for part in data[index]), hidden=hidden, batch_size=batch_size, size=8)

    def muon(num_workers, local_steps, high):
        return LocalTraining(num_workers, local_steps, (1e-3, high), 0.5, LocalOptimizer("muon"), (0.5, 2.0))

    return [
        *recipes.default(data, 0).tasks,
        (images(0, (16, 16), 16), muon(4, 4, 2e-2)),
        (images(1, (32,), 8), muon(4, 8, 2e-2)),
        (recipes.source_code((16,)), muon(8, 2, 2e-2)),
        (images(0, (24, 24), 8, 1000), muon(2, 8, 1e-2)),
    ]


def draw_cell(training, generator):
    """H, K and the number of rounds of an unroll."""

    def one_of(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    local_steps = training.steps[0] * one_of(1, 1, 1, 2, 4, 4)
    num_workers = training.num_workers if one_of(0, 1) else one_of(2, 4, 8)
    rounds = one_of(12, 25, 40, 60, 60, 100)
    return local_steps, num_workers, max(10, min(rounds, 1000 // (local_steps * max(1, num_workers // 4))))


def draw_rates(training, count, generator):
    """γ of the runs, more often in the upper part of its range, and its schedules, in turn constant and decaying."""
    low, high = training.local_lr
    rates = low * (high / low) ** (torch.rand(count, generator=generator) ** 0.6)
    first = int(torch.randint(10, (), generator=generator))
    kinds = ["constant" if i % 2 == 0 else DECAYS[i // 2 % 5] for i in range(first, first + count)]
    return rates, kinds


@torch.no_grad()
def unrolls(task, training, cell, rates, kinds, copies, weights, seed):
    """Run each of R runs several times from the same start and on the same data.

    Returns the objective, log(final + 1e-3) + 0.3 · mean of log(local loss + 1e-3), and log(final + 1e-4): [copies, R].
    """
    (local_steps, num_workers, num_rounds), count = cell, len(rates)
    generator = torch.Generator().manual_seed(seed)
    starts = [training.init(task, generator) for _ in range(count)]
    anchor = {
        name: torch.cat([start[name] for start in starts]).repeat(copies, *[1] * (p.dim() - 1))
        for name, p in starts[0].items()
    }
    x = torch.arange(num_rounds) / num_rounds
    gammas = torch.stack([rate * SHAPES[kind](x) for rate, kind in zip(rates, kinds, strict=True)], 1)
    base = BlendedSettings(
        torch.full((copies * count,), 1.1),
        torch.full((copies * count,), 0.85),
        torch.tensor([0.05, 0.45, 0.5]).expand(copies * count, 3),
    )
    step = outer.ControlledStep(anchor, base, weights)
    simulation = Simulation(task, anchor, num_workers, step, training.optimizer)
    sample = (part.flatten(0, 1) for part in task.batch(24, generator))
    sample = tuple(part.expand(copies * count, *part.shape) for part in sample)
    final, local = [], []
    for t in range(num_rounds):
        draws = [task.draw(count * num_workers, generator) for _ in range(local_steps)]
        batches = (task.read(drawn.repeat(copies)) for drawn in draws)
        rounds = torch.full((copies * count,), t)
        local.append(simulation.round(batches, gammas[t].repeat(copies), rounds))
        if t >= num_rounds - 3:
            final.append(task.loss(anchor, sample))

    def mean(losses, function=lambda x: x):
        losses = torch.stack(losses).nan_to_num(nan=task.max_loss, posinf=task.max_loss).clamp(0, task.max_loss)
        return function(losses).mean(0).view(copies, count)

    last = mean(final)
    return (last + 1e-3).log() + 0.3 * mean(local, lambda x: (x + 1e-3).log()), (last + 1e-4).log()


def controller_weights(weight, mean, std):
    """Meta-parameters for the inputs as they are, from weights of standardised ones, [P, 4, 18] with the bias last."""
    raw = weight[..., :-1] / std
    return ControllerWeights(
        raw, weight[..., -1] - raw @ mean, (mean - ENDS * std).unsqueeze(0), (mean + ENDS * std).unsqueeze(0)
    )


def measure(tasks):
    """Mean and standard deviation of the inputs over runs of the base step."""
    seen, generator, real = [], torch.Generator().manual_seed(99), outer.observe

    def recorded(tensor, phase):
        seen[-1].append(real(tensor, phase))
        return seen[-1][-1]

    zero = controller_weights(torch.zeros(1, len(OUTPUTS), len(INPUTS) + 1), torch.zeros(len(INPUTS)), 1.0 + 0 * ENDS)
    outer.observe = recorded
    for i, (task, training) in enumerate(tasks):
        seen.append([])
        cell = draw_cell(training, generator)
        unrolls(task, training, cell, *draw_rates(training, 10, generator), 1, zero, 1000 + i)
    outer.observe = real
    means, squares = (torch.stack([torch.cat(each).pow(e).mean(0) for each in seen]).mean(0) for e in (1, 2))
    return means, (squares - means**2).clamp(min=1e-6).sqrt()


def validate(tasks, weight, mean, std, runs=4):
    """Log ratios of the final loss to the base step's, by task: γ in the middle and high, each constant and decaying."""
    ratios = []
    for i, (task, training) in enumerate(tasks):
        low, high = training.local_lr
        rates = torch.tensor([(low * high) ** 0.5, high**0.85 * low**0.15]).repeat_interleave(2 * runs)
        kinds = (["constant"] * runs + ["cosine"] * runs) * 2
        both = torch.stack([0 * weight, weight]).repeat_interleave(len(rates), 0)
        local_steps = training.steps[0]
        cell = local_steps, training.num_workers, max(20, min(60, 800 // local_steps))
        weights = controller_weights(both, mean, std)
        _, final = unrolls(task, training, cell, rates, kinds, 2, weights, 777 + i)
        ratios.append((final[1] - final[0]).view(4, runs).mean(1))
    return torch.stack(ratios)


def sweep(tasks, state, seed):
    """Slopes of the objective, [4, 18], and how much of its variance they explain."""
    index, size = int(state["sweep"]), state["weight"].shape
    generator = torch.Generator().manual_seed(10_000 * (seed + 1) + index)
    noises, differences = [], []
    for i in torch.randperm(len(tasks), generator=generator).tolist():
        task, training = tasks[i]
        cell = draw_cell(training, generator)
        rates, kinds = draw_rates(training, PAIRS, generator)
        noise = SIGMA / size[1] ** 0.5 * torch.randn(PAIRS, *size, generator=generator)
        both = torch.cat([state["weight"] + noise, state["weight"] - noise])
        weights = controller_weights(both, state["mean"], state["std"])
        plus, minus = unrolls(
            task, training, cell, rates, kinds, 2, weights, 7_000_000 * (seed + 1) + 1000 * index + i
        )[0]
        rms = (plus - minus).clamp(-3, 3).square().mean().sqrt()
        state["rms"][i] = rms if state["rms"][i] == 0 else 0.8 * state["rms"][i] + 0.2 * rms
        noises.append(noise.flatten(1))
        differences.append(((plus - minus) / state["rms"][i].clamp(min=FLOOR)).clamp(-2, 2))
    x, y = torch.cat(noises).double(), torch.cat(differences).double()
    gram = x.T @ x
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    slopes = torch.linalg.solve(gram, x.T @ y)
    explained = 1 - float((y - x @ slopes).square().sum() / y.square().sum())
    return slopes.float().view(size) / 2, explained


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs=2)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, help="state whose weights are the start")
    parser.add_argument("--sweeps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    tasks, file = mixture(args.data), args.out / "state.safetensors"
    if file.exists():
        state = load_file(file)
    else:
        mean, std = measure(tasks)
        zero = torch.zeros(len(OUTPUTS), len(INPUTS) + 1)
        state = {"mean": mean, "std": std, "weight": load_file(args.start)["weight"] if args.start else zero.clone()}
        state |= {"m": zero.clone(), "v": zero.clone(), "rms": torch.zeros(len(tasks)), "recent": zero[None][:0]}
        state["sweep"] = torch.tensor(0)
    for index in range(int(state["sweep"]), args.sweeps):
        began = time.process_time()
        slopes, explained = sweep(tasks, state, args.seed)
        state["sweep"] += 1
        state["m"].lerp_(slopes, 1 - MOMENTUM)
        state["v"].lerp_(slopes.square(), 1 - DECAY)
        m, v = state["m"] / (1 - MOMENTUM ** (index + 1)), state["v"] / (1 - DECAY ** (index + 1))
        rate = LR * (0.1 + 0.9 * half_cosine(index, args.sweeps))
        state["weight"] -= rate * m / (v.mean(1, keepdim=True).sqrt() + 1e-8)  # one scale for each output
        state["recent"] = torch.cat([state["recent"], state["weight"][None]])[-AVERAGED:]
        save_file({name: each.contiguous() for name, each in state.items()}, file)
        line = {"sweep": index, "explained": round(explained, 3), "cpu_s": round(time.process_time() - began, 1)}
        if (index + 1) % 10 == 0 or index + 1 == args.sweeps:
            ratios = validate(tasks, state["recent"].mean(0), state["mean"], state["std"])
            line["ratios"] = [[round(x, 3) for x in row] for row in ratios.tolist()]
        with open(args.out / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
    controller = Controller()
    weights = controller_weights(state["recent"].mean(0), state["mean"], state["std"])
    controller.load_state_dict({name: each.squeeze(0) for name, each in weights._asdict().items()})
    controller.save(args.out / "controller.safetensors", overwrite=True)


if __name__ == "__main__":
    main()
