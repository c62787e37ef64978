"""Measure the overhead of the strategy: CPU time per step outside syncs, and syncs and outer steps per round.

An MLP 784-128-128-10 is trained on random data with LearnedLocalSGD and RoundMonitor, in one process per worker with
one thread each. The CPU time of the main thread is measured in the methods of this package that Lightning calls in
every step, without the methods of Lightning that these call, and without syncs. Reading the clock costs as much as the
methods themselves, most of all with cold caches, so a second training times methods that do nothing in their places.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from examples.benchmarks.report import machine, write_json
from lightning_lopt.callbacks import RoundMonitor
from lightning_lopt.costs import count, table
from lightning_lopt.rounds import Rounds
from lightning_lopt.strategies import LearnedLocalSGD, LocalSGD
from lightning_lopt.sync import Sync

WARM_UP_ROUNDS = 2
OURS, HOST, SYNC = "strategy", "Lightning", "sync"
MONITOR = "RoundMonitor"


class Stopwatch:
    """CPU seconds of the main thread by label; those of nested labels are excluded, those of the clock included.

    Attributes:
        seconds: CPU seconds by label.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = [0.0]

    def timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        """Wrap a function so that its time is added to a label."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.thread_time() - start
                self.seconds[label] += spent - self._inner.pop()
                self._inner[-1] += spent

        return wrapper

    @contextmanager
    def around(self, methods: Any) -> Iterator[None]:
        """Time methods, given as (class, name, label), during the block."""
        with ExitStack() as stack:
            for owner, name, label in methods:
                stack.enter_context(patch.object(owner, name, self.timed(getattr(owner, name), label)))
            yield


class _IdleStrategy(LocalSGD):
    """A strategy with the calls of `LocalSGD` in a step, which do nothing."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        DDPStrategy.on_train_batch_start(self, batch, batch_idx)

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        output = DDPStrategy.optimizer_step(self, optimizer, closure, model, **kwargs)
        self.count()
        return output

    def count(self) -> None: ...

    def check_steps(self) -> None: ...  # that nothing is synced is no mistake here


class _IdleMonitor(pl.Callback):
    """A callback whose hooks do nothing."""


TIMED = (
    (LocalSGD, "on_train_batch_start", OURS),
    (LocalSGD, "optimizer_step", OURS),
    (Rounds, "step", OURS),
    (Sync, "launch", SYNC),
    (Sync, "finish", SYNC),
    (RoundMonitor, "on_train_batch_end", MONITOR),
    (DDPStrategy, "on_train_batch_start", HOST),
    (DDPStrategy, "optimizer_step", HOST),
)
TIMED_IDLE = (
    (_IdleStrategy, "on_train_batch_start", OURS),
    (_IdleStrategy, "optimizer_step", OURS),
    (_IdleStrategy, "count", OURS),
    (_IdleMonitor, "on_train_batch_end", MONITOR),
    (DDPStrategy, "on_train_batch_start", HOST),
    (DDPStrategy, "optimizer_step", HOST),
)


class _Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
        self.layers = nn.Sequential(*layers)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Clock(pl.Callback):
    """Wall time at the end of each step after the steps to warm up, whose CPU time is dropped too."""

    def __init__(self, watch: Stopwatch, warm_up_steps: int) -> None:
        self.times: list[float] = []
        self._watch, self._warm_up_steps = watch, warm_up_steps

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._warm_up_steps:
            self._watch.seconds.clear()
            self.times = [time.perf_counter()]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.times.append(time.perf_counter())


def _train(
    strategy: LocalSGD, monitor: pl.Callback, timed: Any, num_workers: int, local_steps: int, num_rounds: int
) -> tuple[pl.Trainer, dict[str, float], list[float]]:
    """Train; return the trainer, CPU microseconds per step by label, and the times at which timed steps ended."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(128 * 64, 784, generator=generator)
    labels = torch.randint(10, (len(images),), generator=generator)
    loader = DataLoader(TensorDataset(images, labels), batch_size=128)
    watch = Stopwatch()
    clock = _Clock(watch, WARM_UP_ROUNDS * local_steps)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=num_workers,
        strategy=strategy,
        callbacks=[clock, monitor],
        max_steps=(WARM_UP_ROUNDS + num_rounds) * local_steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with watch.around(timed):
        trainer.fit(_Model(), loader)
    steps = num_rounds * local_steps
    return trainer, {label: watch.seconds[label] / steps * 1e6 for label in (OURS, MONITOR)}, clock.times


def measure(num_workers: int, local_steps: int, num_rounds: int) -> dict[str, Any]:
    """Train, and return the measurements of this process.

    Args:
        num_workers: Number of worker processes, K.
        local_steps: Number of local steps per round, H.
        num_rounds: Number of timed rounds.
    """
    sizes = (num_workers, local_steps, num_rounds)
    monitor = RoundMonitor()
    trainer, per_step, times = _train(LearnedLocalSGD(local_steps), monitor, TIMED, *sizes)
    _, idle, _ = _train(_IdleStrategy(local_steps), _IdleMonitor(), TIMED_IDLE, *sizes)
    rounds = monitor.history[-num_rounds:]
    durations = [end - start for start, end in pairwise(times[::local_steps])]
    parts = {name: [r[f"rounds/{name}_seconds"] for r in rounds] for name in ("sync", "transfer", "outer")}
    parts["local"] = [total - sync for total, sync in zip(durations, parts["sync"], strict=True)]
    return {
        "microseconds_per_step": per_step,
        "idle_microseconds_per_step": idle,
        "milliseconds_per_round": {name: [1e3 * x for x in values] for name, values in parts.items()},
        "is_rank_zero": trainer.is_global_zero,
    }


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table: median, lowest and highest value over the rounds."""
    per_step, idle = result["microseconds_per_step"], result["idle_microseconds_per_step"]
    costs = {
        **per_step,
        "together": sum(per_step.values()),
        "together, with methods that do nothing": sum(idle.values()),
    }
    lines = [
        {"quantity": f"{name}, CPU us per step", "median": value, "lowest": None, "highest": None}
        for name, value in costs.items()
    ]
    names = {"local": "local steps", "sync": "whole sync", "transfer": "waiting and transfer", "outer": "outer step"}
    for key, name in names.items():
        values = result["milliseconds_per_round"][key]
        lines.append(
            {
                "quantity": f"{name}, ms per round",
                "median": statistics.median(values),
                "lowest": min(values),
                "highest": max(values),
            }
        )
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line."""
    parser.add_argument("--num-workers", type=count, default=8, help="worker processes")
    parser.add_argument("--local-steps", type=count, default=16)
    parser.add_argument("--rounds", type=count, default=30, help="timed rounds")
    parser.add_argument("--json", type=Path, help="file for the numbers")


def main(args: argparse.Namespace) -> None:
    """Train and print the table, on rank 0."""
    torch.set_num_threads(1)
    result = measure(args.num_workers, args.local_steps, args.rounds)
    if not result.pop("is_rank_zero"):
        return
    print(f"K = {args.num_workers}, H = {args.local_steps}, one thread per worker\n\n{table(rows(result))}")
    if args.json:
        sizes = {name: getattr(args, name) for name in ("num_workers", "local_steps", "rounds")}
        write_json(args.json, {"machine": machine(), **sizes, **result})
