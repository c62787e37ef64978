"""ControllerTraining: the sweeps of the record's script, runs that go on bitwise, and controllers that get better."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lopt import ControlledNesterov, Controller
from lightning_lopt.functional import blended
from lightning_lopt.functional.control import INPUTS
from lightning_lopt.meta import (
    ControllerTraining,
    Evaluation,
    Horizons,
    ImageMLP,
    LocalOptimizer,
    LocalTraining,
    controller_training,
    local,
)
from lightning_lopt.meta.controller_training import RowAdam
from lightning_lopt.meta.outer import controlled_step
from tests.meta.test_module import trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SHORT = Horizons(num_rounds=(4, 6), step_factors=(1,), num_workers=())


def tasks(count: int = 2):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(100, 6, 6, generator=generator), torch.randint(4, (100,), generator=generator)
    adamw = LocalTraining(4, 1, (1e-3, 1e-2), 0.5, LocalOptimizer("adamw"), (0.5, 2.0))
    return [
        (ImageMLP(images, labels, hidden=(8,), batch_size=8), LocalTraining(2, 2, (0.05, 1.0), 0.5)),
        (ImageMLP(images, labels, hidden=(4, 4), batch_size=8), adamw),
    ][:count]


def make(controller: Controller | None = None, count: int = 2, **keywords) -> ControllerTraining:
    return ControllerTraining(tasks(count), controller, **{"horizons": SHORT, "num_pairs": 3, **keywords})


def test_the_first_sweep_is_that_of_the_records_script(monkeypatch):
    """Its inputs and slopes, of the random numbers of its seeds, with the roots and the momenta of its time."""
    monkeypatch.setattr(local, "momentum_of_adam", lambda beta: 0.0)
    monkeypatch.setattr(blended, "base_forms", partial(blended.base_forms, roots=blended.FORMER_ROOTS))
    seeds = {(0, "inputs"): 99, (0, "inputs", 0): 1000, (0, "inputs", 1): 1001, (0, 0): 10_000}
    seeds |= {(0, 0, 0): 7_000_000, (0, 0, 1): 7_000_001}
    monkeypatch.setattr(controller_training, "seeded", lambda *key: torch.Generator().manual_seed(seeds[key]))
    script = json.loads((Path(__file__).parents[1] / "fixtures/controller_sweep.json").read_text())
    meta = make(horizons=Horizons())
    meta.mean, meta.std = meta.measure_inputs()
    torch.testing.assert_close(meta.mean, torch.tensor(script["mean"]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(meta.std, torch.tensor(script["std"]), rtol=1e-4, atol=1e-4)
    result = meta.sweep(0)
    torch.testing.assert_close(meta.rms, torch.tensor(script["rms"]), rtol=1e-2, atol=0)
    slopes = torch.tensor(script["slopes"])
    torch.testing.assert_close(result.slopes, slopes, rtol=0, atol=1e-2 * slopes.abs().max().item())
    assert result.explained == pytest.approx(script["explained"], abs=1e-2)


class Kill(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            raise KeyError("killed")


def test_a_killed_run_goes_on_bitwise(tmp_path):
    def fit(name: str, *callbacks: L.Callback, **keywords) -> ControllerTraining:
        meta = make(num_averaged=3)
        saving = ModelCheckpoint(tmp_path / name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer(5, saving, *callbacks).fit(meta, **keywords)
        return meta

    whole = fit("whole")
    with pytest.raises(KeyError, match="killed"):
        fit("killed", Kill())
    for step in (2, 3):  # before and after that round of the mean was written first
        resumed = fit(f"resumed {step}", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt")
        theirs = whole.state_dict()
        assert all(torch.equal(ours, theirs[name]) for name, ours in resumed.state_dict().items())
        assert torch.equal(resumed.controller.weight, whole.controller.weight)
    assert int(whole.sweeps) == 5
    assert not torch.equal(whole.std, make().std)  # the inputs were measured


def test_a_checkpoint_of_a_run_with_other_settings_is_refused(tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="saved")
    trainer(1, saving).fit(make(Controller.bundled()))
    others = {"seed": 1, "sigma": 0.1, "num_pairs": 2, "constants": True, "horizons": Horizons()}
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"a run with {name}=.*; or go on from its controller"):
            trainer(2).fit(make(Controller.bundled(), **{name: value}), ckpt_path=tmp_path / "saved.ckpt")


def test_it_starts_at_a_controller_and_averages_the_last_sweeps(tmp_path):
    bundled, weights = Controller.bundled(), []
    meta = make(bundled, num_averaged=2)
    for name, tensor in meta.controller.state_dict().items():
        torch.testing.assert_close(tensor, bundled.state_dict()[name], rtol=1e-4, atol=1e-4)

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            weights.append(pl_module.weight.detach().clone())

    trainer(3, Look()).fit(meta)
    mean = (weights[1] + weights[2]) / 2
    torch.testing.assert_close(meta.controller.weight, mean[:, :-1] / meta.std)
    torch.testing.assert_close(meta.controller.low, bundled.low, rtol=1e-4, atol=1e-4)
    meta.controller.save(tmp_path / "own.safetensors")
    outer = ControlledNesterov([torch.zeros(2)], controller=tmp_path / "own.safetensors")
    assert torch.equal(outer.controller.weight, meta.controller.weight)


def test_constants_leave_all_other_weights():
    meta = make(Controller.bundled(), constants=True)
    before = meta.weight.detach().clone()
    trainer(2).fit(meta)
    assert torch.equal(meta.weight[:, :-1], before[:, :-1])
    assert (meta.weight[:, -1] != before[:, -1]).all()


def test_constants_find_the_rate_that_a_task_wants():
    """The start steps a third as far as the base step, where even that is too slow; evaluated on other runs."""
    images = torch.rand(100, 6, 6, generator=torch.Generator().manual_seed(0))
    task = ImageMLP(images, images[:, 0, :4].argmax(1), hidden=(8,), batch_size=8)
    training, slow = LocalTraining(2, 2, 0.03), Controller()
    with torch.no_grad():
        slow.bias[0] = -1.5
    evaluation = Evaluation("own", task, training, num_rounds=10, seed=1)
    before = evaluation.finals(evaluation.losses_with(lambda anchor: controlled_step(anchor, slow.weights())))
    before = (before / evaluation.finals(evaluation.base_step)).log().mean().item()
    horizons = Horizons(num_rounds=(10,), step_factors=(1,), num_workers=())
    meta = ControllerTraining(
        [(task, training)],
        slow,
        horizons=horizons,
        constants=True,
        num_pairs=8,
        lr=0.15,
        num_averaged=1,
        evaluations=[evaluation],
    )
    fit = trainer(6, val_check_interval=6, check_val_every_n_epoch=None, num_sanity_val_steps=0)
    fit.fit(meta)
    assert before > 0.01
    assert float(fit.callback_metrics["own/log_over_base_step"]) < -0.05


def test_row_adam_is_adam_where_a_row_has_one_number():
    ours, theirs = (nn.Parameter(torch.tensor([[1.0], [-2.0]])) for _ in range(2))
    optimizers = RowAdam([ours], lr=0.1, betas=(0.8, 0.95)), torch.optim.Adam([theirs], lr=0.1, betas=(0.8, 0.95))
    for step in range(5):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = torch.tensor([[3.0], [step - 2.0]])
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_all_inputs_have_their_ends():
    assert len(controller_training.ENDS) == len(INPUTS)
    assert set(controller_training.NARROW) < set(INPUTS)


def test_arguments_out_of_their_range_are_named():
    for name in ("num_pairs", "num_averaged"):
        with pytest.raises(ValueError, match="num_pairs and num_averaged must be at least 1"):
            make(**{name: 0})
    for name in ("sigma", "lr"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            make(**{name: float("nan")})
    with pytest.raises(ValueError, match="at least one task"):
        ControllerTraining([])
    twice = [Evaluation("same", *pair) for pair in tasks()]
    with pytest.raises(ValueError, match=r"the name \['same'\]"):
        make(evaluations=twice)
    with pytest.raises(ValueError, match="max_steps"):
        trainer(-1, max_epochs=1).fit(make())
