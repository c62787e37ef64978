"""Putting a checkpoint together: everybody who looks at the module meanwhile sees the global weights."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lopt import LocalSGD, SlowMo
from tests.processes import run_workers
from tests.strategies.support import Classifier, flat, loader, trainer

CASES = {
    "mean": (LocalSGD, {}, False),
    "anchor": (SlowMo, {}, False),
    "weights alone": (LocalSGD, {}, True),
    "virtual": (LocalSGD, {"virtual_workers": 2}, False),
}


class _Exports(Classifier):
    """A module that saves a head of its own, as adapters do, and exports in the hook of a batch."""

    def __init__(self, exporting: bool = True) -> None:
        super().__init__(seed=0)
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.exporting = exporting

    def on_save_checkpoint(self, checkpoint):
        self.pairs.append((checkpoint["state_dict"]["head.weight"].clone(), self.head.weight.detach().clone()))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.exporting and batch_idx == 5:  # in mid-round
            own = flat(self)
            with self.trainer.strategy.global_weights():
                state = self.trainer.strategy.lightning_module_state_dict()["head.weight"]
                self.pairs.append((state.clone(), self.head.weight.detach().clone()))
            assert torch.equal(flat(self), own)


class _Looks(pl.Callback):
    def __init__(self) -> None:
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.pairs.append((checkpoint["state_dict"]["head.weight"].clone(), pl_module.head.weight.detach().clone()))


def _fit(name, folder):
    make, options, weights_only = CASES[name]
    looks, module = _Looks(), _Exports(folder is not None)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1, save_weights_only=weights_only)
    callbacks = [] if folder is None else [looks, saving]
    devices, saves = 1 if "virtual_workers" in options else 2, folder is not None
    run = trainer(make(4, **options), devices, max_epochs=1, callbacks=callbacks, enable_checkpointing=saves)
    run.fit(module, loader(48))
    return module.pairs + looks.pairs, flat(module)


def _all(rank, folder):
    return {name: [_fit(name, f"{folder}/{name}"), _fit(name, None)] for name in CASES if name != "virtual"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    found = run_workers(_all, 2, str(folder), connect=False)[0]
    return {**found, "virtual": [_fit("virtual", str(folder / "virtual")), _fit("virtual", None)]}


@pytest.mark.parametrize("name", CASES)
def test_hooks_of_a_save_see_the_weights_that_are_saved(results, name):
    (pairs, weights), (_, undisturbed) = results[name]
    assert len(pairs) >= 3
    assert all(torch.equal(saved, seen) for saved, seen in pairs)
    assert torch.equal(weights, undisturbed)
