"""Train over links of a limited rate: seconds per round beside the modelled bound, time to a loss, what overlap hides.

Each worker is a process in a network namespace of its own, joined to the others by a bridge, with tc's tbf on both ends
of its link; latency is what that has by itself. Without the rights for this the collectives sleep instead, and the
table says so. Methods take turns, so that a disturbance of the machine meets all of them; before each turn the time of
a local step that nobody disturbs is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning_lopt.bench.link import Link, Round, hidden_share, local_steps_that_pay, rate_where_equal, round_seconds
from lightning_lopt.bench.namespaces import run_linked, run_local, why_not
from lightning_lopt.bench.report import machine, table
from lightning_lopt.bench.wire_methods import DDP, NAMES, round_of
from lightning_lopt.bench.wire_worker import Setup, ViT

RATES = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
Rows = Sequence[Mapping[str, Any]]


class Measured:
    """The turns of one method.

    Args:
        setup: of the run.
        rows: of this method, in order.
        step_seconds: of a local step without any sync.
        parameters: of the model.
    """

    def __init__(self, setup: Setup, rows: Rows, step_seconds: float, parameters: int) -> None:
        self.name, self._rows, self._step_seconds = rows[0]["method"], rows, step_seconds
        self.link, self.steps = Link(setup.mbit), rows[0]["steps"]
        self.round = round_of(self.name, setup.local_steps, parameters, setup.num_workers)

    @property
    def seconds(self) -> float:
        """Of a round: the median."""
        return statistics.median([r["seconds"] for r in self._rows]) * self.round.local_steps / self.steps

    @property
    def bound(self) -> float:
        return round_seconds(self.round, self._step_seconds, self.link)

    @property
    def with_work(self) -> Round:
        """With all that the bound does not explain as work, which other links do not change; DDP has none."""
        work = 0.0 if self.name == DDP else max(0.0, self.seconds - self.bound)
        return replace(self.round, work_seconds=work)

    @property
    def hidden(self) -> float | None:
        """The share of the transfers, those after the outer step included, in which training went on."""
        reports = [r for r in self._rows if "transfer_seconds" in r]
        exposed = self.link.seconds(self.round.exposed)
        total = sum(r["transfer_seconds"] + exposed for r in reports)
        return 1 - sum(r["waited_seconds"] + exposed for r in reports) / total if reports else None

    @property
    def clock(self) -> list[float]:
        """Seconds of training at the end of each turn."""
        seconds = [r["seconds"] for r in self._rows]
        return [sum(seconds[: i + 1]) for i in range(len(seconds))]

    @property
    def losses(self) -> list[float]:
        return [r["loss"] for r in self._rows]

    def turns_to(self, target: float) -> int | None:
        """Turns until the loss is at most `target`."""
        return next((i + 1 for i, loss in enumerate(self.losses) if loss <= target), None)

    def per_step(self, mbit: float) -> float:
        """Modelled seconds per local step on another link."""
        return round_seconds(self.with_work, self._step_seconds, Link(mbit)) / self.round.local_steps

    def line(self, target: float, first: Measured) -> dict[str, Any]:
        """The row of the table."""
        turns, others = self.turns_to(target), first.turns_to(target)
        seconds = None if turns is None else self.clock[turns - 1]
        return {
            "method": self.name,
            "H": self.round.local_steps,
            "Q": round(self.round.overlap_steps, 2),
            "MB per round": (self.round.transfer + self.round.exposed).bytes_sent / 1e6,
            "s per round": self.seconds,
            "bound": self.bound,
            "share of bound": self.bound / self.seconds,
            "hidden": self.hidden,
            "can hide": hidden_share(self.round, self._step_seconds, self.link),
            "besides, s": self.seconds - self.bound,
            "last loss": self.losses[-1],
            "steps to target": None if turns is None else turns * self.steps,
            "s to target": seconds,
            "times faster": None if seconds is None or others is None else first.clock[others - 1] / seconds,
        }

    def rates(self, target: float, ddp: Measured) -> dict[str, Any]:
        """By rate, how much sooner than data-parallel training it is at the target; up to which rate; which H pays."""
        turns, others = self.turns_to(target), ddp.turns_to(target)
        gains: dict[str, float | None] = dict.fromkeys([*map("{:g}".format, RATES), "equal at"])
        if turns is not None and others is not None:
            progress = others * ddp.steps / (turns * self.steps)
            gains = {f"{mbit:g}": progress * ddp.per_step(mbit) / self.per_step(mbit) for mbit in RATES}
            gains["equal at"] = rate_where_equal(self.with_work, ddp.round, self._step_seconds, progress)
        pays = local_steps_that_pay(self.with_work, self._step_seconds, self.link)
        return {"method": self.name, **gains, "H for 10 %": pays}


def read(path: Path) -> tuple[Setup, list[Measured]]:
    """What is in a file of rows, by method."""
    header, *rows = (json.loads(line) for line in path.read_text().splitlines())
    setup = Setup(**header["setup"])
    by_method = defaultdict(list)
    for row in rows:
        by_method[row["method"]].append(row)
    step_seconds = statistics.median([row["step_seconds"] for row in rows])
    return setup, [Measured(setup, rows, step_seconds, header["parameters"]) for rows in by_method.values()]


def report(path: Path, target: float | None, png: Path | None) -> None:
    """Print the tables of a file, and draw its curves.

    Args:
        path: the rows.
        target: loss; None for that at which the first method ends.
        png: of the plot.
    """
    setup, methods = read(path)
    first = methods[0]
    target = first.losses[-1] if target is None else target
    print(table([m.line(target, first) for m in methods]))
    print(f"\nTarget loss {target:.4g}; a local step alone takes {1e3 * first._step_seconds:.0f} ms (median).")
    if setup.delayed:
        print("DELAYED: the collectives slept as long as a link of this rate would take; no link was limited.")
    if first.name == DDP:
        print(f"\nTimes faster than {DDP} to the target, modelled from these steps and seconds, by rate in Mbit/s:\n")
        print(table([m.rates(target, first) for m in methods[1:]]))
    if png:
        draw(methods, target, png)


def draw(methods: Sequence[Measured], target: float, path: Path) -> None:
    """Loss over seconds."""
    from matplotlib.figure import Figure  # an extra

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in methods:
        axes.plot(method.clock, method.losses, marker=".", label=method.name)
    axes.axhline(target, color="grey", linewidth=0.8, linestyle="--")
    title = f"links of {methods[0].link.mbit:g} Mbit/s"
    axes.set(xlabel="seconds of training", ylabel="training loss of the global weights", yscale="log", title=title)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command line."""
    default = Setup([])
    every = [name for name in NAMES if name != "LOSCAR, overwriting"]
    parser.add_argument("--mbit", type=float, default=default.mbit, help="rate of each worker's link")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=every)
    parser.add_argument("--num-workers", type=int, default=default.num_workers)
    parser.add_argument("--local-steps", type=int, default=default.local_steps)
    parser.add_argument("--turns", type=int, default=default.turns, help="rounds of each method")
    parser.add_argument("--ddp-steps", type=int, default=default.ddp_steps, help="of DDP in the place of a round")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="per worker")
    parser.add_argument("--local-lr", type=float, default=default.local_lr, help="of AdamW")
    parser.add_argument(
        "--step-seconds",
        nargs="+",
        type=float,
        default=default.step_seconds,
        help="stretch local steps to this time, one number for all workers or one for each",
    )
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--width", type=int, default=default.width, help="of the transformer")
    parser.add_argument("--depth", type=int, default=default.depth, help="of the transformer")
    parser.add_argument("--target", type=float, help="loss; default: that at which the first method ends")
    parser.add_argument("--out", type=Path, default=Path("wire.jsonl"), help="file for the rows")
    parser.add_argument("--png", type=Path, help="file for the plot")
    parser.add_argument("--report", action="store_true", help="run nothing: report the rows in the file")


def main(args: argparse.Namespace) -> None:
    """Run the workers and report."""
    if not args.report:
        reason = why_not()
        if reason:
            print(f"No link can be limited here: {reason}. The collectives sleep instead.")
        fields = {name: getattr(args, name) for name in asdict(Setup([])) if name not in ("delayed", "out")}
        setup = Setup(**fields, delayed=reason is not None, out=str(args.out.resolve()))
        parameters = sum(p.numel() for p in ViT(setup.width, setup.depth).parameters())
        args.out.parent.mkdir(parents=True, exist_ok=True)
        header = {"setup": asdict(replace(setup, out=args.out.name)), "parameters": parameters, "machine": machine()}
        args.out.write_text(json.dumps(header) + "\n")
        command = ["-m", "lightning_lopt.bench.wire_worker", json.dumps(asdict(setup))]
        if reason:
            run_local(command, setup.num_workers)
        else:
            run_linked(command, setup.num_workers, setup.mbit)
    report(args.out, args.target, args.png)
