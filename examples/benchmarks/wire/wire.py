"""Train over links of a limited rate: seconds per round beside a modelled bound, time to a loss, transfers hidden.

Each worker is a process in a network namespace of its own, joined to the others by a bridge, with tc's tbf on both ends
of its link. A relay in the place of the bridge adds latency. Where links cannot be limited, the collectives sleep
instead, and the output says so. The methods train in turn, for a round each, the one with the least training time next,
so that disturbances of the machine affect all of them alike. Before each turn an undisturbed local step is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from examples.benchmarks.report import UsageError, machine, read_rows
from examples.benchmarks.wire.methods import DDP, FOR_UNEQUAL_SPEEDS, NAMES, USUAL, round_of
from examples.benchmarks.wire.namespaces import run_linked, run_local, why_not
from examples.benchmarks.wire.worker import Setup, ViT, load
from lightning_lopt.costs import (
    Parameters,
    Round,
    count,
    hidden_share,
    local_steps_that_pay,
    not_negative,
    number_of,
    positive,
    rate_where_equal,
    round_seconds,
    table,
)

RATES = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
Rows = Sequence[Mapping[str, Any]]


class Measured:
    """Measured rounds of one method.

    Args:
        setup: Settings of the run.
        rows: Rows of this method, in order.
        step_seconds: Seconds of a local step without any sync, on each worker.
        parameters: Number of parameters of the model, or the shapes of their tensors.
    """

    def __init__(self, setup: Setup, rows: Rows, step_seconds: Sequence[float], parameters: Parameters) -> None:
        self.name, self.link, self._rows = rows[0]["method"], setup.link, rows
        rounds = [
            round_of(self.name, setup.local_steps, parameters, step_seconds, rank) for rank in range(len(step_seconds))
        ]
        self.local_steps = [a_round.local_steps for a_round in rounds]
        slowest = partial(round_seconds, link=self.link)
        self.round, self.step_seconds = max(zip(rounds, step_seconds, strict=True), key=lambda pair: slowest(*pair))
        self.runs = [_Run([row for row in rows if row["seed"] == seed]) for seed in setup.seeds]

    @property
    def seconds(self) -> float:
        """Median time of a round."""
        return self._median("seconds")

    @property
    def bound(self) -> float:
        """Bound on the time of a round: the largest over the workers, since they wait for one another."""
        return round_seconds(self.round, self.step_seconds, self.link)

    @property
    def with_work(self) -> Round:
        """The round with all time above the bound as work, which does not depend on the link; none for DDP."""
        work = 0.0 if self.name == DDP else max(0.0, self.seconds - self.bound)
        return replace(self.round, work_seconds=work)

    @property
    def hidden(self) -> float | None:
        """Fraction of all transfer time, after the outer step too, during which training went on."""
        reports = [r for r in self._rows if "transfer_seconds" in r]
        exposed = self.link.seconds(self.round.exposed)
        total = sum(r["transfer_seconds"] + exposed for r in reports)
        return 1 - sum(r["waited_seconds"] + exposed for r in reports) / total if reports else None

    def _median(self, key: str) -> float:
        return statistics.median([r[key] / r["rounds"] for r in self._rows])

    def line(self, targets: Sequence[float], first: Measured) -> dict[str, Any]:
        """Row of the table.

        Args:
            targets: Target loss of each seed.
            first: Method that the speed-up refers to.
        """
        ours = [run.until(target) for run, target in zip(self.runs, targets, strict=True)]
        theirs = [run.until(target) for run, target in zip(first.runs, targets, strict=True)]
        pairs = [(a[1] / b[1] if a and b else None) for a, b in zip(theirs, ours, strict=True)]
        return {
            "method": self.name,
            "H": " ".join(map(str, dict.fromkeys(self.local_steps))),
            "Q": round(self.round.overlap_steps, 2),
            "MB per round": self.round.bytes_sent / 1e6,
            "s per round": self.seconds,
            "bound": self.bound,
            "share of bound": self.bound / self.seconds,
            "hidden": self.hidden,
            "can hide": hidden_share(self.round, self.step_seconds, self.link),
            "outer step, s": None if self.name == DDP else self._median("outer_seconds"),
            "above bound, s": self.seconds - self.bound,
            **_spread("steps", [run.steps for run in self.runs]),
            **_spread("last loss", [run.losses[-1] for run in self.runs]),
            **_spread("s to target", [end and end[1] for end in ours]),
            **_spread("times faster", pairs),
        }

    def rates(self, targets: Sequence[float], ddp: Measured) -> dict[str, Any]:
        """Modelled speed-up over data-parallel training by rate, the rate at which it is 1, and the H that pays."""
        ends = [(a.until(t), b.until(t)) for a, b, t in zip(self.runs, ddp.runs, targets, strict=True)]
        gains: dict[str, float | None] = dict.fromkeys([*map("{:g}".format, RATES), "equal at"])
        if all(ours and theirs for ours, theirs in ends):
            steps_of_ddp = statistics.fmean(theirs[0] / ours[0] for ours, theirs in ends if ours and theirs)
            for mbit in RATES:
                seconds = [
                    round_seconds(m.with_work, m.step_seconds, replace(self.link, mbit=mbit)) for m in (ddp, self)
                ]
                gains[f"{mbit:g}"] = steps_of_ddp * seconds[0] / seconds[1]
            progress = steps_of_ddp / self.round.local_steps
            gains["equal at"] = rate_where_equal(
                self.with_work, ddp.round, self.step_seconds, progress, self.link.latency
            )
        enough = int(self.round.overlap_steps) + 1
        pays = local_steps_that_pay(
            lambda h: replace(self.with_work, local_steps=max(h, enough)), self.step_seconds, self.link
        )
        return {"method": self.name, **gains, "H for 10 %": pays}


class _Run:
    """Rounds of one method with one seed."""

    def __init__(self, rows: Rows) -> None:
        self.losses = [row["loss"] for row in rows]
        self.steps = sum(statistics.fmean(row["steps"]) for row in rows)  # per worker
        self.rounds = [*accumulate(row["rounds"] for row in rows)]
        self.clock = [*accumulate(row["seconds"] for row in rows)]

    def until(self, target: float) -> tuple[int, float] | None:
        """Rounds and seconds of training until the loss is at most `target`; None if it never is."""
        ends = zip(self.losses, self.rounds, self.clock, strict=True)
        return next(((rounds, seconds) for loss, rounds, seconds in ends if loss <= target), None)


def _spread(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean over the seeds, None where one is missing, and the standard deviation of several."""
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    several = whole and len(known) > 1
    return {name: statistics.fmean(known) if whole else None, f"± {name}": statistics.stdev(known) if several else None}


def read(path: Path) -> tuple[Setup, list[Measured]]:
    """Read the settings and the methods' rounds from a file of rows.

    Raises:
        ValueError: A line is broken, or there are no rounds.
    """
    header, *rows = read_rows(path)
    if "setup" not in header or not rows:
        raise UsageError(f"{path} does not hold a setup and then rounds. Give a file that `wire` wrote.")
    setup = Setup(**header["setup"])
    by_method = defaultdict(list)
    for row in rows:
        by_method[row["method"]].append(row)
    step_seconds = [statistics.median(times) for times in zip(*(row["step_seconds"] for row in rows), strict=True)]
    parameters = header.get("shapes", header["parameters"])
    return setup, [Measured(setup, rows, step_seconds, parameters) for rows in by_method.values()]


def report(path: Path, target: float | None, png: Path | None) -> None:
    """Print the tables of a file of rows, and draw its curves.

    Args:
        path: File of rows.
        target: Target loss; None for the last loss of the first method with the same seed.
        png: File for the plot; None draws nothing.
    """
    setup, methods = read(path)
    first = methods[0]
    targets = [run.losses[-1] if target is None else target for run in first.runs]
    print(table([m.line(targets, first) for m in methods]))
    print(
        f"\nTarget loss {' '.join(map('{:.4g}'.format, targets))}; a local step alone takes {first.step_seconds:.3g} s."
    )
    if setup.delayed:
        print("DELAYED: no link was limited; the collectives slept for the time of a transfer at this rate.")
    if first.name == DDP:
        print(f"\nSpeed-up over {DDP} to the target by rate in Mbit/s, modelled from these steps and seconds:\n")
        print(table([m.rates(targets, first) for m in methods[1:]]))
    if png:
        draw(methods, targets, png)


def draw(methods: Sequence[Measured], targets: Sequence[float], path: Path) -> None:
    """Draw the loss over seconds, with a line per seed."""
    from matplotlib.figure import Figure  # an extra

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, method in enumerate(methods):
        for run in method.runs:
            label = method.name if run is method.runs[0] else None
            axes.plot(run.clock, run.losses, marker=".", color=f"C{i}", label=label)
    axes.axhline(statistics.fmean(targets), color="grey", linewidth=0.8, linestyle="--")
    title = f"links of {methods[0].link.mbit:g} Mbit/s"
    axes.set(xlabel="seconds of training", ylabel="training loss of the global weights", yscale="log", title=title)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line."""
    default = Setup([])
    parser.add_argument("--mbit", type=positive, default=default.mbit, help="rate of each worker's link, in Mbit/s")
    parser.add_argument("--latency", type=not_negative, default=default.latency, help="seconds between two workers")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=USUAL)
    parser.add_argument("--num-workers", type=count, default=default.num_workers)
    parser.add_argument("--local-steps", type=count, default=default.local_steps)
    parser.add_argument("--seconds", type=positive, default=default.seconds, help="training time per method and seed")
    parser.add_argument("--ddp-steps", type=count, default=default.ddp_steps, help="steps of DDP in place of a round")
    parser.add_argument("--batch-size", type=count, default=default.batch_size, help="examples per worker")
    parser.add_argument("--local-lr", type=positive, default=default.local_lr, help="learning rate of AdamW")
    parser.add_argument(
        "--step-seconds",
        nargs="+",
        type=float,
        default=default.step_seconds,
        help="least time of a local step, reached by sleeping: one number for all workers or one for each",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=default.seeds)
    parser.add_argument("--width", type=count, default=default.width, help="width of the transformer")
    parser.add_argument("--depth", type=count, default=default.depth, help="blocks of the transformer")
    parser.add_argument("--data", help="folder with Fashion-MNIST's idx.gz files; default: scikit-learn's digits")
    parser.add_argument("--target", type=float, help="target loss; default: the last loss of the first method")
    parser.add_argument("--out", type=Path, default=Path("wire.jsonl"), help="file for the rows")
    parser.add_argument("--png", type=Path, help="file for the plot")
    parser.add_argument("--report", action="store_true", help="train nothing, and report the rows in the file")


def main(args: argparse.Namespace) -> None:
    """Start the workers, and report their rounds."""
    if not args.report:
        reason = why_not()
        if reason:
            print(f"No link can be limited here: {reason}. The collectives sleep instead, without latency.")
        fields = {name: getattr(args, name) for name in asdict(Setup([])) if name not in ("delayed", "out")}
        fields["latency"] *= reason is None
        setup = Setup(**fields, delayed=reason is not None, out=str(args.out.resolve()))
        if not all(setup.stretched) and set(setup.methods) & {*FOR_UNEQUAL_SPEEDS}:
            raise SystemExit("Paced methods need a positive --step-seconds for every worker, which tells its speed.")
        model = ViT(load(setup.data)[0].shape[-1], setup.width, setup.depth)
        shapes = [[*p.shape] for p in model.parameters()]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "setup": asdict(replace(setup, out=args.out.name, data=setup.data and "fashion-mnist")),
            "parameters": number_of(shapes),
            "shapes": shapes,
            "machine": machine(),
        }
        args.out.write_text(json.dumps(header) + "\n")
        command = ["-m", "examples.benchmarks.wire.worker", json.dumps(asdict(setup))]
        if reason:
            run_local(command, setup.num_workers)
        else:
            run_linked(command, setup.num_workers, setup.mbit, setup.latency)
    report(args.out, args.target, args.png)
