"""Compare outer steps on ten held-out tasks, each with a constant and with a decaying local learning rate.

A list is fixed before any outer step but averaging has run on its tasks, and no decision may look at them: a step is
tuned or meta-trained elsewhere, frozen in a commit, and then run here. Once results on a list have led to a decision,
it is spent, and the next one counts. All methods have the same seeds, and each is compared with the reference seed by
seed: the logarithm of the ratio of the final losses, the mean over ten seeds and its 95 % interval, with constant and
with decaying γ apart.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from examples.benchmarks.compare.clients import Shared
from examples.benchmarks.compare.data import load_task
from examples.benchmarks.compare.methods import Setting
from examples.benchmarks.compare.plot import smooth
from examples.benchmarks.compare.simulate import Experiment, groups, simulate
from examples.benchmarks.report import UsageError, append_rows, machine, read_rows
from lightning_lopt.controller import Controller
from lightning_lopt.costs import count, table
from lightning_lopt.functional.blended import BlendedSettings
from lightning_lopt.functional.control import controlled
from lightning_lopt.meta.local import LocalOptimizer, OptimizerKind
from lightning_lopt.optim.learned import resolve_network


@dataclass(frozen=True)
class HeldOut:
    """A held-out task with its local training.

    Attributes:
        task: Name of the task, for `load_task`.
        optimizer: Kind of the local optimizer.
        local_lr: Local learning rate γ, with both schedules: of some in steps of about 3, the best for averaging with
            decaying γ (seed 1000).
        num_workers: Number of workers, K.
        local_steps: Number of local steps per round, H.
        num_rounds: Number of rounds.
    """

    task: str
    optimizer: OptimizerKind
    local_lr: float
    num_workers: int
    local_steps: int
    num_rounds: int


HELD_OUT: dict[str, tuple[HeldOut, ...]] = {
    # Spent: meta-training took in Muon, attention and wider squared errors after results on these.
    "first": (  # its γ was the largest of three in all tasks
        HeldOut("breast_cancer", "momentum", 0.1, 2, 32, 60),
        HeldOut("friedman", "adamw", 0.01, 2, 64, 40),
        HeldOut("photograph", "muon", 0.01, 8, 4, 100),
        HeldOut("shakespeare", "sgd", 1.0, 16, 8, 60),
        HeldOut("novels", "muon", 0.01, 16, 4, 80),
        HeldOut("fashion_mnist_conv", "momentum", 0.1, 8, 4, 80),
        HeldOut("fashion_mnist_vit", "muon", 0.01, 2, 8, 60),
        HeldOut("fashion_mnist_autoencoder", "adamw", 0.003, 4, 8, 60),
        HeldOut("shakespeare_lm", "adamw", 0.01, 4, 16, 50),
        HeldOut("cifar10_narrow", "sgd", 0.3, 4, 16, 50),
    ),
    "second": (
        HeldOut("diabetes", "sgd", 0.3, 4, 32, 40),
        HeldOut("digits_halves", "momentum", 0.03, 8, 4, 80),
        HeldOut("digits_diffusion", "adamw", 0.01, 4, 16, 50),
        HeldOut("flower_factors", "adamw", 0.3, 16, 8, 60),
        HeldOut("fashion_mnist_distilled", "sgd", 0.3, 2, 64, 40),
        HeldOut("fashion_mnist_residual", "momentum", 0.03, 4, 8, 50),
        HeldOut("cifar10_masked", "adamw", 0.01, 2, 16, 40),
        HeldOut("three_texts", "muon", 0.01, 2, 16, 40),
        HeldOut("novels_words", "muon", 0.03, 8, 4, 60),
        HeldOut("shakespeare_recurrent", "muon", 0.1, 4, 8, 50),
    ),
}
OPTIONS: dict[str, tuple[str, Mapping[str, Any]]] = {  # method and options of the outer optimizer, by name
    "local_sgd": ("local_sgd", {}),
    "diloco": ("diloco", {"lr": 0.7, "momentum": 0.9}),
    "base_step": ("base_step", {}),
    "phase": ("base_step", {"phase": 0.5}),
    "learned": ("learned", {}),
    "controlled": ("controlled", {}),
    "its constants": ("base_step", {}),  # those of `constants`
    "searched": ("base_step", {}),  # those of --settings
}
GIVEN = ("its constants", "searched")  # their options come from elsewhere
SCHEDULES = {"constant": False, "decaying": True}
SETTINGS = ("LR", "MOMENTUM", "PLAIN", "ORTHOGONAL", "WHITENED")  # the last three are the blend


def constants(controller: Controller) -> dict[str, Any]:
    """Settings of a controller where each input has its mean, the middle of its ends: what is left without inputs."""
    weights = controller.weights()
    mean = (weights.low + weights.high) / 2
    lr, momentum, blend = controlled(mean, weights, BlendedSettings.by_hand(1, mean.double()))
    return {"lr": lr.item(), "momentum": momentum.item(), "blend": tuple(blend[0].tolist())}


def final_loss(row: Mapping[str, Any]) -> float:
    """Mean loss over the last rounds, at most that which a diverged run counts."""
    return min(smooth(row["losses"])[-1], row["max_loss"])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; infinite for one value.

    Example:
        >>> [round(x, 3) for x in interval([0.1, 0.2, 0.3])]
        [0.2, 0.248]
    """
    from scipy.stats import t  # comes with scikit-learn, an extra

    if len(values) == 1:
        return values[0], math.inf
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(t.ppf(0.975, len(values) - 1)) * error


def summary(rows: Sequence[Mapping[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Compare each method with the reference: a line for each task, then their means.

    Args:
        rows: Lines that `main` wrote.
        reference: Name of the method to compare with.

    Returns:
        Logarithms of the ratio of the final losses, below 0 where the method ends lower, by schedule.

    Raises:
        ValueError: There is no run of the reference.
    """
    losses = {(row["task"], row["schedule"], row["name"], row["seed"]): final_loss(row) for row in rows}
    if reference not in {row["name"] for row in rows}:
        raise UsageError(f"There is no run of {reference} to compare with: add it to --methods.")
    ratios: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for (task, schedule, name, seed), loss in losses.items():
        own = losses.get((task, schedule, reference, seed))
        if own is not None and name != reference:
            ratios[name, task, schedule].append(math.log(loss / own))
    lines = []
    for name in dict.fromkeys(name for name, *_ in ratios):
        tasks = list(dict.fromkeys(task for own, task, _ in ratios if own == name))
        of_tasks: dict[str, list[float]] = defaultdict(list)
        for task in tasks:
            line: dict[str, Any] = {"method": name, "task": task}
            for schedule in SCHEDULES:
                values = ratios.get((name, task, schedule))
                line[schedule] = None if values is None else _show(values)
                line[f"{schedule}, seeds"] = None if values is None else len(values)
                of_tasks[schedule] += [] if values is None else [statistics.fmean(values)]
            lines.append(line)
        line = {"method": name, "task": f"mean of {len(tasks)} tasks"}
        for schedule in SCHEDULES:
            line |= {schedule: _show(of_tasks[schedule]) if of_tasks[schedule] else None, f"{schedule}, seeds": None}
        lines.append(line)
    return lines


def _show(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:+.3f} ± {half:.3f}"


def run(held_out: HeldOut, args: argparse.Namespace, done: set[tuple[str, str, str, int]]) -> None:
    """Run a task with all schedules and methods, but for the runs that are done."""
    todo = {
        (schedule, name): [seed for seed in args.seeds if (held_out.task, schedule, name, seed) not in done]
        for schedule in args.schedules
        for name in args.methods
    }
    if not any(todo.values()):
        return
    task = load_task(held_out.task, args.data)
    controller = Controller.load(args.controller) if args.controller else Controller.bundled()
    for (schedule, name), seeds in todo.items():
        if not seeds:
            continue
        method, options = OPTIONS[name]
        experiment = Experiment(
            held_out.num_workers,
            held_out.local_steps,
            held_out.num_rounds,
            LocalOptimizer(held_out.optimizer),
            SCHEDULES[schedule],
        )
        if name == "its constants":
            options = constants(controller)
        elif name == "searched":
            lr, momentum, *blend = args.settings
            options = {"lr": lr, "momentum": momentum, "blend": tuple(blend)}
        weights = resolve_network(args.network) if method == "learned" else controller
        setting = Setting(method, held_out.local_lr, options)
        for group in groups(task, [setting], held_out.num_workers * len(seeds)):
            runs = simulate(Shared(task), group, seeds, experiment, weights)
            rows = [
                {
                    **asdict(held_out),
                    "schedule": schedule,
                    "name": name,
                    "options": dict(options),
                    "network": args.network if method == "learned" else None,
                    "controller": str(args.controller) if args.controller and method == "controlled" else None,
                    "seed": seed,
                    "max_loss": task.max_loss,
                    "left_out": left_out,
                    "losses": [float(f"{x:.5g}") for x in curve],
                }
                for seed, curve, left_out in zip(seeds, runs.losses[0].tolist(), runs.left_out[0].tolist(), strict=True)
            ]
            append_rows(args.out, rows)
        print(f"{held_out.task}, {schedule}: {name}, {len(seeds)} seeds", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line."""
    names = [each.task for tasks in HELD_OUT.values() for each in tasks]
    add = parser.add_argument
    add("out", type=Path, help="file that a line per run is appended to; runs that it holds are not repeated")
    add("--data", type=Path, required=True, help="folder with Fashion-MNIST, CIFAR-10 and the texts, at any depth")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--list", choices=list(HELD_OUT), default="second")
    some.add_argument("--tasks", nargs="+", choices=names, help="tasks in the place of a list")
    add("--schedules", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    add("--methods", nargs="+", choices=list(OPTIONS), default=["base_step", "learned"])
    add("--reference", choices=list(OPTIONS), default="base_step", help="method that the others are compared with")
    add("--network", help="network of the method learned: a name or a file (default: the bundled default)")
    add("--controller", type=Path, help="file of the controller (default: the bundled one); each needs its own out")
    add("--settings", nargs=5, type=float, metavar=SETTINGS, help="of the method searched: a blended Nesterov step")
    add("--seeds", nargs="+", type=int, default=list(range(10)))
    add("--threads", type=count, default=1, help="threads of torch")


def main(args: argparse.Namespace) -> None:
    """Run the methods on the held-out tasks, and print the comparison."""
    if "searched" in args.methods and not args.settings:
        raise UsageError(f"The method searched needs its --settings {' '.join(SETTINGS)}.")
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(args.out, ("task", "schedule", "name", "seed", "losses")) if args.out.exists() else []
    done = {(row["task"], row["schedule"], row["name"], row["seed"]) for row in rows}
    names = args.tasks or [each.task for each in HELD_OUT[args.list]]
    for held_out in (each for tasks in HELD_OUT.values() for each in tasks if each.task in names):
        run(held_out, args, done)
    print(table(summary(read_rows(args.out), args.reference)))
    print(f"{args.out}: {machine()}")
