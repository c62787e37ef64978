"""Checkpoints: a run that was stopped anywhere goes on bitwise as if it had not been."""

from __future__ import annotations

import multiprocessing
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, WeightedRandomSampler

from lightning_lopt import QSR, AdaMLP, DiLoCo, LearnedLocalSGD, LocalSGD, SlowMo
from tests.processes import run_workers
from tests.strategies_support import Classifier, flat, loader, trainer


class Trace(pl.Callback):
    """What every step did on this worker."""

    def __init__(self) -> None:
        self.steps: dict[int, tuple[float, float, int]] = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        rounds = trainer.strategy.rounds
        key = trainer.fit_loop.epoch_loop.total_batch_idx
        self.steps[key] = (outputs["loss"].item(), module.trainer.callback_metrics["train_loss"], rounds.round_idx)


class SaveEverywhere(pl.Callback):
    """Save wherever users do, in the middle of accumulating gradients too."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def _save(self, trainer, where):
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        trainer.save_checkpoint(self.folder / f"{batches:02d}_{where}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        self._save(trainer, "batch")

    def on_validation_end(self, trainer, *_):
        if not trainer.sanity_checking:
            self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self._save(trainer, "epoch")


class CountingLoader:
    """A loader with a state of its own, which differs between workers."""

    def __init__(self, batches: int = 6) -> None:
        self.batches, self.done, self.epoch = batches, 0, 0

    def __len__(self):
        return self.batches

    def __iter__(self):
        rank = torch.distributed.get_rank()
        if self.done == self.batches:
            self.done, self.epoch = 0, self.epoch + 1
        while self.done < self.batches:
            seed = torch.Generator().manual_seed(1000 * rank + 100 * self.epoch + self.done)
            x = torch.randn(4, 6, generator=seed)
            self.done += 1
            yield x, x[:, :3].argmax(1)

    def state_dict(self):
        return {"done": self.done, "epoch": self.epoch, "rank": torch.distributed.get_rank()}

    def load_state_dict(self, state):
        assert state.pop("rank") == torch.distributed.get_rank()
        self.done, self.epoch = state["done"], state["epoch"]


class TwoLoaders(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch["long"], batch_idx) + super().training_step(batch["short"], batch_idx)
        return loss


def _from_every_step(rank, make, options, data, folder):
    """Train to the end, saving at every step; then again from each of the checkpoints."""
    devices = options.pop("devices", 2)
    multiprocessing.current_process()._config["daemon"] = False  # loaders may start processes
    everywhere = options.pop("everywhere", False)
    make_module = options.pop("module", Classifier)
    options = {"max_epochs": 2, "enable_checkpointing": True, **options}

    def run(ckpt_path, callbacks):
        pl.seed_everything(3, verbose=False)
        trace = Trace()
        run = trainer(make(), devices, callbacks=[trace, *callbacks], **options)
        module = make_module(seed=0, dropout=0.3)
        run.fit(module, data(), loader(24, shuffle=False), ckpt_path=ckpt_path)
        return flat(module), trace.steps, run.strategy.rounds.round_idx, run.global_step

    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    saving = SaveEverywhere(folder) if everywhere else saving
    weights, steps, *counts = run(None, [saving])
    failed = []
    paths = sorted(Path(folder).glob("*.ckpt"))
    for path in paths:
        again, again_steps, *again_counts = run(str(path), [])
        same_steps = all(steps[i] == value for i, value in again_steps.items())
        if not (torch.equal(weights, again) and same_steps and counts == again_counts):
            failed.append((path.stem, torch.equal(weights, again), same_steps, counts == again_counts))
    return failed, len(paths), len(steps)


def _loader_processes():
    return DataLoader(loader(48).dataset, batch_size=4, shuffle=True, num_workers=1)


def _two_loaders():
    return {"long": loader(56), "short": loader(24)}


def _weighted():
    data = loader(48).dataset
    return DataLoader(data, batch_size=4, sampler=WeightedRandomSampler(torch.linspace(1, 2, 48), 48))


def _own_generator():
    return DataLoader(loader(48).dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(5))


short = partial(loader, 48)  # 6 batches per epoch on 2 workers
EVERY_STEP = {
    "average": (partial(LocalSGD, 4), {}, short),
    "momentum": (partial(SlowMo, 4), {"val_check_interval": 3}, short),
    "nesterov": (partial(DiLoCo, 4), {"max_steps": 11, "max_epochs": -1}, short),
    "learned": (partial(LearnedLocalSGD, 3, network=AdaMLP(seed=0)), {}, short),
    "schedule": (partial(LocalSGD, QSR(alpha=0.142, base_steps=1)), {}, short),
    "accumulate": (partial(SlowMo, 2), {"accumulate_grad_batches": 2, "max_epochs": 3}, partial(loader, 56)),
    "everywhere": (partial(SlowMo, 4), {"val_check_interval": 2, "everywhere": True}, short),
    "mid-accumulation": (partial(SlowMo, 2), {"accumulate_grad_batches": 3, "everywhere": True}, partial(loader, 56)),
    "two loaders": (partial(SlowMo, 4), {"module": TwoLoaders}, _two_loaders),
    "stateful loader": (partial(SlowMo, 4), {}, CountingLoader),
    "limited": (partial(SlowMo, 4), {"limit_train_batches": 5}, short),
    "loader processes": (partial(SlowMo, 4), {}, _loader_processes),
    "own sampler": (partial(SlowMo, 4), {"use_distributed_sampler": False, "limit_train_batches": 6}, _weighted),
    "own generator": (partial(SlowMo, 4), {"use_distributed_sampler": False, "limit_train_batches": 6}, _own_generator),
    "one worker": (partial(SlowMo, 4), {"devices": 1}, partial(loader, 24)),
}


@pytest.mark.parametrize("name", EVERY_STEP)
def test_resume_is_bitwise_from_every_step(name, tmp_path):
    make, options, data = EVERY_STEP[name]
    devices = options.get("devices", 2)
    for failed, checkpoints, batches in run_workers(
        _from_every_step, devices, make, dict(options), data, str(tmp_path), connect=False
    ):
        assert not failed
        assert checkpoints > 5
        assert batches > 8
