"""Workers that share a sharded model in a Trainer: 2 x 2 ranks beside 2 plain workers of the same rows."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_lopt import DiLoCo, LearnedLocalSGD, LocalSGD
from tests.processes import run_workers
from tests.strategies.support import trainer
from tests.test_islands import _batch, _Model

STRATEGIES = {
    "diloco": partial(DiLoCo, local_steps=3),
    "learned": partial(LearnedLocalSGD, local_steps=3),
    "mean": partial(LocalSGD, local_steps=3, overlap_steps=1),
}


class _Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = _Model()

    def loss(self, tokens):
        logits = self.model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, tokens, _):
        return self.loss(tokens)

    def validation_step(self, tokens, _):
        self.log("val", self.loss(tokens), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)


class _Sharded(_Module):
    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            mesh = self.device_mesh["data_parallel"]
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)


def _fit(rank, name, islands, folder):
    torch.set_default_dtype(torch.float64)
    pl.seed_everything(0, verbose=False)
    module = _Sharded() if islands else _Module()
    data = torch.cat([_batch(i % 2, i) for i in range(16)])
    size = 2 if islands else 4
    run = trainer(
        STRATEGIES[name](ranks_per_worker=2 if islands else 1),
        devices=4 if islands else 2,
        max_epochs=2,
        precision="64-true",
        gradient_clip_val=1.0,
        val_check_interval=2,
    )
    run.fit(module, DataLoader(data, batch_size=size), DataLoader(data, batch_size=size))
    path = f"{folder}/{name}{islands}.ckpt"
    run.save_checkpoint(path, weights_only=True)
    weights = torch.load(path, weights_only=True)["state_dict"]
    return weights, float(run.callback_metrics["val"]), run.global_step


def _all(rank, islands, folder):
    return {name: _fit(rank, name, islands, folder) for name in STRATEGIES}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sharded"))
    return run_workers(_all, 4, True, folder, connect=False), run_workers(_all, 2, False, folder, connect=False)


@pytest.mark.parametrize("name", STRATEGIES)
def test_sharded_workers_train_as_plain_ones_do(results, name):
    islands, plain = results
    weights, val, steps = islands[0][name]
    expected, expected_val, expected_steps = plain[0][name]
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
    assert val == pytest.approx(expected_val, abs=1e-10)
    assert steps == expected_steps
