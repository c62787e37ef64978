"""Simulate methods with all settings of their grids, and append the loss curves to a file of JSON lines."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from examples.benchmarks.compare.clients import Clients, Shared
from examples.benchmarks.compare.data import TASKS, load_task
from examples.benchmarks.compare.methods import GRIDS, Setting, settings
from examples.benchmarks.compare.plot import read, tune
from examples.benchmarks.compare.simulate import Experiment, groups, simulate
from examples.benchmarks.report import UsageError, append_rows, machine
from lightning_lopt.costs import count, positive
from lightning_lopt.meta.base import DataTask
from lightning_lopt.meta.local import LocalOptimizer, OptimizerKind
from lightning_lopt.network import AdaMLP
from lightning_lopt.optim.learned import resolve_network


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add the options of the experiment to a command line."""
    parser.add_argument("out", type=Path, help="file that a line per run is appended to")
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data", type=Path, help="folder with images or texts, for the tasks that need them")
    parser.add_argument(
        "--local-lr", nargs="+", type=positive, default=[1.0, 0.5, 0.3, 0.1], help="grid of local learning rates"
    )
    parser.add_argument("--local-optimizer", choices=get_args(OptimizerKind), default="sgd")
    parser.add_argument("--decay", action="store_true", help="lower the local learning rate to 0 along a cosine")
    parser.add_argument("--num-workers", type=count, default=8)
    parser.add_argument("--local-steps", type=count, default=4)
    parser.add_argument("--rounds", type=count, default=200)
    parser.add_argument("--clients", type=count, help="number of clients among whom the data is split, K per round")
    parser.add_argument("--alpha", type=positive, default=0.1, help="concentration of the split among clients")
    parser.add_argument("--network", help="name of bundled weights, or a file (default: the bundled default)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=count, help="threads of torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line."""
    add_experiment(parser)
    parser.add_argument("--methods", nargs="+", choices=list(GRIDS), default=["local_sgd", "learned"])
    parser.add_argument("--best-of", type=Path, help="file whose best setting of each method replaces its grid")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])


class Runner:
    """Simulations of one experiment, written to a file with a line per run.

    Args:
        args: Parsed options of `add_experiment`.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        if args.threads:
            torch.set_num_threads(args.threads)
        task = load_task(args.task, args.data).to(torch.device(args.device))
        self.data = Clients(task, args.clients, args.alpha, args.num_workers) if args.clients else Shared(task)
        self.experiment = Experiment(
            args.num_workers, args.local_steps, args.rounds, LocalOptimizer(args.local_optimizer), args.decay
        )
        if len(set(args.seeds)) < len(args.seeds):
            raise UsageError(f"--seeds {args.seeds} repeats a seed, which would count as two runs.")
        self._network, self._out = args.network, args.out
        self._common = {
            "task": args.task,
            "num_workers": args.num_workers,
            "local_steps": args.local_steps,
            "local_optimizer": args.local_optimizer,
            "decay": args.decay,
            "clients": args.clients,
            "alpha": args.alpha if args.clients else None,
            "parameters": sum(p.numel() for p in task.init(1, torch.Generator()).values()),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)

    def run(
        self,
        grid: Sequence[Setting],
        seeds: Sequence[int],
        num_rounds: int | None = None,
        test: DataTask | None = None,
        **marks: Any,
    ) -> list[dict[str, Any]]:
        """Simulate settings of one method.

        Args:
            grid: Settings of the method.
            seeds: Seeds of the runs.
            num_rounds: Number of rounds; None for that of the experiment.
            test: Test data, whose losses are written, too.
            marks: Further entries of each line.

        Returns:
            The lines that were written.

        Raises:
            ValueError: The network is made for another number of workers.
        """
        rows: list[dict[str, Any]] = []
        if not grid:
            return rows
        experiment = replace(self.experiment, num_rounds=num_rounds or self.experiment.num_rounds)
        method = grid[0].method
        network = resolve_network(self._network).to(self.data.task.device) if method == "learned" else AdaMLP()
        if network.num_inputs not in (1, experiment.num_workers):
            raise UsageError(
                f"{self._network} is made for {network.num_inputs} workers, not for {experiment.num_workers}."
            )
        print(f"{self.data.task}: {method}, {len(grid)} settings, {len(seeds)} seeds", flush=True)
        for group in groups(self.data.task, grid, self.experiment.num_workers * len(seeds)):
            start = time.perf_counter()
            runs = simulate(self.data, group, seeds, experiment, network, test)
            seconds = time.perf_counter() - start
            new = [
                {
                    **self._common,
                    **vars(setting),
                    **marks,
                    "seed": seed,
                    "group_seconds": round(seconds, 4),
                    "left_out": left_out,
                    "losses": [float(f"{x:.5g}") for x in curve],
                }
                for setting, *of_setting in zip(group, runs.losses.tolist(), runs.left_out.tolist(), strict=True)
                for seed, curve, left_out in zip(seeds, *of_setting, strict=True)
            ]
            if runs.test_losses is not None:
                for row, curve in zip(new, runs.test_losses.flatten(0, 1).tolist(), strict=True):
                    row["test_losses"] = [float(f"{x:.5g}") for x in curve]
            append_rows(self._out, new)
            rows += new
            print(f"  {len(group)} settings in {seconds:.1f} s", flush=True)
        return rows


def _best(path: Path) -> dict[str, list[Setting]]:
    return {t.method: [Setting(t.method, t.local_lr, t.options)] for t in tune(read(path))}


def main(args: argparse.Namespace) -> None:
    """Simulate the methods on one task."""
    runner = Runner(args)
    best = _best(args.best_of) if args.best_of else {}
    if args.best_of and (missing := [method for method in args.methods if method not in best]):
        raise UsageError(f"{args.best_of} has no settings of {missing}. Give its methods: --methods {' '.join(best)}.")
    for method in args.methods:
        runner.run(best.get(method, []) if args.best_of else settings(method, args.local_lr), args.seeds)
    print(f"{args.out}: {machine()}\nTables and figures: python -m examples.benchmarks plot {args.out}")
