"""Compare QSR with constant numbers of local steps along a cosine: number of syncs and final test accuracy.

A small convolutional network with BatchNorm is trained on Fashion-MNIST by the Trainer in several processes. The final
weights are tested with the workers' averaged running statistics, and with re-estimated ones.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from examples.benchmarks.compare.data import fashion_mnist
from examples.benchmarks.report import append_rows, machine, read_rows
from examples.benchmarks.wire.namespaces import run_local
from lightning_lopt.callbacks import BatchNormReestimation
from lightning_lopt.costs import count, table
from lightning_lopt.schedules import QSR, Constant, RoundInfo
from lightning_lopt.strategies import LocalSGD

BASE, LONG = 4, 12  # with LONG steps there are about as many syncs as with the rule
LR = 0.1
SCHEDULES: dict[str, Callable[[RoundInfo], int]] = {
    f"H = {BASE}": Constant(BASE),
    f"H = {LONG}": Constant(LONG),
    f"QSR from H = {BASE}": QSR(alpha=1.1 * LR * BASE**0.5, base_steps=BASE),
}


class ConvNet(pl.LightningModule):
    """Three convolutions with BatchNorm, 16-32-64; SGD with momentum along a cosine.

    Args:
        steps: Number of steps after which the learning rate is 0.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))
        self.steps = steps

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.unsqueeze(1) / 255)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), LR, momentum=0.9, weight_decay=5e-4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Fraction of images that are classified correctly, in percent."""
        self.eval()
        hits = [(self(x).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)]
        return 100 * int(sum(hits)) / len(labels)


@dataclass(frozen=True)
class Setup:
    """Settings of the runs.

    Attributes:
        data: Folder with Fashion-MNIST's files.
        out: File that rows are appended to.
        num_workers: Number of workers, K.
        steps: Number of local steps.
        batch_size: Examples per worker and local step.
        num_batches: Number of batches for re-estimated statistics of BatchNorm.
        seeds: Seeds of weights and data.
    """

    data: str
    out: str
    num_workers: int = 2
    steps: int = 2000
    batch_size: int = 32
    num_batches: int = 100
    seeds: Sequence[int] = (0, 1, 2)


def train(name: str, seed: int, setup: Setup) -> dict[str, Any] | None:
    """Train one run.

    Args:
        name: Name of the schedule, a key of `SCHEDULES`.
        seed: Seed of weights and data.
        setup: Settings of the runs.

    Returns:
        Number of syncs and accuracies on rank 0; None on the other ranks.
    """
    pl.seed_everything(seed, verbose=False)
    images, labels = fashion_mnist("train", Path(setup.data))
    test = fashion_mnist("t10k", Path(setup.data))
    strategy, module = LocalSGD(SCHEDULES[name]), ConvNet(setup.steps)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=setup.num_workers,
        strategy=strategy,
        max_steps=setup.steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(images, labels), setup.batch_size, shuffle=True))
    accuracy = module.accuracy(*test)
    BatchNormReestimation(setup.num_batches).on_train_end(trainer, module)
    assert strategy.rounds is not None
    row = {"schedule": name, "seed": seed, "syncs": strategy.rounds.round_idx, "accuracy": accuracy}
    return {**row, "reestimated": module.accuracy(*test)} if trainer.is_global_zero else None


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the table: mean, lowest and highest accuracy over the seeds."""
    by_name = defaultdict(list)
    for row in rows:
        by_name[row["schedule"]].append(row)
    lines = []
    for name, runs in by_name.items():
        line: dict[str, Any] = {"schedule": name, "syncs": runs[0]["syncs"]}
        for key in ("accuracy", "reestimated"):
            values = [run[key] for run in runs]
            line |= {key: statistics.fmean(values), f"{key}, range": f"{min(values):.2f}-{max(values):.2f}"}
        lines.append(line)
    return table(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line."""
    default = Setup("", "")
    parser.add_argument("out", help="file that rows are appended to")
    parser.add_argument("--data", required=True, help="folder with Fashion-MNIST's idx.gz files")
    parser.add_argument("--num-workers", type=count, default=default.num_workers)
    parser.add_argument("--steps", type=count, default=default.steps, help="number of local steps")
    parser.add_argument("--batch-size", type=count, default=default.batch_size, help="examples per worker")
    parser.add_argument(
        "--num-batches",
        type=count,
        default=default.num_batches,
        help="batches for new statistics of BatchNorm",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=default.seeds)


def main(args: argparse.Namespace) -> None:
    """Start the workers, and print the table."""
    setup = Setup(**{field: getattr(args, field) for field in asdict(Setup("", ""))})
    fashion_mnist("t10k", Path(setup.data))  # where it is missing, no worker starts
    run_local(["-m", "examples.benchmarks.compare.qsr", json.dumps(asdict(setup))], setup.num_workers)
    print(summary(read_rows(setup.out, ("schedule", "accuracy"))))
    print(machine())


def work(text: str) -> None:
    """Train all runs as one of the workers.

    Args:
        text: A `Setup` as JSON.
    """
    setup = Setup(**json.loads(text))
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for seed in setup.seeds:
        for name in SCHEDULES:
            row = train(name, seed, setup)
            if row is not None:
                append_rows(setup.out, [row])
    dist.destroy_process_group()  # its threads may abort a process that ends without this


if __name__ == "__main__":
    work(sys.argv[1])
