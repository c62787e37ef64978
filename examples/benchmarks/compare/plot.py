"""Read files of `run` or `tune`, choose the best setting of each method, print a table and draw the losses."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.benchmarks.compare.methods import NAMES
from examples.benchmarks.report import UsageError, read_rows, write_json
from lightning_lopt.costs import all_reduce, table
from lightning_lopt.meta.evaluation import FINAL_ROUNDS


class Tuned(NamedTuple):
    """Runs of a method at one setting.

    Attributes:
        method: Name of the method.
        local_lr: Local learning rate γ.
        options: Hyperparameters of the outer optimizer.
        curves: Loss curves by seed.
        seconds: Time of a run; None if the file does not hold it.
    """

    method: str
    local_lr: float
    options: Mapping[str, float]
    curves: Mapping[int, Sequence[float]]
    seconds: float | None

    @property
    def final_loss(self) -> float:
        """Mean loss over the last rounds and the seeds; infinite if a run diverged."""
        return statistics.fmean(smooth(curve)[-1] for curve in self.curves.values())


def smooth(curve: Sequence[float]) -> list[float]:
    """Average each value with the four before it; infinite where one of them is not finite.

    Example:
        >>> smooth([3.0, 1.0, float("nan")])
        [3.0, 2.0, inf]
    """
    means = (statistics.fmean(curve[max(0, i + 1 - FINAL_ROUNDS) : i + 1]) for i in range(len(curve)))
    return [mean if math.isfinite(mean) else math.inf for mean in means]


def rounds_to(curve: Sequence[float], target: float) -> int | None:
    """First round after which the smoothed loss is at most `target`; None if there is none.

    Example:
        >>> rounds_to([4.0, 2.0, 1.0, 1.0], 2.5)
        2
    """
    return next((i for i, loss in enumerate(smooth(curve)) if loss <= target), None)


def read(path: Path) -> list[dict[str, Any]]:
    """Read the runs from a file of `run`, or those of the last stage from a file of `tune`.

    Raises:
        ValueError: A line is broken, or there is no such run.
    """
    rows = [row for row in read_rows(path, ("method", "losses")) if row.get("stage", "final") == "final"]
    if not rows:
        raise UsageError(f"{path} holds nothing of the last stage of `tune`, which was killed earlier. Start it again.")
    return rows


def reached(method: Tuned, baseline: Tuned) -> list[int | None]:
    """Rounds to the final loss of the baseline with the same seed, for each seed; None if it is not reached."""
    return [rounds_to(curve, smooth(baseline.curves[seed])[-1]) for seed, curve in method.curves.items()]


def tune(rows: Sequence[Mapping[str, Any]]) -> list[Tuned]:
    """Choose the best setting of each method: of Local SGD by final loss, of the others by rounds to that loss.

    The learned method is not tuned: it runs at the best local learning rate of Local SGD. Settings that were run with
    fewer seeds than others of their method do not count.

    Args:
        rows: Lines that `run` wrote, for one task, K and H, with runs of Local SGD.

    Raises:
        ValueError: There is no run of Local SGD.
    """
    candidates = _candidates(rows)
    if "local_sgd" not in candidates:
        raise UsageError(
            f"There is no run of local_sgd to compare {', '.join(sorted(candidates))} with: run local_sgd, too."
        )
    baseline = min(_complete(candidates.pop("local_sgd")), key=lambda c: c.final_loss)

    def rounds_then_loss(candidate: Tuned) -> tuple[float, float]:
        rounds = reached(candidate, baseline)
        return sum(math.inf if r is None else r for r in rounds), candidate.final_loss

    best = [baseline]
    for method, choices in candidates.items():
        allowed = [c for c in choices if method != "learned" or c.local_lr == baseline.local_lr]
        best.append(min(_complete(allowed), key=rounds_then_loss))
    return best


def best_baseline(rows: Sequence[Mapping[str, Any]]) -> Tuned:
    """Best setting of all methods except the learned one, by final loss."""
    candidates = _candidates(rows)
    candidates.pop("learned", None)
    return min((c for choices in candidates.values() for c in _complete(choices)), key=lambda c: c.final_loss)


def _candidates(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Tuned]]:
    """All settings with their curves by method."""
    settings: dict[tuple[str, float, str], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        settings[row["method"], row["local_lr"], json.dumps(row["options"])][row["seed"]] = row
    sizes = Counter(map(_group, rows))
    candidates: dict[str, list[Tuned]] = defaultdict(list)
    for (method, lr, options), runs in settings.items():
        curves = {seed: run["losses"] for seed, run in runs.items()}
        times = [_group(run)[1] / sizes[_group(run)] for run in runs.values()]
        seconds = statistics.fmean(times) if all(times) else None
        candidates[method].append(Tuned(method, lr, json.loads(options), curves, seconds))
    return candidates


def _group(row: Mapping[str, Any]) -> tuple[str, float]:
    """Key of runs that were simulated side by side: their method and their total time, 0 if unknown."""
    return row["method"], row.get("group_seconds", 0.0)


def _complete(candidates: Sequence[Tuned]) -> list[Tuned]:
    most = max(len(c.curves) for c in candidates)
    return [c for c in candidates if len(c.curves) == most]


def summary(tuned: Sequence[Tuned], best: Tuned) -> list[dict[str, Any]]:
    """Rows of the table: setting and final loss of each method, and its rounds to those of Local SGD and `best`."""
    baseline = next(t for t in tuned if t.method == "local_sgd")

    def show(rounds: Sequence[int | None]) -> str:
        return " ".join("never" if r is None else str(r) for r in rounds)

    def share(rounds: Sequence[int | None]) -> float | None:
        known = [r for r in rounds if r is not None]
        return statistics.fmean(known) / total if len(known) == len(rounds) else None

    total = len(next(iter(baseline.curves.values()))) - 1
    rows = []
    for method in tuned:
        finals = [smooth(curve)[-1] for curve in method.curves.values()]
        to_local, to_best = reached(method, baseline), reached(method, best)
        rows.append(
            {
                "method": method.method,
                "gamma": method.local_lr,
                "setting": " ".join(f"{key}={value:.4g}" for key, value in method.options.items()),
                "final loss": method.final_loss,
                "lowest": min(finals),
                "highest": max(finals),
                "rounds to Local SGD's": show(to_local),
                "share of its rounds": share(to_local),
                "to the best baseline's": show(to_best),
                "share of all rounds": share(to_best),
            }
        )
    return rows


def draw(tuned: Sequence[Tuned], title: str, path: Path, bytes_per_round: float | None = None) -> None:
    """Draw the loss over rounds and bytes, and over seconds if they are known: mean and range over the seeds."""
    from matplotlib.figure import Figure  # an extra

    timed = all(method.seconds is not None for method in tuned)
    figure = Figure(figsize=(12 if timed else 7, 4.5), layout="constrained")
    panels = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
    for method in tuned:
        curves = list(zip(*method.curves.values(), strict=True))
        means, lows, highs = ([*map(of, curves)] for of in (statistics.fmean, min, max))
        options = [f"γ {method.local_lr:g}", *(f"{key} {value:.3g}" for key, value in method.options.items())]
        label = f"{NAMES.get(method.method, method.method)}: {', '.join(options)}"
        for axes, end in zip(panels, (len(curves) - 1, method.seconds or 0.0), strict=False):
            positions = np.linspace(0, end, len(curves))
            (line,) = axes.plot(positions, means, label=label)
            axes.fill_between(positions, lows, highs, alpha=0.2, color=line.get_color())
    panels[0].set(xlabel="round", ylabel="training loss of the global weights", yscale="log", title=title)
    if timed:
        panels[1].set_xlabel("seconds of a run, all workers simulated by one process")
    if bytes_per_round:
        megabytes = bytes_per_round / 1e6
        top = panels[0].secondary_xaxis(
            "top", functions=(partial(np.multiply, megabytes), partial(np.multiply, 1 / megabytes))
        )
        top.set_xlabel("MB sent by each worker")
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


class Key(NamedTuple):
    """Properties that are the same for all runs in a table."""

    task: str
    num_workers: int
    local_steps: int
    local_optimizer: str
    decay: bool
    clients: int | None
    alpha: float | None
    num_rounds: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Key:
        defaults = {"local_optimizer": "sgd", "decay": False, "clients": None, "alpha": None}
        row = {**defaults, **row, "num_rounds": len(row["losses"]) - 1}
        return cls(**{name: row[name] for name in cls._fields})

    def __str__(self) -> str:
        parts = [self.task, f"K = {self.num_workers}", f"H = {self.local_steps}"]
        parts += [] if self.local_optimizer == "sgd" else [self.local_optimizer]
        parts += ["decay"] if self.decay else []
        parts += [f"{self.clients} clients", f"alpha = {self.alpha}"] if self.clients else []
        return ", ".join([*parts, f"{self.num_rounds} rounds"])

    @property
    def file_name(self) -> str:
        name = str(self).replace("K = ", "k").replace("H = ", "h").replace("alpha = ", "alpha")
        return name.replace(", ", "_").replace(" ", "_")


def bytes_per_round(row: Mapping[str, Any]) -> float | None:
    """Bytes that each worker sends in a round, a ring all-reduce of float32; None if the file has no count.

    Example:
        >>> bytes_per_round({"parameters": 1000, "num_workers": 4})
        6000.0
    """
    return all_reduce(4 * row["parameters"], row["num_workers"]).bytes_sent if "parameters" in row else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line."""
    parser.add_argument("files", nargs="+", type=Path, help="files of `run` or `tune`")
    parser.add_argument(
        "--png", type=Path, help="file for the figures, .png or .svg; the experiment is added to its name"
    )
    parser.add_argument("--json", type=Path, help="file for the tables")


def main(args: argparse.Namespace) -> None:
    """Print a table and draw a figure for each experiment."""
    experiments: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for path in args.files:
        for row in read(path):
            experiments[Key.of(row)].append(row)
    tables = {}
    for key, rows in experiments.items():
        tuned = tune(rows)
        tables[str(key)] = summary(tuned, best_baseline(rows))
        print(f"{key}\n{table(tables[str(key)])}\n")
        if args.png:
            path = args.png.with_name(f"{args.png.stem}_{key.file_name}{args.png.suffix}")
            draw(tuned, str(key), path, bytes_per_round(rows[0]))
    print(f"Losses and rounds of the tables are those of the mean over {FINAL_ROUNDS} rounds; figures show each round.")
    if args.json:
        write_json(args.json, tables)
