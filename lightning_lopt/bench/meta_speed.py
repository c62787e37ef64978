"""Time of one meta-iteration, by part, beside the bound that this machine's matrix products set.

A meta-iteration is one window of PES: all antithetic pairs take all rounds of local training and outer steps. The bound
counts the multiplications of the local steps (forward and backward) and of the learned step's separable form (3.2 kFLOP
per parameter) at the rate of the fastest square sgemm of the same run; the share is bound / time. CPU seconds are those
of all threads, which other processes hardly disturb.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lightning_lopt.bench.outer_step import FLOP_PER_PARAMETER, sgemm_flops
from lightning_lopt.bench.report import machine, table, write_json
from lightning_lopt.functional import learned
from lightning_lopt.meta import ImageMLP, LocalOptimizer, LocalTraining, LogUniform, outer, simulation
from lightning_lopt.meta.estimator import Estimator
from lightning_lopt.meta.particles import Particles
from lightning_lopt.network import AdaMLP

IMAGES = 10_000


@dataclass(frozen=True)
class Work:
    """The size of a meta-iteration.

    Attributes:
        sizes: of the MLP's layers, from the pixels to the classes.
        batch_size: of a local step of one worker.
        num_workers: K.
        local_steps: H.
        num_pairs: antithetic pairs.
        num_rounds: of the window.
    """

    sizes: tuple[int, ...]
    batch_size: int
    num_workers: int = 8
    local_steps: int = 4
    num_pairs: int = 8
    num_rounds: int = 50

    @property
    def flop(self) -> float:
        """Of all matrix products.

        Example:
            >>> f"{Work((784, 128, 128, 10), 128).flop / 1e9:.0f}"
            '1965'
        """
        products = [a * b for a, b in pairwise(self.sizes)]
        per_example = 2 * (3 * sum(products) - products[0])  # no gradient of the pixels
        steps = 2 * self.num_pairs * self.num_rounds * self.num_workers * self.local_steps
        parameters = sum(products) + sum(self.sizes[1:])
        outer = 2 * self.num_pairs * self.num_rounds * parameters * FLOP_PER_PARAMETER
        return steps * self.batch_size * per_example + outer


WORKS = {"paper": Work((784, 128, 128, 10), 128), "8x8": Work((64, 32, 10), 32)}


class Clock:
    """Adds up wall and CPU seconds by name.

    Args:
        device: whose work a measurement waits for.
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
        """Add the time of what runs inside."""
        wall, cpu = self._now()
        yield
        wall_end, cpu_end = self._now()
        self.seconds[name] += wall_end - wall
        self.cpu_seconds[name] += cpu_end - cpu

    @contextmanager
    def watch(self, module: ModuleType, function: str, name: str) -> Iterator[None]:
        """Add the time of all calls of a module's function made inside."""
        original: Callable[..., Any] = getattr(module, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.measure(name):
                return original(*args, **kwargs)

        setattr(module, function, timed)
        try:
            yield
        finally:
            setattr(module, function, original)


def estimator(work: Work, kind: str, device: torch.device) -> Estimator:
    """PES on random images."""
    generator = torch.Generator().manual_seed(0)
    pixels, *hidden, classes = work.sizes
    images = torch.rand(IMAGES, pixels, generator=generator)
    labels = torch.randint(classes, (IMAGES,), generator=generator)
    task = ImageMLP(images, labels, hidden, work.batch_size, num_classes=classes).to(device)
    optimizer = LocalOptimizer(kind)  # pyright: ignore[reportArgumentType] (checked there)
    training = LocalTraining(work.num_workers, work.local_steps, 0.1, optimizer=optimizer)
    pairs = Particles(task, training, work.num_pairs, LogUniform(100, 1_000), "local", seed=0)
    return Estimator(pairs, kind="pes", truncation=work.num_rounds, sigma=0.01, log_floor=None, seed=0)


def measure(work: Work, kind: str, update: str, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each part of a meta-iteration, the median over repeats after one that warms up.

    Args:
        work: its size.
        kind: of the local optimizer.
        update: of the network.
        repeats: timed meta-iterations, >= 1.
        device: where they run.
    """
    network, own = AdaMLP(seed=0, update=update).to(device), estimator(work, kind, device)
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
        rows.append({**row, "sgemm bound": whole, "share": whole and whole / row["seconds"]})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command line."""
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--local-optimizer", default="sgd", help="sgd, momentum or adamw")
    parser.add_argument("--update", default="published", help="kind of update of the network, see AdaMLP")
    parser.add_argument("--repeats", type=int, default=3, help="timed meta-iterations")
    parser.add_argument("--rounds", type=int, default=50, help="of a meta-iteration")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")


def main(args: argparse.Namespace) -> None:
    """Measure meta-iterations and print a table for each size."""
    if args.threads:
        torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "machine": machine(),
        "options": {k: str(v) for k, v in vars(args).items() if k != "main"},
    }
    for name in args.work:
        base = WORKS[name]
        work = Work(base.sizes, base.batch_size, num_rounds=args.rounds)
        rows = measure(work, args.local_optimizer, args.update, args.repeats, torch.device(args.device))
        print(f"{name}: {work}\n{work.flop / 1e9:.0f} GFLOP, {torch.get_num_threads()} threads\n{table(rows)}\n")
        result[name] = rows
    if args.json:
        write_json(args.json, result)
