"""Measure the time of one meta-iteration by part, beside a bound from the matrix products of this machine.

A meta-iteration is one window of PES: all antithetic pairs run all rounds of local training and outer steps. The bound
is the time of the multiplications of the local steps (forward and backward) and of the separable form of the learned
step (3.2 kFLOP per parameter) at the rate of the fastest square sgemm of the same run; the share is bound / time. CPU
seconds add up all threads, and other processes hardly disturb them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch

from examples.benchmarks.report import machine, write_json
from examples.benchmarks.speed.outer_step import FLOP_PER_PARAMETER, sgemm_flops
from lightning_lopt.costs import count, table
from lightning_lopt.functional import learned
from lightning_lopt.meta import ImageMLP, LocalOptimizer, LocalTraining, LogUniform, outer, simulation
from lightning_lopt.meta.estimator import Estimator
from lightning_lopt.meta.local import OptimizerKind
from lightning_lopt.meta.particles import Particles
from lightning_lopt.network import AdaMLP

IMAGES = 10_000


@dataclass(frozen=True)
class Work:
    """Size of a meta-iteration.

    Attributes:
        sizes: Widths of the MLP, from the pixels to the classes.
        batch_size: Examples per worker and local step.
        num_workers: Number of workers, K.
        local_steps: Number of local steps per round, H.
        num_pairs: Number of antithetic pairs.
        num_rounds: Number of rounds in the window.
    """

    sizes: tuple[int, ...]
    batch_size: int
    num_workers: int = 8
    local_steps: int = 4
    num_pairs: int = 8
    num_rounds: int = 50

    @property
    def flop(self) -> float:
        """FLOP of all matrix products.

        Example:
            >>> f"{Work((784, 128, 128, 10), 128).flop / 1e9:.0f}"
            '1965'
        """
        products = [a * b for a, b in pairwise(self.sizes)]
        per_example = 2 * (3 * sum(products) - products[0])  # the pixels need no gradient
        steps = 2 * self.num_pairs * self.num_rounds * self.num_workers * self.local_steps
        parameters = sum(products) + sum(self.sizes[1:])
        outer = 2 * self.num_pairs * self.num_rounds * parameters * FLOP_PER_PARAMETER
        return steps * self.batch_size * per_example + outer


WORKS = {
    "paper": Work((784, 128, 128, 10), 128),
    "8x8": Work((64, 32, 10), 32),
    "small": Work((64, 16, 10), 32, num_workers=4, num_pairs=12),  # as in the recipe of the default
    "small-48": Work((64, 16, 10), 32, num_workers=4, num_pairs=48),
}


class Clock:
    """Sums of wall and CPU seconds by name.

    Args:
        device: Device whose queued work is waited for.

    Attributes:
        seconds: Wall seconds by name.
        cpu_seconds: CPU seconds of all threads by name.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.cpu_seconds: dict[str, float] = defaultdict(float)

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), time.process_time()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the block under a name."""
        wall, cpu = self._now()
        yield
        wall_end, cpu_end = self._now()
        self.seconds[name] += wall_end - wall
        self.cpu_seconds[name] += cpu_end - cpu

    @contextmanager
    def watch(self, module: ModuleType, function: str, name: str) -> Iterator[None]:
        """Add the time of all calls of a module's function in the block under a name."""
        original: Callable[..., Any] = getattr(module, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.measure(name):
                return original(*args, **kwargs)

        setattr(module, function, timed)
        try:
            yield
        finally:
            setattr(module, function, original)


def estimator(work: Work, kind: OptimizerKind, update: str, device: torch.device) -> Estimator:
    """Make an estimator by PES on random images."""
    generator = torch.Generator().manual_seed(0)
    pixels, *hidden, classes = work.sizes
    images = torch.rand(IMAGES, pixels, generator=generator)
    labels = torch.randint(classes, (IMAGES,), generator=generator)
    task = ImageMLP(images, labels, hidden, work.batch_size, num_classes=classes).to(device)
    training = LocalTraining(work.num_workers, work.local_steps, 0.1, optimizer=LocalOptimizer(kind))
    pairs = Particles(task, training, work.num_pairs, LogUniform(100, 1_000), "local", seed=0, update=update)
    return Estimator(pairs, kind="pes", truncation=work.num_rounds, sigma=0.01, log_floor=None, seed=0)


def measure(work: Work, kind: OptimizerKind, update: str, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Measure each part of a meta-iteration: the median over repeats, after one to warm up.

    Args:
        work: Size of the meta-iteration.
        kind: Kind of the local optimizer.
        update: Kind of update of the network, see `AdaMLP`.
        repeats: Number of timed meta-iterations, >= 1.
        device: Device of the tasks and the network.
    """
    network = AdaMLP.base_step(seed=0) if update.endswith("blended_nesterov") else AdaMLP(seed=0, update=update)
    network.update = update
    network, own = network.to(device), estimator(work, kind, update, device)
    clocks, peak = [], 0.0
    for repeat in range(repeats + 1):
        peak = max(peak, sgemm_flops())
        clock = Clock(device)
        with ExitStack() as stack:
            stack.enter_context(clock.watch(simulation, "local_round", "local steps"))
            stack.enter_context(clock.watch(outer, "outer_step", "outer"))
            stack.enter_context(clock.watch(learned, "apply", "network"))
            with clock.measure("whole"):
                own.window(network, repeat)
        for times in (clock.seconds, clock.cpu_seconds):
            times["features"] = times["outer"] - times["network"]
            times["bookkeeping"] = times["whole"] - times["local steps"] - times["outer"]
        if repeat:
            clocks.append(clock)
    bound = work.flop / peak if device.type == "cpu" else None
    rows = []
    for part in ("local steps", "features", "network", "bookkeeping", "whole"):
        row = {
            "part": part,
            "seconds": statistics.median(clock.seconds[part] for clock in clocks),
            "CPU seconds": statistics.median(clock.cpu_seconds[part] for clock in clocks),
        }
        whole = bound if part == "whole" else None
        runs = 2 * work.num_pairs * work.num_rounds / row["CPU seconds"] if part == "whole" else None
        share = whole and whole / row["seconds"]
        rows.append({**row, "sgemm bound": whole, "share": share, "rounds of a run per CPU second": runs})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line."""
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=["paper", "8x8"], help="sizes of the task")
    parser.add_argument("--local-optimizer", choices=get_args(OptimizerKind), default="sgd")
    parser.add_argument("--update", default="published", help="kind of update of the network, see AdaMLP")
    parser.add_argument("--repeats", type=count, default=3, help="timed meta-iterations")
    parser.add_argument("--rounds", type=count, default=50, help="rounds of a meta-iteration")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=count, help="threads of torch")
    parser.add_argument("--json", type=Path, help="file for the numbers")


def main(args: argparse.Namespace) -> None:
    """Measure meta-iterations and print a table for each size."""
    if args.threads:
        torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "machine": machine(),
        "options": {k: str(v) for k, v in vars(args).items() if k != "main"},
    }
    for name in args.work:
        work = replace(WORKS[name], num_rounds=args.rounds)
        rows = measure(work, args.local_optimizer, args.update, args.repeats, torch.device(args.device))
        print(f"{name}: {work}\n{work.flop / 1e9:.0f} GFLOP, {torch.get_num_threads()} threads\n{table(rows)}\n")
        result[name] = rows
    if args.json:
        write_json(args.json, result)
