"""How parameters travel, in a real Trainer on real processes."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lopt import LOSCAR, AdaMLP, DiLoCo, Fragments, LearnedLocalSGD, LocalSGD, RoundMonitor, SyncOptions, TopK
from tests.processes import run_workers
from tests.strategies.support import Classifier, cli_trainer, flat, loader, trainer

STRATEGIES = {
    "loscar": partial(LOSCAR, overlap_steps=2, density=0.3),
    "streaming": partial(DiLoCo, selection=Fragments(2), overlap_steps=1, merge=0.5),
    "learned": partial(LearnedLocalSGD, network=AdaMLP(seed=0), overlap_steps=1, compression="int8"),
    "lagg": partial(LearnedLocalSGD, network=AdaMLP(2, seed=0), compression="bf16"),
    "topk": partial(LocalSGD, compression=TopK(0.1), local_state="reset"),
}


def _fit(rank, name, options, folder=None, ckpt=None):
    monitor = RoundMonitor()
    callbacks = [monitor]
    if folder is not None:
        callbacks.append(ModelCheckpoint(dirpath=folder, every_n_train_steps=3, save_top_k=-1, filename="{step}"))
    run = trainer(
        STRATEGIES[name](local_steps=4), callbacks=callbacks, enable_checkpointing=folder is not None, **options
    )
    module = Classifier(seed=rank)
    run.fit(module, loader(shuffle=False), loader(24, shuffle=False), ckpt_path=ckpt)
    return flat(module), [int(row["step"]) for row in monitor.history], module.seen


@pytest.mark.parametrize("name", STRATEGIES)
def test_all_workers_end_with_the_same_model(name):
    results = run_workers(_fit, 2, name, {"max_epochs": 2, "max_steps": 22, "val_check_interval": 3}, connect=False)
    period = 2 if name == "streaming" else 4
    for weights, steps, seen in results:
        assert torch.equal(weights, results[0][0])
        assert steps == [*range(period, 21, period), 22]
        assert all(torch.equal(a, b) for a, b in zip(seen, results[0][2], strict=True))


@pytest.mark.parametrize("name", ["loscar", "streaming"])
def test_validating_and_saving_in_flight_leave_no_trace(name, tmp_path):
    often = run_workers(_fit, 2, name, {"max_epochs": 1, "val_check_interval": 3}, str(tmp_path), connect=False)
    rarely = run_workers(_fit, 2, name, {"max_epochs": 1, "val_check_interval": 12}, connect=False)
    assert torch.equal(often[0][0], rarely[0][0])
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert saved["lightning_lopt"]["rounds"]["sync"]["exchange"] is not None  # launched after 2 or 1 steps
    # what is validated and saved in mid-round is the workers' mean
    assert torch.equal(torch.cat([t.double().flatten() for t in saved["state_dict"].values()]), often[0][2][1])


def test_an_end_in_flight_that_nobody_foresaw():
    """max_time, early stopping: what is in flight is given up, and everything is sent."""
    for weights, steps, _ in (results := run_workers(_stopped, 2, connect=False)):
        assert torch.equal(weights, results[0][0])
        assert steps[-1] == 7


class _Stops(Classifier):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 6:
            self.trainer.should_stop = True


def _stopped(rank):
    monitor = RoundMonitor()
    run = trainer(STRATEGIES["loscar"](local_steps=4), max_epochs=3, min_epochs=0, callbacks=[monitor])
    module = _Stops(seed=0)
    run.fit(module, loader())
    return flat(module), [int(row["step"]) for row in monitor.history], None


class _Fails(Classifier):
    def training_step(self, batch, batch_idx):
        if batch_idx == 3 and self.global_rank == 1:
            raise RuntimeError("this worker fails")
        return super().training_step(batch, batch_idx)


def _interrupted(rank, folder):
    strategy = STRATEGIES["loscar"](local_steps=4, timeout=timedelta(seconds=10))
    run = trainer(strategy, max_epochs=1, callbacks=[OnExceptionCheckpoint(folder)], enable_checkpointing=True)
    with pytest.raises(RuntimeError):
        run.fit(_Fails(seed=0), loader())
    return strategy.rounds.sync.in_flight


def test_an_exception_in_flight(tmp_path):
    assert run_workers(_interrupted, 2, str(tmp_path), connect=False) == [False, False]
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["lightning_lopt"]["rounds"]["sync"]["exchange"] is None


def test_default_evaluation_weights():
    assert LOSCAR()._global_weights.weights == "mean"
    assert DiLoCo(selection=Fragments(2))._global_weights.weights == "mean"
    assert DiLoCo()._global_weights.weights == "anchor"
    assert LOSCAR(eval_weights="anchor")._global_weights.weights == "anchor"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LearnedLocalSGD(density=0.1), "LearnedOptimizer cannot step random coordinates"),
        (lambda: LOSCAR(local_steps=16), "no room for overlap_steps=16"),
        (
            lambda: LocalSGD(outer_optimizer=partial(torch.optim.Adafactor, lr=0.1), density=0.1),
            "Adafactor cannot step",
        ),
        (lambda: LocalSGD(merge="mean"), "merge must be"),
        (lambda: DiLoCo(compression="int3"), "compression must be"),
    ],
)
def test_wrong_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_lightning_cli(tmp_path):
    config = """
            trainer:
              accelerator: cpu
              logger: false
              strategy:
                class_path: lightning_lopt.DiLoCo
                init_args:
                  local_steps: 32
                  selection: {class_path: lightning_lopt.Fragments, init_args: {num_fragments: 4}}
                  compression: {class_path: lightning_lopt.TopK, init_args: {density: 0.05}}
                  overlap_steps: 4
                  merge: 0.5
            """
    strategy = cli_trainer(tmp_path, config).strategy
    options = strategy._options
    assert (options.effective_selection, options.codec) == (Fragments(4), TopK(0.05))
    assert (options.overlap_steps, options.merge) == (4, 0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.3},
        {"selection": Fragments(2)},
        {"compression": "bf16"},
        {"overlap_steps": 3},
        {"merge": 0.5},
        {"local_state": "reset"},
        {"sharded": True},
    ],
    ids=str,
)
def test_keywords_arrive(options):
    assert LocalSGD(**options)._options == SyncOptions(**options) != SyncOptions()


class _Matrix(pl.LightningModule):
    """A matrix that Muon trains."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(4, 3, bias=False)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.line(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Muon(self.parameters(), lr=0.05)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
def test_diloco_with_muon_and_error_feedback_is_muloco():
    """Against the algorithm of arXiv 2505.23725 in full: K = 2, H = 2, half of the coordinates, in the end all."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 4, generator=generator), torch.randn(24, 3, generator=generator)
    module = _Matrix()
    anchor = module.line.weight.detach().clone()
    strategy = DiLoCo(local_steps=2, outer_lr=0.7, momentum=0.9, compression=TopK(0.5), virtual_workers=2)
    run = trainer(strategy, 1, max_epochs=1, use_distributed_sampler=False)  # batches go to the workers in turn
    run.fit(module, DataLoader(TensorDataset(x, y), batch_size=2))

    workers = [_Matrix() for _ in range(2)]
    optimizers = [worker.configure_optimizers() for worker in workers]
    errors, velocity = [torch.zeros(3, 4), torch.zeros(3, 4)], torch.zeros(3, 4)
    for round_idx in range(3):
        sent = []
        for k, (worker, optimizer) in enumerate(zip(workers, optimizers, strict=True)):
            worker.line.weight.data.copy_(anchor)
            for step in range(2 * round_idx, 2 * round_idx + 2):
                rows = slice(4 * step + 2 * k, 4 * step + 2 * k + 2)
                optimizer.zero_grad()
                worker.training_step((x[rows], y[rows]), 0).backward()
                optimizer.step()
            values = anchor - worker.line.weight.detach() + errors[k]
            kept = values.abs() >= values.abs().flatten().topk(6 if round_idx < 2 else 12).values[-1]
            sent.append(values * kept)
            errors[k] = values - sent[k]
        mean = sum(sent) / 2
        velocity = 0.9 * velocity + mean
        anchor -= 0.7 * (mean + 0.9 * velocity)
    torch.testing.assert_close(module.line.weight.detach(), anchor)
