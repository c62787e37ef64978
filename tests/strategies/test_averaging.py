"""Callbacks that average weights over time end with one model, the average of the workers' mean."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning, StochasticWeightAveraging
from torch import nn

from lightning_lopt import LocalSGD, SlowMo
from tests.processes import run_workers
from tests.strategies.checkpoint.test_resume import SaveEverywhere
from tests.strategies.support import Classifier, flat, loader, trainer


class Plain(Classifier):
    """Without BatchNorm."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.body[1] = nn.Identity()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Own(pl.Callback):
    """The worker's own weights after each step, and what validation sees."""

    def __init__(self) -> None:
        self.weights, self.seen = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.weights.append(flat(module))

    def on_train_epoch_start(self, trainer, module):
        self.epoch_start = flat(module)

    def on_validation_batch_start(self, trainer, module, *_):
        self.seen.append(flat(module))


def _averaged(rank, folder, ckpt_path):
    own = Own()
    callbacks = [own, EMAWeightAveraging(decay=0.8), *([SaveEverywhere(folder)] if ckpt_path is None else [])]
    pl.seed_everything(3, verbose=False)
    run = trainer(SlowMo(4), max_epochs=2, num_sanity_val_steps=0, callbacks=callbacks)
    module = Plain(seed=0)
    run.fit(module, loader(48), loader(8, batch_size=8, shuffle=False), ckpt_path=ckpt_path)
    return flat(module), own.weights, own.seen


def test_the_workers_mean_is_averaged(tmp_path):
    results = run_workers(_averaged, 2, str(tmp_path), None, connect=False)
    (final, first, seen), (other, second, also_seen) = results
    assert torch.equal(final, other)
    assert all(torch.equal(a, b) for a, b in zip(seen, also_seen, strict=True))
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert not torch.equal(first[4], second[4])
    average = mean[0]
    for i, weights in enumerate(mean[1:], 1):
        average = 0.8 * average + 0.2 * weights
        if i == 5:
            torch.testing.assert_close(seen[0], average, rtol=0, atol=1e-6)
    torch.testing.assert_close(final, average, rtol=0, atol=1e-6)
    for name in ("03_batch", "06_validation"):
        args = str(tmp_path), str(tmp_path / f"{name}.ckpt")
        for again, *_ in run_workers(_averaged, 2, *args, connect=False):
            torch.testing.assert_close(again, final, rtol=0, atol=1e-7)


def _swa(rank):
    own = Own()
    swa = StochasticWeightAveraging(0.05, swa_epoch_start=1)
    run = trainer(LocalSGD(4), max_epochs=3, callbacks=[own, swa])
    module = Plain(seed=0)
    run.fit(module, loader(48))
    return flat(module), own.weights


def test_swa_without_batchnorm_ends_with_one_model():
    (final, first), (other, second) = run_workers(_swa, 2, connect=False)
    assert torch.equal(final, other)
    start = flat(Plain(seed=0))
    mean = [start, *((a + b) / 2 for a, b in zip(first, second, strict=True))]
    torch.testing.assert_close(final, (mean[0] + mean[6] + mean[12]) / 3, rtol=0, atol=1e-6)


def _swa_with_batchnorm(rank):
    with pytest.raises(MisconfigurationException, match="other BatchNorm statistics"):
        trainer(LocalSGD(4), max_epochs=2, callbacks=[StochasticWeightAveraging(0.05)]).fit(Classifier(), loader())


def test_swa_with_batchnorm_is_refused():
    run_workers(_swa_with_batchnorm, 2, connect=False)


@pytest.mark.parametrize("make", [EMAWeightAveraging, lambda: StochasticWeightAveraging(0.05)])
def test_averages_of_virtual_workers_are_refused(make):
    with pytest.raises(MisconfigurationException, match="first of the virtual_workers"):
        trainer(LocalSGD(4, virtual_workers=2), 1, max_epochs=2, callbacks=[make()]).fit(Plain(), loader())


def test_pruning_is_refused():
    with pytest.raises(MisconfigurationException, match="the masks would differ"):
        trainer(LocalSGD(4, virtual_workers=2), 1, callbacks=[ModelPruning("l1_unstructured")]).fit(Plain(), loader())
