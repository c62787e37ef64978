"""Evaluations: each method by hand on a small task, and through the validation loop of a meta-training."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from lightning_lopt import AdaMLP
from lightning_lopt.functional import updates
from lightning_lopt.meta import Evaluation, ImageMLP, LocalOptimizer, LocalTraining
from tests.meta.test_module import make, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def evaluation(name: str = "small", **keywords) -> Evaluation:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(60, 3, 3, generator=generator), torch.randint(4, (60,), generator=generator)
    task = ImageMLP(images, labels, hidden=(5,), batch_size=6)
    settings = {"local_steps": (1, 3, 9), "local_lr": 0.3, "optimizer": LocalOptimizer("momentum"), **keywords}
    return Evaluation(name, task, LocalTraining(2, **settings), num_rounds=8, num_runs=2)


@pytest.fixture
def diloco(monkeypatch) -> AdaMLP:
    """The base step, undamped, always plain, and with a momentum that stays: Nesterov 0.9, rate 0.7."""
    monkeypatch.setattr(updates, "base_forms", lambda step, *_: torch.cat([step] * 3, 1))
    monkeypatch.setattr(updates, "complement_of_round", lambda complement, *_: complement)
    monkeypatch.setattr(updates, "norm_ratio", lambda state, squared: torch.ones_like(squared))
    monkeypatch.setattr(updates, "damp_model", lambda *args: None)
    return AdaMLP.base_step(lr=0.7, momentum=0.9)


@pytest.mark.parametrize("decay_share", [0.0, 1.0])
def test_a_network_that_is_diloco_gives_its_curve(decay_share, diloco):
    own = evaluation(decay_share=decay_share)
    torch.testing.assert_close(own.losses(diloco), own.baselines["diloco"], rtol=1e-4, atol=1e-5)
    averaging = own.baselines["averaging"]
    assert torch.equal(averaging[0], own.baselines["diloco"][0])
    assert averaging[0, 0] != averaging[0, 1]
    assert (averaging[-1] < averaging[0] - 0.01).all()
    assert not torch.allclose(averaging[1], own.baselines["diloco"][1])


def test_averaging_is_one_worker_with_the_middle_h():
    """Several workers with a rate that falls to 0 stop moving at the end; H = 3 of (1, 3, 9)."""
    own = evaluation(decay_share=1.0)
    assert torch.equal(own.baselines["averaging"], evaluation(local_steps=3, decay_share=1.0).baselines["averaging"])
    moved = own.baselines["averaging"].diff(dim=0).abs()
    assert (moved[-1] < moved[0] / 4).all()


def test_a_diverged_run_counts_as_the_maximum():
    own = evaluation()
    losses = torch.tensor([[1.0, float("nan")], [1.0, float("inf")]])
    assert own.final(losses) == pytest.approx((1 + own.task.max_loss) / 2)
    with pytest.raises(ValueError, match="at least one round"):
        Evaluation("none", own.task, own.training, num_rounds=0)


def test_the_validation_loop_logs_ratios_every_n_meta_iterations(diloco):
    steps = []

    class Look(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            steps.append((trainer.global_step, batch))

    meta = make(network=diloco, lr=0.0, evaluations=[evaluation("a"), evaluation("b", local_lr=0.1)])
    fit = trainer(6, Look(), num_sanity_val_steps=0, val_check_interval=2, check_val_every_n_epoch=None)
    fit.fit(meta)
    assert steps == [(step, index) for step in (2, 4, 6) for index in (0, 1)]
    metrics = {name: value.item() for name, value in fit.callback_metrics.items()}
    assert metrics["a/over_diloco"] == pytest.approx(1, rel=1e-4)
    ratios = [metrics[f"{name}/over_averaging"] for name in ("a", "b")]
    assert ratios[0] != pytest.approx(1, rel=1e-3)
    assert metrics["over_averaging"] == pytest.approx(sum(ratios) / 2)
    own = evaluation("a")
    assert metrics["a/loss"] == pytest.approx(own.final(own.losses(meta.network)))


def test_evaluations_change_no_number_of_the_training():
    plain, watched = make(), make(evaluations=[evaluation()])
    trainer(3).fit(plain)
    trainer(3, val_check_interval=1, check_val_every_n_epoch=None).fit(watched)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


def test_two_evaluations_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"have the name \['a'\]"):
        make(evaluations=[evaluation("a"), evaluation("b"), evaluation("a")])
