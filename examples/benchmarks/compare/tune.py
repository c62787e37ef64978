"""Tune every baseline by successive halving, then run the best settings and the learned optimizer with fresh seeds.

All settings of a baseline's grid are run for 30 % of the rounds with one seed, and its best 16 for all rounds with that
seed. The best 3 of all baselines, and the best of each, are run for all rounds with fresh seeds. The learned optimizer
needs no tuning: it runs with the fresh seeds, at the best local learning rate of Local SGD.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from examples.benchmarks.compare import plot
from examples.benchmarks.compare.methods import GRIDS, Setting, settings
from examples.benchmarks.compare.run import Runner, add_experiment
from examples.benchmarks.report import UsageError, machine
from lightning_lopt.costs import count, positive, table

BASELINES = [method for method in GRIDS if method != "learned"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line."""
    add_experiment(parser)
    parser.add_argument("--methods", nargs="+", choices=BASELINES, default=BASELINES, help="baselines, with local_sgd")
    parser.add_argument("--tuning-seed", type=int, default=1000, help="seed of the first two stages")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the last stage")
    parser.add_argument("--share", type=positive, default=0.3, help="fraction of the rounds in the first stage")
    parser.add_argument("--keep", type=count, default=16, help="settings of each baseline in the second stage")
    parser.add_argument("--best", type=count, default=3, help="settings of all baselines in the last stage")


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """Rank the settings of runs with one seed by final loss; those that diverged come last.

    Example:
        >>> rows = [{"method": "diloco", "local_lr": lr, "options": {}, "losses": [lr, lr]} for lr in (2.0, 1.0)]
        >>> [setting.local_lr for setting in ranked(rows)]
        [1.0, 2.0]
    """
    by_loss = sorted(rows, key=lambda row: plot.smooth(row["losses"])[-1])
    return [Setting(row["method"], row["local_lr"], row["options"]) for row in by_loss]


def halve(runner: Runner, args: argparse.Namespace) -> list[Setting]:
    """Run the first two stages, and return the settings of the last."""
    short = max(1, round(args.share * args.rounds))
    finals = []
    for method in args.methods:
        grid, seeds = settings(method, args.local_lr), [args.tuning_seed]
        if len(grid) > args.keep:
            grid = ranked(runner.run(grid, seeds, short, stage="first"))[: args.keep]
        finals += runner.run(grid, seeds, stage="second")
    best = ranked(finals)
    families = {setting.method: setting for setting in reversed(best)}
    return best[: args.best] + [setting for setting in families.values() if setting not in best[: args.best]]


def main(args: argparse.Namespace) -> None:
    """Tune the baselines on one task, and print the table with the learned optimizer."""
    if "local_sgd" not in args.methods:
        raise UsageError("--methods must include local_sgd: the learned optimizer runs at its best learning rate.")
    start = time.perf_counter()
    runner = Runner(args)
    chosen: dict[str, list[Setting]] = defaultdict(list)
    for setting in halve(runner, args):
        chosen[setting.method].append(setting)
    chosen["learned"] = [Setting("learned", chosen["local_sgd"][0].local_lr)]
    rows = [row for grid in chosen.values() for row in runner.run(grid, args.seeds, stage="final")]
    print(f"\n{table(plot.summary(plot.tune(rows), plot.best_baseline(rows)))}\n")
    print(f"{args.out}: {time.perf_counter() - start:.0f} s, {machine()}")
