"""Checkpoints that releases wrote: their weights load, and they resume, or are refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lopt import AdaMLP, LearnedLocalSGD
from lightning_lopt.strategies.checkpoint import CHECKPOINT_VERSION
from tests.strategies_support import trainer

FIXTURES = Path(__file__).parents[1] / "fixtures"
PATH = FIXTURES / "checkpoint_0_1.ckpt"
EXPECTED = json.loads(PATH.with_suffix(".json").read_text())


def data() -> torch.Tensor:
    return torch.arange(96 * 4).mul(7919).remainder(101).div(50).sub(1).view(96, 4)


class Module(pl.LightningModule):
    """The one of the fixture's README."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
        self.losses: list[float] = []

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def test_weights_of_0_1_load():
    module = Module.load_from_checkpoint(PATH, weights_only=True).eval()
    torch.testing.assert_close(module(data()[:4]), torch.tensor(EXPECTED["output"]))


def test_0_1_resumes_or_is_refused():
    strategy = LearnedLocalSGD(
        4, network=AdaMLP.base_step(seed=0), overlap_steps=2, compression="bf16", virtual_workers=2
    )
    run = trainer(strategy, 1, max_epochs=2)
    module, rows = Module(), TensorDataset(data(), (data()[:, 0] > data()[:, 1]).long())
    saved = torch.load(PATH, weights_only=True)["lightning_lopt"]["version"]
    if saved != CHECKPOINT_VERSION:
        with pytest.raises(ValueError, match=f"has version {saved}, .*begin anew from its weights"):
            run.fit(module, DataLoader(rows, batch_size=8), ckpt_path=PATH)
        return
    run.fit(module, DataLoader(rows, batch_size=8), ckpt_path=PATH)
    assert run.strategy.rounds.round_idx == 3
    torch.testing.assert_close(torch.tensor(module.losses), torch.tensor(EXPECTED["losses"]))
    final = {name: torch.tensor(value) for name, value in EXPECTED["final"].items()}
    torch.testing.assert_close(dict(module.state_dict()), final)
