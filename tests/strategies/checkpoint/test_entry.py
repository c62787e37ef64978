"""Checkpoints that releases wrote: their weights load, and they resume, or are refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lopt import AdaMLP, CheckpointError, LearnedLocalSGD
from lightning_lopt.strategies.checkpoint.entry import CHECKPOINT_VERSION
from tests.strategies.support import trainer

FIXTURES = Path(__file__).parents[2] / "fixtures"
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


def _strategy() -> LearnedLocalSGD:
    return LearnedLocalSGD(4, network=AdaMLP.base_step(seed=0), overlap_steps=2, compression="bf16", virtual_workers=2)


def _rows() -> DataLoader:
    return DataLoader(TensorDataset(data(), (data()[:, 0] > data()[:, 1]).long()), batch_size=8)


class Evaluated(Module):
    def validation_step(self, batch, batch_idx):
        self.seen = self(data()[:4])

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        self.seen = self(data()[:4])


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_weights_of_0_1_are_evaluated(method):
    module = Evaluated()
    run = trainer(_strategy(), 1)
    getattr(run, method)(module, _rows(), ckpt_path=PATH)
    torch.testing.assert_close(module.seen, torch.tensor(EXPECTED["output"]))


def test_0_1_is_refused_with_the_release_that_resumes_it():
    run = trainer(_strategy(), 1, max_epochs=2)
    with pytest.raises(CheckpointError, match=r"layout 8.*Resume with lightning_lopt 0\.1\.x"):
        run.fit(Module(), _rows(), ckpt_path=PATH)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": CHECKPOINT_VERSION + 1}, "Resume with a newer release"),
        ({"version": 3}, "Resume with the release that wrote it"),
        ({"version": "?"}, "Resume with the release that wrote it"),
        ({"version": CHECKPOINT_VERSION}, "has no 'num_parts'"),
    ],
)
def test_other_layouts_are_refused(change, match, tmp_path):
    checkpoint = torch.load(PATH, weights_only=True)
    checkpoint["lightning_lopt"] = {"parts": [], **change}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    run = trainer(_strategy(), 1, max_epochs=2)
    with pytest.raises(CheckpointError, match=match):
        run.fit(Module(), _rows(), ckpt_path=tmp_path / "other.ckpt")


def test_a_checkpoint_says_how_many_workers_it_holds(tmp_path):
    run = trainer(_strategy(), 1, max_epochs=1)
    run.fit(Module(), _rows())
    run.save_checkpoint(tmp_path / "new.ckpt")
    entry = torch.load(tmp_path / "new.ckpt", weights_only=True)["lightning_lopt"]
    assert (entry["version"], entry["num_workers"], entry["num_parts"]) == (CHECKPOINT_VERSION, 2, 2)
    assert run.strategy.num_workers == 2
    for part in entry["parts"]:  # as of a release that has other entries: the rest goes on
        del part["gradients"], part["loaders"], part["random"]
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    checkpoint["lightning_lopt"] = entry
    torch.save(checkpoint, tmp_path / "less.ckpt")
    more = trainer(_strategy(), 1, max_epochs=2)
    more.fit(Module(), _rows(), ckpt_path=tmp_path / "less.ckpt")
    assert more.global_step == 2 * run.global_step
