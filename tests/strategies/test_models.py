"""Odd models, loops and callbacks, one after the other on two processes."""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_lopt import AdaMLP, LearnedLocalSGD, LocalSGD, RoundMonitor, SlowMo
from tests.processes import run_command, run_workers
from tests.strategies.support import Classifier, flat, loader, trainer


class Gan(Classifier):
    """Two optimizers, the second in every other batch, with toggled gradients, by hand."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        if batch_idx % 2 == 0:
            self.toggle_optimizer(second)
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            second.zero_grad()
            self.manual_backward(loss)
            second.step()
            self.untoggle_optimizer(second)
        self.log("train_loss", loss)
        return loss.detach()

    def configure_optimizers(self):
        rest = [self.square.weight, self.head.weight]
        return [torch.optim.AdamW(self.body.parameters(), 0.01), torch.optim.SGD(rest, 0.05, momentum=0.9)]


class Accumulates(Classifier):
    """Accumulates by hand, with torch's own optimizer."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        if batch_idx % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        self.log("train_loss", loss)
        return loss.detach()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


class Lbfgs(Classifier):
    def configure_optimizers(self):
        return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad], lr=0.1, max_iter=3)


class Unused(Classifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.never = nn.Linear(3, 3)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


class Pretrained(Classifier):
    """A frozen backbone that is unfrozen in the second epoch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.backbone = self.body

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)


class Configured(Classifier):
    """Layers that appear in `configure_model`, and a lazy one that a first batch has shaped."""

    def configure_model(self):
        if not hasattr(self, "late"):
            self.late = nn.LazyLinear(3)
            self.late(torch.zeros(1, 3))

    def forward(self, x):
        return self.late(super().forward(x))


class Lazy(Classifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.late = nn.LazyLinear(3)

    def forward(self, x):
        return self.late(super().forward(x))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Skips(Classifier):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


class Overflows(Classifier):
    """Losses that overflow on one worker only: its GradScaler skips steps, the other's does not."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.global_rank == 1 and batch_idx in (1, 5) else loss


class Measured(Classifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def _scaled():
    return [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=16.0))]


CASES = {
    "two optimizers by hand": (Gan, {}, 6),
    "accumulation by hand": (Accumulates, {}, 2),
    "LBFGS": (Lbfgs, {}, 6),
    "parameters without gradient": (Unused, {}, 6),
    "unfreezing": (Pretrained, {"callbacks": lambda: [BackboneFinetuning(1, verbose=False)]}, 6),
    "configure_model": (Configured, {}, 6),
    "accumulation schedule": (Classifier, {"callbacks": lambda: [GradientAccumulationScheduler({0: 1, 1: 3})]}, 4),
    "GradScaler": (Overflows, {"plugins": _scaled}, 6),
    "fast_dev_run": (Classifier, {"fast_dev_run": 3}, 1),
    "overfit_batches": (Classifier, {"overfit_batches": 3}, 2),
    "LearningRateFinder": (Classifier, {"callbacks": lambda: [LearningRateFinder(num_training_steps=6)]}, 6),
    "metrics": (Measured, {}, 6),
    "validation in mid-round": (Measured, {"val_check_interval": 3}, 6),
}


def _fit(rank, make_module, options, strategy):
    options = {name: value() if callable(value) else value for name, value in options.items()}
    monitor = RoundMonitor()
    callbacks = [monitor, *options.pop("callbacks", [])]
    run = trainer(strategy, max_epochs=2, callbacks=callbacks, **options)
    module = make_module(seed=0)
    run.fit(module, loader(96), loader(24, shuffle=False))
    return module, run


def _all(rank, names):
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in names:
                make_module, options, _ = CASES[name]
                options = {**options, "default_root_dir": folder}
                module, run = _fit(rank, make_module, options, LearnedLocalSGD(4, network=AdaMLP(seed=0)))
                start = make_module(seed=0)
                moved = not torch.equal(flat(module)[:48], flat(start)[:48])
                results[name] = flat(module).numpy().tobytes(), run.strategy.rounds.round_idx, moved
        except Exception:
            results[name] = traceback.format_exc()
    return results


@pytest.fixture(scope="module")
def results():
    return run_workers(_all, 2, list(CASES), connect=False, limit=120)


@pytest.mark.parametrize("name", CASES)
def test_odd_models_and_loops(name, results):
    assert name in results[0], "a case before this one failed"
    for result in results:
        assert not isinstance(result[name], str), result[name]
    (weights, rounds, moved), (others, *_) = (result[name] for result in results)
    assert weights == others
    assert rounds == CASES[name][2]
    assert moved


def _refusals(rank):
    said = []
    for module, match in (
        (Skips, "returning None"),
        (Lazy, "Lazy parameters have no shape yet: late.weight, late.bias"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=match) as raised:
            trainer(LocalSGD(4), max_epochs=1).fit(module(seed=0), loader())
        said.append(type(raised.value).__name__)
    return said


def test_what_cannot_work_is_said_on_all_workers():
    assert run_workers(_refusals, 2, connect=False) == [["RuntimeError", "ValueError"]] * 2


def _evaluations(rank, folder):
    """Validate, test and predict after a fit, with metrics over all workers, and loggers."""
    loggers = [CSVLogger(folder, "csv", version=0), TensorBoardLogger(folder, "board", version=0)]
    run = trainer(SlowMo(5), max_epochs=1, callbacks=[RoundMonitor()], log_every_n_steps=1)
    run.loggers = loggers
    module = Measured(seed=0)
    run.fit(module, loader(), loader(24, shuffle=False))
    fitted = run.callback_metrics["accuracy"].item()
    (validated,) = run.validate(module, loader(24, shuffle=False), verbose=False)
    (tested,) = run.test(module, loader(24, shuffle=False), verbose=False)
    predicted = torch.cat(run.predict(module, loader(24, shuffle=False)))
    x, y = (torch.stack(column) for column in zip(*loader(24, shuffle=False).dataset, strict=True))
    with torch.no_grad():
        own = torchmetrics.functional.classification.multiclass_accuracy(module.eval()(x), y, 3).item()
    return fitted, validated["accuracy"], tested["accuracy"], own, len(predicted)


def test_evaluation_and_loggers(tmp_path):
    for fitted, validated, tested, own, rows in run_workers(_evaluations, 2, str(tmp_path), connect=False):
        assert fitted == validated == tested
        assert own == pytest.approx(fitted)
        assert rows == 12
    assert "rounds/drift" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert list((tmp_path / "board" / "version_0").glob("events*"))


def _compiled(rank):
    weights = []
    for compiled in (False, True):
        module = Classifier(seed=0)
        fitted = torch.compile(module, backend="eager") if compiled else module
        trainer(SlowMo(4), max_epochs=1).fit(fitted, loader(48))
        weights.append(flat(module))
    return weights


def test_compiled_modules():
    for plain, compiled in run_workers(_compiled, 2, connect=False):
        assert torch.equal(plain, compiled)


NOTEBOOK = """
import torch

import lightning_lopt  # registers the strategy's name
from tests.strategies.support import Classifier, flat, loader, trainer

module = Classifier(seed=0)
start = flat(module)
trainer("slowmo_fork", max_epochs=1).fit(module, loader(48))
assert not torch.equal(flat(module), start)
"""


def test_launched_in_a_notebook():
    """The way of notebooks: forked from a running interpreter; the weights come back."""
    run_command([sys.executable, "-c", NOTEBOOK], 100, {"GLOO_SOCKET_IFNAME": "lo"}, Path(__file__).parents[2])
