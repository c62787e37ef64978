"""A small LightningModule, data and Trainer for the strategy tests."""

from __future__ import annotations

import math
import os
import random
import textwrap
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

QUIET = {"enable_progress_bar": False, "enable_model_summary": False}
SCRIPT = """\
from lightning_lopt import LearnedLocalSGD, LocalSGD
from tests.strategies.support import Classifier, flat, loader, trainer

if __name__ == "__main__":
    run = trainer({strategy}, {devices}, **{options})
    module = Classifier(seed=0)
    run.fit(module, loader())
    rounds = run.strategy.rounds.round_idx
    line = f"rank {{run.global_rank}} of {{run.world_size}} rounds {{rounds}} sum {{flat(module).sum().item()}}"
    print(line + chr(10), end="", flush=True)
"""


class Classifier(pl.LightningModule):
    """A net with BatchNorm and tied and frozen parameters; it records what its hooks see."""

    def __init__(self, lr: float = 0.1, seed: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        if seed is not None:
            torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout))
        self.square = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)
        self.alias = self.square.weight  # tied: one parameter, two names
        self.head.bias.requires_grad_(False)
        self.lr = lr
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        return self.head(self.square(self.body(x)))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def on_validation_start(self):
        self.seen.append(flat(self))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        body, rest = list(self.body.parameters()), [self.square.weight, *self.head.parameters()]
        optimizer = torch.optim.Adam([{"params": body}, {"params": rest, "lr": self.lr / 2}], lr=self.lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def flat(module: nn.Module) -> torch.Tensor:
    """All parameters and buffers in one vector."""
    return torch.cat([t.detach().double().flatten() for t in module.state_dict().values()]).clone()


def loader(rows: int = 96, batch_size: int = 4, shuffle: bool = True) -> DataLoader:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, 6, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=batch_size, shuffle=shuffle)


def trainer(strategy, devices: int = 2, **kwargs) -> pl.Trainer:
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, **QUIET, **kwargs}
    return pl.Trainer(devices=devices, strategy=strategy, **options)


def damaged(whole: bytes, index: int, draw: random.Random) -> bytearray:
    """A file cut off, with a bit or a stretch of bytes changed, or extended: in turn by `index`."""
    data, at = bytearray(whole), draw.randrange(len(whole))
    if index % 4 == 0:
        return data[:at]
    if index % 4 == 1:
        data[at] ^= 1 << draw.randrange(8)
    elif index % 4 == 2:
        data[at : at + 64] = draw.randbytes(64)
    else:
        data += draw.randbytes(1 + draw.randrange(100_000))
    return data


def write_script(folder: Path, strategy: str, devices: int, **options) -> tuple[Path, dict[str, str]]:
    """A script that trains with an H of 4, for a launcher to start, and the environment it needs."""
    path = folder / "script.py"
    path.write_text(SCRIPT.format(strategy=strategy, devices=devices, options=options))
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    return path, {**os.environ, **loopback, "PYTHONPATH": str(Path(__file__).parents[2])}


def check_script(printed: str, num_workers: int) -> None:
    """After an epoch of 24 batches over all workers, everybody had every round and holds the same weights."""
    lines = sorted(line.split(" sum ") for line in printed.splitlines() if line.startswith("rank"))
    rounds = math.ceil(24 / num_workers / 4)
    assert [line for line, _ in lines] == [f"rank {i} of {num_workers} rounds {rounds}" for i in range(num_workers)]
    assert len({weights for _, weights in lines}) == 1
    assert math.isfinite(float(lines[0][1]))


def cli_trainer(folder: Path, config: str, data: type[pl.LightningDataModule] | None = None) -> pl.Trainer:
    """The Trainer that LightningCLI makes of a YAML text."""
    path = folder / "config.yaml"
    path.write_text(textwrap.dedent(config))
    return LightningCLI(Classifier, data, run=False, args=["--config", str(path)], save_config_callback=None).trainer
