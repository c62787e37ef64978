"""Virtual workers: K of them in one process do what K processes do."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_lopt import (
    LOSCAR,
    AdaMLP,
    BatchNormReestimation,
    DiLoCo,
    Fragments,
    LearnedLocalSGD,
    LocalSGD,
    RoundMonitor,
    SlowMo,
    TopK,
)
from tests.processes import run_workers
from tests.strategies.checkpoint.test_resume import SaveEverywhere
from tests.strategies.support import Classifier, flat, loader, trainer
from tests.strategies.test_models import Gan
from tests.sync_support import WhileDriftIsSmall


class Double(Classifier):
    """In float64, with a schedule, and a hook that changes weights after each batch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.register_buffer("slow", torch.zeros(8, 8))
        self.to(torch.float64)

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].to(self.square.weight.dtype), batch[1]), batch_idx)

    def validation_step(self, batch, batch_idx):
        pass

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.slow.lerp_(self.square.weight.detach(), 0.1 + outputs["loss"].item() * batch[0][0, 0].item() / 100)


class AccumulatesByHand(Classifier):
    """With a schedule that is moved by hand, too."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        if batch_idx % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
        self.lr_schedulers().step()
        return loss.detach()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


METHODS = {
    "average": partial(LocalSGD, 4),
    "learned": partial(LearnedLocalSGD, 3, network=AdaMLP(seed=0)),
    "LAgg-A": partial(LearnedLocalSGD, 4, network=AdaMLP(inputs=2, seed=0)),
    "coordinates in flight": partial(LOSCAR, 4, overlap_steps=2, density=0.3),
    "compressed, averaged states": partial(SlowMo, 3, compression=TopK(0.2), local_state="average"),
    "int8 in flight": partial(LocalSGD, 4, compression="int8", overlap_steps=1),
    "fragments, reset": partial(DiLoCo, 4, selection=Fragments(2), local_state="reset"),
    "sharded": partial(LearnedLocalSGD, 4, network=AdaMLP(seed=0), sharded=True),
}


class _Bytes(pl.Callback):
    """Bytes of each sync, without those by which processes agree on what comes next."""

    def on_train_start(self, trainer, module):
        self.sent = []
        trainer.strategy.rounds.listeners.append(lambda report: self.sent.append(report.bytes_sent))


def _fit(rank, make, make_module, devices, rows):
    pl.seed_everything(3, verbose=False)
    monitor, count = RoundMonitor(), _Bytes()
    module = make_module(seed=0)
    run = trainer(make(), devices, max_epochs=3, callbacks=[monitor, count])
    run.fit(module, loader(rows), loader(24, shuffle=False))
    drifts = [(row["step"], row["rounds/drift"]) for row in monitor.history]
    steps = [(*row, sent) for row, sent in zip(drifts, count.sent, strict=True)]
    return flat(module), run.global_step, steps, run.optimizers[0].param_groups[0]["lr"]


def _both(make, make_module, num_workers, rows):
    real, *_ = run_workers(_fit, num_workers, make, make_module, num_workers, rows, connect=False)
    virtual, *_ = run_workers(_fit, 1, partial(make, virtual_workers=num_workers), make_module, 1, rows, connect=False)
    return real, virtual


CASES = [*((name, Classifier) for name in METHODS), *(("learned", m) for m in (Double, Gan, AccumulatesByHand))]


@pytest.mark.parametrize(("name", "make_module"), CASES)
def test_two_virtual_workers_are_bitwise_two_processes(name, make_module):
    real, virtual = _both(METHODS[name], make_module, 2, 54)
    assert torch.equal(real[0], virtual[0])
    assert real[1:] == virtual[1:]


@pytest.mark.parametrize("name", ["average", "learned", "sharded"])
def test_four_virtual_workers_are_four_processes(name):
    """Up to the order in which an all-reduce adds, 1e-16, which Adam makes more of where gradients are 0."""
    real, virtual = _both(METHODS[name], Double, 4, 108)
    torch.testing.assert_close(virtual[0], real[0], rtol=0, atol=1e-6)
    assert [step for step, *_ in virtual[2]] == [step for step, *_ in real[2]]


def _saved(rank, make, make_module, devices, folder, ckpt_path=None, dropout=0.0):
    pl.seed_everything(3, verbose=False)
    callbacks = [SaveEverywhere(folder)] if ckpt_path is None else []
    module = make_module(seed=0, dropout=dropout)
    run = trainer(make(), devices, max_epochs=2, callbacks=callbacks)
    run.fit(module, loader(48), loader(24, shuffle=False), ckpt_path=ckpt_path)
    return flat(module), run.global_step, run.strategy.rounds.round_idx


def _resumed_from_all(rank, make, make_module, folder):
    whole = _saved(rank, make, make_module, 1, folder, None, 0.3)
    paths = sorted(Path(folder).glob("*.ckpt"))
    return [whole, *(_saved(rank, make, make_module, 1, folder, str(path), 0.3) for path in paths)]


RESUMED = {
    "momentum": (partial(SlowMo, 4), Classifier),
    "by hand": (partial(SlowMo, 2), AccumulatesByHand),
    "in flight": (partial(LOSCAR, 4, overlap_steps=2, density=0.3), Classifier),
    "learned": (partial(LearnedLocalSGD, 3, network=AdaMLP(seed=0), compression=TopK(0.2)), Classifier),
    "sharded": (partial(LearnedLocalSGD, 3, network=AdaMLP(seed=0), sharded=True), Classifier),
    "schedule that listens": (lambda **options: LocalSGD(WhileDriftIsSmall(0.6, 1), **options), Classifier),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bitwise_from_every_step(name, tmp_path):
    make, make_module = RESUMED[name]
    args = partial(make, virtual_workers=2), make_module, str(tmp_path)
    ((whole, *again),) = run_workers(_resumed_from_all, 1, *args, connect=False)
    assert len(again) > 10
    for weights, *counts in again:
        assert torch.equal(weights, whole[0])
        assert tuple(counts) == whole[1:]


@pytest.mark.parametrize("first", ["virtual", "processes"])
def test_virtual_workers_and_processes_resume_each_other(first, tmp_path):
    ways = {"virtual": (1, partial(SlowMo, 4, virtual_workers=2)), "processes": (2, partial(SlowMo, 4))}
    (num, make), (num_then, make_then) = ways.pop(first), *ways.values()
    whole, *_ = run_workers(_saved, num, make, Classifier, num, str(tmp_path), connect=False)
    args = make_then, Classifier, num_then, str(tmp_path), str(tmp_path / "03_batch.ckpt")
    again, *_ = run_workers(_saved, num_then, *args, connect=False)
    assert torch.equal(whole[0], again[0])
    assert whole[1:] == again[1:]


def test_workers_of_unequal_steps_are_not_resumed(tmp_path):
    make = partial(SlowMo, 4, virtual_workers=2)
    run_workers(_saved, 1, make, Classifier, 1, str(tmp_path), connect=False)
    path = tmp_path / "03_batch.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["lightning_lopt"]["parts"][1]["local"]["step_idx"] -= 1
    torch.save(checkpoint, path)
    run = trainer(make(), 1, max_epochs=2)
    with pytest.raises(ValueError, match="between 2 and 3 steps"):
        run.fit(Classifier(seed=0), loader(48), ckpt_path=str(path))


def _scaled(rank, devices, make):
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3))
    module = Classifier(seed=0)
    run = trainer(make(), devices, max_epochs=2, plugins=[plugin])
    run.fit(module, loader(48))
    return flat(module), run.precision_plugin.state_dict()


def test_every_worker_has_a_scaler():
    real, *_ = run_workers(_scaled, 2, 2, partial(LocalSGD, 4), connect=False)
    virtual, *_ = run_workers(_scaled, 1, 1, partial(LocalSGD, 4, virtual_workers=2), connect=False)
    assert torch.equal(real[0], virtual[0])
    assert real[1] == virtual[1]


class _Numbers(torch.utils.data.IterableDataset):
    def __iter__(self):
        for i in range(26):
            yield torch.full((6,), float(i)), i % 3


class _Sees(Classifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.batches = []

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 100, batch[1]

    def training_step(self, batch, batch_idx):
        self.batches.append((batch_idx, batch[0][:, 0].tolist()))
        return super().training_step(batch, batch_idx)


def test_batches_of_other_loaders_are_dealt_in_turn():
    module = _Sees(seed=0)
    run = trainer(LocalSGD(2, virtual_workers=3), 1, max_epochs=1)
    run.fit(module, DataLoader(_Numbers(), batch_size=4))
    first = [(idx, batch[0] - 100) for idx, batch in module.batches]  # the last batch, of three, is dropped
    assert first == [(0, 4.0), (0, 8.0), (0, 0.0), (1, 16.0), (1, 20.0), (1, 12.0)]
    assert run.global_step == 2
    assert run.strategy.rounds.round_idx == 1


class _TakesIterator(Classifier):
    def training_step(self, dataloader_iter):
        raise AssertionError


@pytest.mark.parametrize(
    ("options", "module", "error", "match"),
    [
        ({"accumulate_grad_batches": 2}, Classifier, ValueError, "take a step with every batch"),
        ({"callbacks": [BatchNormReestimation()]}, Classifier, MisconfigurationException, "leave it out"),
        ({"sync_batchnorm": True}, Classifier, ValueError, "SyncBatchNorm needs real processes"),
        ({}, _TakesIterator, ValueError, "dataloader_iter"),
    ],
)
def test_what_has_no_turns_is_refused(options, module, error, match, monkeypatch):
    run = trainer(
        LocalSGD(4, virtual_workers=2, process_group_backend="gloo"), **{"devices": 1, "max_epochs": 1, **options}
    )
    with pytest.raises(error, match=match):
        run.fit(module(seed=0), loader())


@pytest.mark.parametrize("processes", [{"devices": 2}, {"devices": 1, "num_nodes": 2}])
def test_several_processes_are_refused_before_any_is_started(processes):
    with pytest.raises(MisconfigurationException, match="live in one process, and this Trainer has 2"):
        trainer(LocalSGD(4, virtual_workers=2), **processes)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"virtual_workers": 0}, "integer >= 1"),
        ({"virtual_workers": 2, "ranks_per_worker": 2}, "one of the two"),
        ({"virtual_workers": 2, "worker_speeds": [2, 1]}, "none is faster"),
    ],
)
def test_wrong_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        LocalSGD(4, **options)
