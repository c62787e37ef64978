"""Whole rounds of the authors' code, on real processes: through `Rounds` and through the Lightning strategies."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lopt import LearnedLocalSGD, LearnedOptimizer, LocalSGD, Rounds, SlowMo, SlowMomentum
from tests.conftest import VECTORS
from tests.golden import golden_adamlp, golden_mlp
from tests.processes import run_cases

METHODS = ["local_sgd", "slowmo", "lopt_a", "lagg_a"]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}


def _load(method):
    return np.load(VECTORS / f"rounds_{method}.npz")


def _batches(data, rank, dtype):
    x = torch.from_numpy(data["batches_x"][:, rank]).to(dtype).flatten(0, 1)
    return TensorDataset(x, torch.from_numpy(data["batches_y"][:, rank]).long().flatten(0, 1))


def _compare(model, data, round_idx, dtype):
    for ours, theirs in zip(model.parameters(), golden_mlp(data, torch.float64, round_idx).parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=TOLERANCE[dtype])


def _with_rounds(rank, method, dtype):
    data = _load(method)
    outer = {
        "local_sgd": lambda: None,
        "slowmo": lambda: partial(SlowMomentum, lr=float(data["alpha"]), momentum=float(data["beta"])),
    }.get(method, lambda: partial(LearnedOptimizer, network=golden_adamlp(data, dtype)))()
    model = golden_mlp(data, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=float(data["gamma"]))
    rounds = Rounds(model, optimizer, int(data["H"]), outer)
    losses = []
    for x, y in _batches(data, rank, dtype):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if rounds.step():
            _compare(model, data, rounds.round_idx, dtype)
            assert not rounds.last_report.fell_back
    return rounds.round_idx, losses


class _Module(pl.LightningModule):
    def __init__(self, data, dtype):
        super().__init__()
        self.mlp, self.data, self.dtype_, self.losses = golden_mlp(data, dtype), data, dtype, []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.mlp(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if (batch_idx + 1) % int(self.data["H"]) == 0:
            _compare(self.mlp, self.data, (batch_idx + 1) // int(self.data["H"]), self.dtype_)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=float(self.data["gamma"]))


def _with_trainer(rank, method, dtype):
    data = _load(method)
    steps = int(data["H"])
    strategy = {
        "local_sgd": lambda: LocalSGD(steps),
        "slowmo": lambda: SlowMo(steps, outer_lr=float(data["alpha"]), momentum=float(data["beta"])),
    }.get(method, lambda: LearnedLocalSGD(steps, network=golden_adamlp(data, dtype)))()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(data["K"]),
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        precision="64-true" if dtype == torch.float64 else "32-true",
    )
    module = _Module(data, dtype)
    trainer.fit(module, DataLoader(_batches(data, rank, dtype), batch_size=None))
    assert strategy.rounds is not None
    return strategy.rounds.round_idx, module.losses


CASES = {f"{method} {dtype}": (method, dtype) for method in METHODS for dtype in TOLERANCE}


@pytest.fixture(scope="module")
def plain_loops():
    return run_cases(_with_rounds, 4, CASES)


@pytest.fixture(scope="module")
def trainers():
    return run_cases(_with_trainer, 4, CASES, connect=False)


@pytest.mark.processes
@pytest.mark.parametrize("engine", ["plain_loops", "trainers"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_rounds_equal_the_authors(vectors, request, method, dtype, engine):
    data = vectors(f"rounds_{method}.npz")
    num_workers = int(data["K"])
    results = request.getfixturevalue(engine)[f"{method} {dtype}"]
    assert [rounds for rounds, _ in results] == [len(data["loss"])] * num_workers == [6] * 4
    losses = np.array([losses for _, losses in results]).reshape(num_workers, -1, int(data["H"])).mean((0, 2))
    np.testing.assert_allclose(losses, data["loss"], rtol=0, atol=TOLERANCE[dtype])
