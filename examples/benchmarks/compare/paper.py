"""Compare learned optimizers with tuned baselines over the horizon of arXiv 2312.02204, as that paper does.

Each baseline is tuned over its whole grid by successive halving: rung after rung takes more of the rounds, and keeps
the settings of lowest training loss. The last rung takes all rounds, from tuning seeds of its own. The best setting of
each baseline and the networks, which have nothing to tune, then take all rounds from fresh seeds. The data-parallel
baselines take one step per communication, on the K·H batches that the others see between two. A killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from examples.benchmarks.compare.data import load_task
from examples.benchmarks.compare.methods import GRIDS, Setting, settings
from examples.benchmarks.compare.plot import smooth
from examples.benchmarks.compare.run import Runner, add_experiment
from examples.benchmarks.report import UsageError, machine, read_rows
from lightning_lopt.costs import count, positive, table
from lightning_lopt.meta.base import DataTask

BASELINES = ("local_sgd", "slowmo", "parallel_adam", "parallel_sgd", "diloco")
Rows = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command line."""
    add_experiment(parser)
    parser.set_defaults(task="fashion_mnist", rounds=1000)
    parser.add_argument("--methods", nargs="*", choices=[m for m in GRIDS if m != "learned"], default=BASELINES)
    parser.add_argument("--networks", nargs="*", default=["default"], help="names of bundled weights, or files")
    parser.add_argument("--network-lr", type=positive, default=0.5, help="gamma of the networks")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.3, 1.0], help="of the rounds, by rung")
    parser.add_argument("--keep", nargs="+", type=count, default=[100, 12], help="settings that enter the later rungs")
    parser.add_argument("--tuning-seeds", nargs="+", type=int, default=[1000, 1001, 1002], help="of the last rung")
    parser.add_argument("--seeds", nargs="+", type=int, default=[*range(10)], help="fresh ones")
    parser.add_argument("--marks", nargs="+", type=count, default=[100, 300, 1000], help="rounds to report")


def setting_of(row: Mapping[str, Any]) -> Setting:
    """The setting of a run."""
    return Setting(row["method"], row["local_lr"], row["options"])


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """The settings of some runs by final training loss, mean over their seeds; those that diverged come last.

    Example:
        >>> rows = [{"method": "diloco", "local_lr": lr, "options": {}, "losses": [lr, lr]} for lr in (2.0, 1.0)]
        >>> [setting.local_lr for setting in ranked(rows)]
        [1.0, 2.0]
    """
    finals: dict[str, list[float]] = {}
    named: dict[str, Setting] = {}
    for row in rows:
        setting = setting_of(row)
        named[_key(setting)] = setting
        finals.setdefault(_key(setting), []).append(smooth(row["losses"])[-1])
    return [named[key] for key in sorted(finals, key=lambda key: statistics.fmean(finals[key]))]


def _key(setting: Setting) -> str:
    return json.dumps([setting.method, setting.local_lr, dict(setting.options)])


class Book:
    """Runs settings from seeds, except where the file holds the run already.

    Args:
        args: The options of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._runners: dict[str | None, Runner] = {}
        self._found: Rows = read_rows(args.out, ("method", "losses")) if args.out.exists() else []

    def run(
        self,
        grid: Sequence[Setting],
        seeds: Sequence[int],
        num_rounds: int,
        stage: str,
        network: str | None = None,
        test: DataTask | None = None,
    ) -> Rows:
        """The runs of settings of one method.

        Args:
            grid: Settings.
            seeds: Seeds of the runs.
            num_rounds: Rounds of each run.
            stage: Mark of the runs in the file.
            network: Name or file of the weights of the method ``"learned"``.
            test: Test data, whose losses are written, too.
        """
        if network not in self._runners:
            self._runners[network] = Runner(argparse.Namespace(**{**vars(self._args), "network": network}))
        missing = {_key(setting): {*seeds} for setting in grid}
        rows = []
        for row in self._found:
            own = missing.get(_key(setting_of(row)), set())
            kind = (row.get("stage"), row.get("network"), len(row["losses"]) - 1)
            if kind == (stage, network, num_rounds) and row["seed"] in own:
                own.remove(row["seed"])
                rows.append(row)
        together: dict[tuple[int, ...], list[Setting]] = {}
        for setting in grid:
            together.setdefault(tuple(sorted(missing[_key(setting)])), []).append(setting)
        for rest, group in together.items():
            if rest:
                marks = {"stage": stage, "network": network}
                rows += self._runners[network].run(group, rest, num_rounds, test, **marks)
        return rows


def halve(book: Book, args: argparse.Namespace, method: str) -> Setting:
    """The best setting of a baseline."""
    grid = settings(method, args.local_lr)
    *early, last = args.shares
    for rung, (share, keep) in enumerate(zip(early, args.keep, strict=True)):
        if len(grid) > keep:
            rows = book.run(grid, args.tuning_seeds[:1], max(1, round(share * args.rounds)), f"rung {rung}")
            grid = ranked(rows)[:keep]
    return ranked(book.run(grid, args.tuning_seeds, max(1, round(last * args.rounds)), "last rung"))[0]


def paired(rows: Rows, base: Rows) -> tuple[float, float]:
    """The logarithm of the ratio of final training losses, mean over the seeds and two standard errors.

    Example:
        >>> rows, base = ([{"seed": s, "losses": [x * (s + 1)]} for s in (0, 1)] for x in (1.0, 2.0))
        >>> paired(rows, base)
        (-0.6931471805599453, 0.0)
    """
    finals = {row["seed"]: smooth(row["losses"])[-1] for row in base}
    ratios = [math.log(smooth(row["losses"])[-1] / finals[row["seed"]]) for row in rows]
    if not all(map(math.isfinite, ratios)):
        return math.inf, math.inf
    spread = statistics.stdev(ratios) if len(ratios) > 1 else math.nan
    return statistics.fmean(ratios), 2 * spread / math.sqrt(len(ratios))


def summary(runs: Mapping[str, Rows], marks: Sequence[int]) -> list[dict[str, Any]]:
    """One row per method, by final training loss; ratios are to the best baseline."""

    def mean(rows: Rows, kind: str, mark: int) -> float:
        return statistics.fmean(smooth(row[kind])[mark] for row in rows)

    last = min(len(row["losses"]) for rows in runs.values() for row in rows) - 1
    marks = [mark for mark in marks if mark < last]
    order = sorted(runs, key=lambda name: mean(runs[name], "losses", last))
    best = next((name for name in order if runs[name][0]["method"] != "learned"), order[0])
    lines = []
    for name in order:
        rows = runs[name]
        ratio, error = paired(rows, runs[best])
        options = {"gamma": rows[0]["local_lr"], **rows[0]["options"]}
        lines.append(
            {
                "method": name,
                "setting": " ".join(f"{key} {value:.3g}" for key, value in options.items()),
                **{f"train {mark}": mean(rows, "losses", mark) for mark in (*marks, last)},
                f"test {last}": mean(rows, "test_losses", last),
                f"log ratio to {best}": f"{ratio:+.3f} ± {error:.3f}",
            }
        )
    return lines


def main(args: argparse.Namespace) -> None:
    """Tune the baselines, run the winners and the networks, and print how they compare."""
    if len(args.keep) != len(args.shares) - 1:
        raise UsageError(f"--keep needs one number for each rung after the first, not {args.keep} for {args.shares}.")
    if overlap := {*args.seeds} & {*args.tuning_seeds}:
        raise UsageError(f"--seeds must be fresh, but {sorted(overlap)} are among --tuning-seeds.")
    book, test = Book(args), load_task(args.task, args.data, "test")
    runs = {}
    for method in args.methods:
        best = halve(book, args, method)
        runs[method] = book.run([best], args.seeds, args.rounds, "final", test=test)
    for network in args.networks:
        learned = [Setting("learned", args.network_lr)]
        runs[network] = book.run(learned, args.seeds, args.rounds, "final", network, test)
    print(f"\n{table(summary(runs, args.marks))}\n")
    print(f"{args.out}: {machine()}")
