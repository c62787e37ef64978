"""Workers that share a sharded model in a Trainer: 2 x 2 ranks beside 2 plain workers of the same rows."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_lopt import DiLoCo, LearnedLocalSGD, LocalSGD, PowerSGD
from tests.processes import run_workers
from tests.strategies.support import trainer
from tests.test_islands import _batch, _Model

STRATEGIES = {
    "diloco": partial(DiLoCo, local_steps=3),
    "learned": partial(LearnedLocalSGD, local_steps=3),
    "mean": partial(LocalSGD, local_steps=3, overlap_steps=1, compression=PowerSGD(1)),
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


def _fit(rank, name, folder, num_workers, size, save=None, resume=None):
    torch.set_default_dtype(torch.float64)
    pl.seed_everything(0, verbose=False)
    module = _Sharded() if size > 1 else _Module()
    data = torch.cat([_batch(i % 2, i) for i in range(16)])
    batch_size = 4 // size
    callbacks = [] if save is None else [ModelCheckpoint(folder, save, every_n_train_steps=10, save_top_k=-1)]
    run = trainer(
        STRATEGIES[name](ranks_per_worker=size),
        devices=num_workers * size,
        max_epochs=2,
        precision="64-true",
        gradient_clip_val=1.0,
        val_check_interval=2,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
    )
    loaders = DataLoader(data, batch_size=batch_size), DataLoader(data, batch_size=batch_size)
    run.fit(module, *loaders, ckpt_path=None if resume is None else f"{folder}/{resume}.ckpt")
    path = f"{folder}/export.ckpt"
    run.save_checkpoint(path, weights_only=True)
    weights = torch.load(path, weights_only=True)["state_dict"]
    run.strategy.barrier()
    return weights, float(run.callback_metrics["val"]), run.global_step


def _all(rank, folder, runs):
    results = {}
    for key, (name, *arguments) in runs.items():
        results[key] = _fit(rank, name, folder, *arguments)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Runs of 2 x 2 ranks and of 2 plain workers, some of them resumed from a checkpoint of theirs or the others'."""
    folder = str(tmp_path_factory.mktemp("sharded"))
    names = {f"{name} islands": (name, 2, 2, f"{name}-islands") for name in STRATEGIES}
    again = {f"{name} islands again": (name, 2, 2, None, f"{name}-islands") for name in STRATEGIES}
    crossed = {f"{name} from plain": (name, 2, 2, None, f"{name}-plain") for name in STRATEGIES}
    plain = {f"{name} plain": (name, 2, 1, f"{name}-plain") for name in STRATEGIES}
    single = {f"{name} to plain": (name, 2, 1, None, f"{name}-islands") for name in STRATEGIES}
    first = run_workers(_all, 2, folder, plain, connect=False)[0]
    second = run_workers(_all, 4, folder, {**names, **again, **crossed}, connect=False)[0]
    third = run_workers(_all, 2, folder, single, connect=False)[0]
    return {**first, **second, **third}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("way", ["islands", "islands again", "from plain", "to plain"])
def test_islands_train_as_plain_workers_do_in_a_trainer(results, name, way):
    weights, val, steps = results[f"{name} {way}"]
    expected, expected_val, expected_steps = results[f"{name} plain"]
    exact = results[f"{name} islands"][0]
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
        assert way != "islands again" or torch.equal(weights[key], exact[key])
    assert val == pytest.approx(expected_val, abs=1e-10)
    assert steps == expected_steps
