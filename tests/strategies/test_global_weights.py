"""Weights that hooks put into the module themselves, an EMA for example, while validation shows the global ones."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_lopt import LocalSGD
from tests.processes import run_cases
from tests.strategies.support import Classifier, flat, loader, trainer


class Swapped(pl.Callback):
    """An average of this worker's weights, which one hook puts into the module and another takes out again."""

    def __init__(self, module, put_in, take_out):
        self.parameters = list(module.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.stored = []
        setattr(self, put_in, self.put_in)
        setattr(self, take_out, self.take_out)

    def on_train_batch_end(self, *_):
        for average, p in zip(self.average, self.parameters, strict=True):
            average.lerp_(p.detach(), 0.2)

    def put_in(self, *_):
        self.stored = [p.detach().clone() for p in self.parameters]
        for average, p in zip(self.average, self.parameters, strict=True):
            p.data.copy_(average)

    def take_out(self, *_):
        if self.stored:
            for stored, p in zip(self.stored, self.parameters, strict=True):
                p.data.copy_(stored)
        self.stored = []


class Hooked(Classifier):
    """It swaps in the two hooks that only modules have."""

    swapped: Swapped

    def on_validation_model_eval(self):
        super().on_validation_model_eval()
        self.swapped.put_in()

    def on_validation_model_train(self):
        self.swapped.take_out()
        super().on_validation_model_train()


def _fit(rank, put_in, take_out, validations=1.0, devices=2):
    torch.manual_seed(0)
    of_module = put_in == "on_validation_model_eval"
    module = (Hooked if of_module else Classifier)(seed=0)
    swapped = Swapped(module, *(("put", "take") if of_module else (put_in, take_out)))
    if of_module:
        module.swapped = swapped
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, "limit_val_batches": validations}
    run = trainer(LocalSGD(5), devices, callbacks=[swapped], **options)
    try:
        run.fit(module, loader(), loader(8, shuffle=False))
    except MisconfigurationException as error:
        return str(error)
    return flat(module)


@pytest.fixture(scope="module")
def fits():
    cases = {
        "without": ("on_validation_start", "on_validation_end", 0.0),
        "validation": ("on_validation_start", "on_validation_end"),
        "epoch": ("on_validation_epoch_start", "on_validation_epoch_end"),
        "mode": ("on_validation_model_eval", "on_validation_model_train"),
        "into_training": ("on_validation_epoch_start", "on_train_epoch_start"),
    }
    return run_cases(_fit, 2, cases, connect=False)


@pytest.mark.parametrize("name", ["validation", "epoch", "mode"])
def test_what_is_put_in_and_taken_out_within_a_validation_leaves_no_trace(fits, name):
    for weights, expected in zip(fits[name], fits["without"], strict=True):
        assert torch.equal(weights, expected)


def test_what_is_put_in_during_a_validation_and_taken_out_later_is_refused(fits):
    for message in fits["into_training"]:
        assert "During validation" in message
        assert "more was changed by up to" in message
        assert "both outside" in message


def test_a_single_worker_may_put_in_and_take_out_anywhere():
    """Its own weights are the mean, as without a strategy."""
    assert isinstance(_fit(0, "on_validation_epoch_start", "on_train_epoch_start", devices=1), torch.Tensor)
