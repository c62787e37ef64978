"""Exports: a run goes on from one with the network, the moments and the schedule of the old one and new particles."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lopt import AdaMLP, WeightsError
from lightning_lopt.meta import Export, Exporting
from tests.meta.test_module import make, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def exported(tmp_path):
    """An export after three of its meta-iterations, and the run."""
    path, meta = tmp_path / "export.safetensors", make(lr=1e-2, warmup_steps=2)
    trainer(3, Exporting(path, every_n_steps=2)).fit(meta)
    return path, meta


def test_it_holds_where_the_run_stands(exported):
    path, meta = exported
    export, state = Export.load(path), meta.trainer.optimizers[0].state
    assert path.stat().st_size < 100_000
    assert export.iterations == 3
    for name, p in meta.network.named_parameters():
        assert torch.equal(export.network.get_parameter(name), p)
        assert torch.equal(export.moments["first"][name], state[p]["exp_avg"])
        assert torch.equal(export.moments["second"][name], state[p]["exp_avg_sq"])
    assert any(bool(t.any()) for t in export.moments["first"].values())


def test_a_run_goes_on_from_it(exported):
    """Without gradients AdamW moves on by its old moments, at the rates of a schedule over both runs."""
    path, old = exported
    rates = []

    class NoGradient(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])
            for p in pl_module.parameters():
                p.grad.zero_()

    start = Export.load(path)
    meta = make(lr=1e-2, warmup_steps=2, start=start)
    before = {name: p.detach().clone() for name, p in meta.network.named_parameters()}
    assert all(torch.equal(p, old.network.get_parameter(name)) for name, p in before.items())
    ours, theirs = meta._estimators[0].particles, make()._estimators[0].particles
    assert not torch.equal(ours.anchor["layers.0.weight"], theirs.anchor["layers.0.weight"])

    trainer(2, NoGradient()).fit(meta)
    # The cosine falls from 1 to 1/3 between the 2nd and the 5th step of all; these are the 4th and the 5th.
    assert rates == pytest.approx([1e-2 * (1 / 3 + 2 / 3 * 0.5 * (1 + c)) for c in (0.5, -0.5)])
    for name, p in meta.network.named_parameters():
        expected = before[name]
        for step, rate in zip((4, 5), rates, strict=True):
            first = start.moments["first"][name] * 0.9 ** (step - 3) / (1 - 0.9**step)
            second = start.moments["second"][name] * 0.999 ** (step - 3) / (1 - 0.999**step)
            expected = expected * (1 - rate * 1e-4) - rate * first / (second.sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-7)


def test_a_stage_of_a_curriculum_has_a_schedule_of_its_own(exported):
    path, old = exported
    rates, seconds = [], []

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])
            seconds.append(optimizer.state[next(pl_module.parameters())]["exp_avg_sq"].clone())

    meta = make(lr=2e-2, final_lr=1e-2, warmup_steps=2, start=Export.load(path), restart_schedule=True)
    trainer(4, Look()).fit(meta)
    assert rates == pytest.approx([1e-2, 2e-2, 2e-2, 1.5e-2])
    assert torch.equal(seconds[0], old.trainer.optimizers[0].state[next(old.parameters())]["exp_avg_sq"])
    assert meta.export().iterations == 3 + 4


def test_exports_come_every_n_steps_and_at_the_end(tmp_path):
    class Look(L.Callback):
        def __init__(self):
            self.found = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.found.append(Export.load(path).iterations if path.exists() else None)

    path, look = tmp_path / "new" / "export.safetensors", Look()
    trainer(5, Exporting(path, every_n_steps=2), look).fit(make())
    assert look.found == [None, 2, 2, 4, 4]
    assert Export.load(path).iterations == 5


def test_a_resumed_run_needs_its_start(exported, tmp_path):
    path, _ = exported
    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="saved")
    trainer(1, saving).fit(make(start=Export.load(path)))
    with pytest.raises(ValueError, match="started at meta-iteration 3, but this one starts at 0"):
        trainer(2).fit(make(), ckpt_path=tmp_path / "saved.ckpt")


def test_nothing_is_overwritten_silently(exported):
    path, meta = exported
    content = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        trainer(1, Exporting(path)).fit(make())
    with pytest.raises(FileExistsError, match="exists already"):
        meta.export().save(path)
    assert path.read_bytes() == content
    trainer(1, Exporting(path, overwrite=True)).fit(make())
    assert Export.load(path).iterations == 1


def test_other_files_and_damage_are_named(exported, tmp_path):
    path, _ = exported
    weights = tmp_path / "weights.safetensors"
    AdaMLP(seed=0).save(weights)
    with pytest.raises(WeightsError, match=r"says format 'lightning_lopt.AdaMLP'.*expected 'lightning_lopt.MetaTr"):
        Export.load(weights)
    with pytest.raises(WeightsError, match=r"says format 'lightning_lopt.MetaTraining'"):
        AdaMLP.load(path)
    with pytest.raises(FileNotFoundError, match="no weights file"):
        Export.load(tmp_path / "nowhere")
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:length])
        with pytest.raises(WeightsError, match="not a readable safetensors file"):
            Export.load(weights)
    weights.write_bytes(content[:-2] + b"\x01" + content[-1:])
    with pytest.raises(WeightsError, match="damaged"):
        Export.load(weights)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"iterations": torch.tensor(-1.0)}, "iterations or second moments"),
        ({"iterations": torch.tensor(1.5)}, "iterations or second moments"),
        ({"iterations": torch.tensor(float("nan"))}, "not finite"),
        ({"second.layers.2.bias": torch.tensor([0.0, -1.0])}, "iterations or second moments"),
        ({"first.layers.2.bias": torch.zeros(3)}, r"first.layers.2.bias: \('F32', 3\), expected \('F32', 2\)"),
    ],
)
def test_wrong_content(exported, change, match):
    path, _ = exported
    tensors = {**load_file(path), **change}
    config = '{"hidden": [32, 32], "inputs": "mean"}'
    save_file(tensors, path, metadata={"format": "lightning_lopt.MetaTraining", "version": "1", "config": config})
    with pytest.raises(WeightsError, match=match):
        Export.load(path)


def test_a_start_of_another_kind_is_refused(exported):
    with pytest.raises(ValueError, match="another kind"):
        make(start=Export.load(exported[0]), network=AdaMLP(hidden=(8, 8)))
    with pytest.raises(ValueError, match="every_n_steps"):
        Exporting("x", every_n_steps=0)
