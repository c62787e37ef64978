"""Draw where an outer step that nobody tunes ends above DiLoCo, tuned anew in each cell, and by how much.

A cell is a number of workers K, of local steps H, a local optimizer, a schedule and a local learning rate γ. γ is a
share of the edge: of the largest rate, of those in steps of 1.5, with which averaging at constant γ takes at least half
as much off the loss as with its best rate, for each optimizer and H with the first K. In each cell the best of DiLoCo's
grid is chosen by seeds of its own; then it, averaging and the methods run from fresh seeds. Regret is the logarithm of
the ratio of the final losses (mean of the last five rounds) to DiLoCo's, the mean over the seeds; below 0 the method
ends lower. A cell is lost where a method takes less than half as much off the loss as averaging.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from examples.benchmarks.compare.clients import Shared
from examples.benchmarks.compare.data import TASKS, load_task
from examples.benchmarks.compare.heldout import GIVEN, OPTIONS, SCHEDULES
from examples.benchmarks.compare.methods import GRIDS, NAMES, Setting
from examples.benchmarks.compare.plot import smooth
from examples.benchmarks.compare.simulate import Experiment, groups, simulate
from examples.benchmarks.report import UsageError, append_rows, machine, read_rows
from lightning_lopt.controller import Controller
from lightning_lopt.costs import count, positive, table
from lightning_lopt.meta.base import DataTask
from lightning_lopt.meta.local import LocalOptimizer, OptimizerKind
from lightning_lopt.network import AdaMLP

RATES = [1.5**i for i in range(-25, 10)]  # 4e-5 to 38
BASELINE, AVERAGING = "diloco", "local_sgd"
LIMIT = 0.5  # of the colours
METHODS = [name for name in OPTIONS if name not in (BASELINE, *GIVEN)]


class Cell(NamedTuple):
    """Settings of a square of the picture; `share` is that of γ in the edge."""

    optimizer: str
    local_steps: int
    num_workers: int
    schedule: str
    share: float


@dataclass(frozen=True)
class Result:
    """Runs of a method in a cell, from the fresh seeds.

    Attributes:
        starts: Losses before the first round, by seed.
        finals: Mean losses over the last rounds, by seed; at most the task's largest.
    """

    starts: Mapping[int, float]
    finals: Mapping[int, float]

    def regret(self, baseline: Result) -> float:
        """Mean over the seeds of the logarithm of the ratio of the final losses."""
        return statistics.fmean(math.log(self.finals[seed] / baseline.finals[seed]) for seed in self.finals)

    @property
    def gain(self) -> float:
        """Decrease of the loss, mean over the seeds."""
        return statistics.fmean(self.starts[seed] - loss for seed, loss in self.finals.items())

    def trains(self, other: Result) -> bool:
        """Whether it takes at least half as much off the loss as other runs."""
        return self.gain >= 0.5 * other.gain


class Map:
    """Runs settings, but for those that the file holds.

    Args:
        args: The options of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._task: DataTask = load_task(args.task, args.data)
        self._network, self._controller = AdaMLP.bundled(), Controller.bundled()
        self._rows = read_rows(args.out, (*Cell._fields, "name", "final")) if args.out.exists() else []

    def edge(self, optimizer: OptimizerKind, local_steps: int) -> float:
        """Largest local learning rate with which averaging still trains."""
        args = self._args
        experiment = self._experiment(optimizer, local_steps, args.num_workers[0], "constant")
        kind = Cell(optimizer, local_steps, args.num_workers[0], "constant", 0.0)
        rows = self._run(kind, "edge", [Setting(AVERAGING, rate) for rate in RATES], args.tuning_seeds, experiment)
        found = results(rows, by="local_lr")
        best = max(found.values(), key=lambda result: result.gain)
        return max(rate for rate, result in found.items() if result.trains(best))

    def fill(self, cell: Cell, edge: float) -> None:
        """Tune DiLoCo in a cell, then run it, averaging and the methods from the fresh seeds."""
        args, rate = self._args, float(f"{cell.share * edge:.3g}")
        experiment = self._experiment(cell.optimizer, cell.local_steps, cell.num_workers, cell.schedule)
        grid = [Setting(BASELINE, rate, options) for options in GRIDS[BASELINE](rate)]
        tuned = results(self._run(cell, "tuning", grid, args.tuning_seeds, experiment), by="options")
        best = min(tuned, key=lambda options: statistics.fmean(tuned[options].finals.values()))
        self._run(cell, BASELINE, [Setting(BASELINE, rate, dict(best))], args.seeds, experiment)
        for name in dict.fromkeys((AVERAGING, *args.methods)):
            method, options = OPTIONS[name]
            self._run(cell, name, [Setting(method, rate, options)], args.seeds, experiment)

    def _experiment(self, optimizer: Any, local_steps: int, num_workers: int, schedule: str) -> Experiment:
        num_rounds = dict(zip(self._args.local_steps, self._args.rounds, strict=True))[local_steps]
        return Experiment(num_workers, local_steps, num_rounds, LocalOptimizer(optimizer), SCHEDULES[schedule])

    def _run(
        self, cell: Cell, name: str, settings: Sequence[Setting], seeds: Sequence[int], experiment: Experiment
    ) -> list[dict[str, Any]]:
        """Rows of all settings and seeds, side by side."""
        found = [row for row in self._rows if row["name"] == name and Cell(*(row[key] for key in Cell._fields)) == cell]
        if len(found) >= len(settings) * len(seeds):
            return found
        rows = []
        for group in groups(self._task, settings, cell.num_workers * len(seeds)):
            weights = self._controller if group[0].method == "controlled" else self._network
            runs = simulate(Shared(self._task), group, seeds, experiment, weights)
            for setting, curves, left_out in zip(group, runs.losses.tolist(), runs.left_out.tolist(), strict=True):
                rows += [
                    {
                        **cell._asdict(),
                        "name": name,
                        "local_lr": setting.local_lr,
                        "options": dict(setting.options),
                        "num_rounds": experiment.num_rounds,
                        "seed": seed,
                        "left_out": left,
                        "start": float(f"{curve[0]:.5g}"),
                        "final": float(f"{min(smooth(curve)[-1], self._task.max_loss):.5g}"),
                    }
                    for seed, curve, left in zip(seeds, curves, left_out, strict=True)
                ]
        append_rows(self._args.out, rows)
        self._rows += rows
        return rows


def results(rows: Sequence[Mapping[str, Any]], by: str) -> dict[Any, Result]:
    """Gather the runs of each value of a key, in the order of the rows; options become tuples of pairs."""
    gathered: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        key = tuple(row[by].items()) if isinstance(row[by], dict) else row[by]
        gathered[key].append(row)
    return {
        key: Result({row["seed"]: row["start"] for row in own}, {row["seed"]: row["final"] for row in own})
        for key, own in gathered.items()
    }


def cells(rows: Sequence[Mapping[str, Any]]) -> dict[Cell, dict[str, Result]]:
    """Results of the fresh seeds by cell and method; only those cells whose methods have all run."""
    gathered: dict[Cell, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["name"] not in ("edge", "tuning"):
            gathered[Cell(*(row[key] for key in Cell._fields))].append(row)
    found = {cell: results(own, by="name") for cell, own in gathered.items()}
    most = max((len(each) for each in found.values()), default=0)
    return {cell: each for cell, each in found.items() if len(each) == most}


def at_best_rates(found: Mapping[Cell, Mapping[str, Result]]) -> dict[Cell, Mapping[str, Result]]:
    """The cells whose γ is the best one for averaging, of those that differ in γ alone: where a user would be."""
    best: dict[Cell, Cell] = {}
    for cell, each in found.items():
        own = cell._replace(share=0.0)
        if own not in best or each[AVERAGING].gain > found[best[own]][AVERAGING].gain:
            best[own] = cell
    return {cell: found[cell] for cell in best.values()}


def summary(found: Mapping[Cell, Mapping[str, Result]]) -> list[dict[str, Any]]:
    """Regret over all cells, then by schedule and by optimizer, of each method."""
    kinds = ["all", *dict.fromkeys(c.schedule for c in found), *dict.fromkeys(c.optimizer for c in found)]
    lines = []
    for name in next(iter(found.values())):
        for kind in kinds if name != BASELINE else ():
            own = {c: each for c, each in found.items() if kind in ("all", c.schedule, c.optimizer)}
            regrets = sorted(each[name].regret(each[BASELINE]) for each in own.values())
            lost = sum(not each[name].trains(each[AVERAGING]) for each in own.values())
            lines.append(
                {
                    "method": name,
                    "cells": f"{len(own)}, {kind}",
                    "lower": sum(regret < 0 for regret in regrets),
                    "median": f"{statistics.median(regrets):+.3f}",
                    "90 %": f"{regrets[math.ceil(0.9 * len(regrets)) - 1]:+.3f}",
                    "worst": f"{regrets[-1]:+.3f}",
                    "lost": lost,
                }
            )
    return lines


def draw(found: Mapping[Cell, Mapping[str, Result]], name: str, path: Path) -> None:
    """Draw the regret of a method: a panel for each optimizer and schedule, H to the right, K and γ upwards."""
    import matplotlib.pyplot as plt

    optimizers, schedules = ([*dict.fromkeys(getattr(c, key) for c in found)] for key in ("optimizer", "schedule"))
    columns = sorted({c.local_steps for c in found})
    lines = sorted({(c.num_workers, c.share) for c in found})
    size = (2.6 * len(optimizers) + 1, (0.32 * len(lines) + 0.9) * len(schedules))
    figure, axes = plt.subplots(
        len(schedules), len(optimizers), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    image = None
    for axis, schedule in zip(axes, schedules, strict=True):
        for panel, optimizer in zip(axis, optimizers, strict=True):
            values = torch.full((len(lines), len(columns)), math.nan)
            for c, each in found.items():
                if (c.schedule, c.optimizer) == (schedule, optimizer):
                    y, x = lines.index((c.num_workers, c.share)), columns.index(c.local_steps)
                    values[y, x] = each[name].regret(each[BASELINE])
                    mark = f"{values[y, x]:+.2f}" if each[name].trains(each[AVERAGING]) else "lost"
                    color = "white" if abs(values[y, x]) > 0.6 * LIMIT else "black"
                    panel.text(x, y, mark, ha="center", va="center", fontsize=7, color=color)
            image = panel.imshow(values.numpy(), cmap="RdBu_r", vmin=-LIMIT, vmax=LIMIT, origin="lower", aspect="auto")
            panel.set_title(f"{optimizer}, γ {schedule}", fontsize=9)
            panel.set_xticks(range(len(columns)), [str(h) for h in columns])
            panel.set_yticks(range(len(lines)), [f"K {k}, {share:g}" for k, share in lines], fontsize=7)
    for panel in axes[-1]:
        panel.set_xlabel("local steps H")
    assert image is not None
    label = f"log of the final loss of {NAMES[OPTIONS[name][0]]} over that of DiLoCo"
    figure.colorbar(image, ax=axes, label=label, shrink=0.7, extend="both")
    figure.supylabel("workers K, share of γ in the edge", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line."""
    add = parser.add_argument
    add("out", type=Path, help="file, one for each task, that a line per run is appended to; its runs are not repeated")
    add("--task", choices=TASKS, default="fashion_mnist_8x8")
    add("--data", type=Path, help="folder with the task's data, at any depth")
    add("--optimizers", nargs="+", choices=get_args(OptimizerKind), default=[*get_args(OptimizerKind)])
    add("--num-workers", nargs="+", type=count, default=[2, 8], help="K")
    add("--local-steps", nargs="+", type=count, default=[1, 4, 16, 64], help="H")
    add("--rounds", nargs="+", type=count, default=[100, 80, 40, 25], help="rounds of a run, one for each H")
    add("--shares", nargs="+", type=positive, default=[0.25, 0.5, 0.8], help="of the edge: γ")
    add("--schedules", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    add("--methods", nargs="+", choices=METHODS, default=["learned", "controlled"])
    add("--tuning-seeds", nargs="+", type=int, default=[1000], help="of the edge and of DiLoCo's grid")
    add("--seeds", nargs="+", type=int, default=[0, 1], help="fresh ones")
    add("--threads", type=count, default=1, help="threads of torch")
    add("--png", type=Path, help="picture of the regret of the first method")
    add("--report", action="store_true", help="run nothing; print and draw what the file holds")


def main(args: argparse.Namespace) -> None:
    """Run the cells that are missing, print the summary and draw the map."""
    if len(args.rounds) != len(args.local_steps):
        raise UsageError(f"--rounds needs one number for each H, not {args.rounds} for {args.local_steps}.")
    if overlap := {*args.seeds} & {*args.tuning_seeds}:
        raise UsageError(f"--seeds must be fresh, but {sorted(overlap)} are among --tuning-seeds.")
    torch.set_num_threads(args.threads)
    if not args.report:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        regret_map = Map(args)
        for local_steps in args.local_steps:
            for optimizer in args.optimizers:
                edge = regret_map.edge(optimizer, local_steps)
                print(f"{optimizer}, H {local_steps}: the edge is at γ {edge:.3g}", flush=True)
                for num_workers in args.num_workers:
                    for schedule in args.schedules:
                        for share in args.shares:
                            regret_map.fill(Cell(optimizer, local_steps, num_workers, schedule, share), edge)
    found = cells(read_rows(args.out, (*Cell._fields, "name", "final")))
    if not found:
        raise UsageError(f"{args.out} holds no cell that is complete.")
    print(f"\n{table(summary(found))}\n\nWith averaging's best γ:\n{table(summary(at_best_rates(found)))}\n")
    print(f"{args.out}: {machine()}")
    if args.png:
        draw(found, args.methods[0], args.png)
