"""The statistics of the global weights, and nothing else changed."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_lopt import LOSCAR, BatchNormReestimation, LocalSGD, SlowMo
from tests.processes import run_workers
from tests.strategies.support import Classifier, flat, loader, trainer


class Normed(Classifier):
    """BatchNorm on the inputs: its statistics are known, whatever the weights. Later ones depend on the weights."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(seed=0, dropout=dropout)
        self.inputs = nn.BatchNorm1d(6)
        self.during_training: list[torch.Tensor] = []
        self.at_validation: list[dict[str, torch.Tensor]] = []

    def forward(self, x):
        return super().forward(self.inputs(x))

    def on_train_batch_start(self, batch, batch_idx):
        self.during_training.append(flat(self))

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.at_validation.append({k: v.clone() for k, v in self.state_dict().items()})


def _expected(num_batches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The means over the batches of the inputs' mean and variance; the order of `BatchNormReestimation`."""
    inputs = loader().dataset.tensors[0]
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    batches = inputs[order[torch.arange(4 * num_batches) % len(inputs)]].view(num_batches, 4, 6)
    return batches.mean(1).mean(0), batches.var(1).mean(0)


def _fit(rank, strategy, callbacks, folder, dropout):
    checkpoint = ModelCheckpoint(folder, save_top_k=-1, monitor="val_loss")
    module = Normed(dropout)
    run = trainer(
        strategy,
        callbacks=[*callbacks, checkpoint],
        max_epochs=2,
        val_check_interval=4,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
    )
    torch.manual_seed(rank)
    run.fit(module, loader(), loader(24, shuffle=False))
    saved = torch.load(checkpoint.best_model_path, weights_only=False)["state_dict"]
    return module.during_training, module.at_validation, dict(module.state_dict()), saved


@pytest.mark.parametrize(
    "strategy",
    [LocalSGD(3), LocalSGD(4), SlowMo(3), LOSCAR(4, overlap_steps=1, density=0.5)],
    ids=["mean", "synced", "anchor", "in flight"],
)
def test_validation_end_and_checkpoints_have_the_statistics_of_the_global_weights(strategy, tmp_path):
    mean, variance = _expected(6)
    for _, at_validation, final, saved in run_workers(
        _fit, 2, strategy, [BatchNormReestimation(5)], tmp_path, 0.0, connect=False
    ):
        for state in (*at_validation, final, saved):
            torch.testing.assert_close(state["inputs.running_mean"], mean)
            torch.testing.assert_close(state["inputs.running_var"], variance)
        first = {k: v for k, v in at_validation[0].items() if "running" in k}
        assert not torch.equal(first["body.1.running_mean"], saved["body.1.running_mean"])  # other weights by then


def test_training_is_as_without_it(tmp_path):
    """Dropout would show another random state; the workers' own running statistics are compared too."""
    with_it, without = (
        run_workers(_fit, 2, LocalSGD(3), callbacks, tmp_path / name, 0.2, connect=False)
        for name, callbacks in (("with", [BatchNormReestimation(4)]), ("without", []))
    )
    for ours, theirs in zip(with_it, without, strict=True):
        assert len(ours[0]) == 24
        assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))
        assert not torch.equal(ours[2]["inputs.running_mean"], theirs[2]["inputs.running_mean"])


def test_more_batches_than_data_begin_anew():
    module, callback = Normed(), BatchNormReestimation(30)  # there are 24
    run = trainer(LocalSGD(3), 1, max_steps=3, callbacks=[callback])
    run.fit(module, loader())
    torch.testing.assert_close(module.inputs.running_mean, _expected(30)[0])


def test_low_precision():
    module = Normed()
    run = trainer(LocalSGD(3), 1, max_steps=3, callbacks=[BatchNormReestimation(4)], precision="bf16-true")
    run.fit(module, loader())
    assert module.inputs.running_mean.dtype == torch.bfloat16
    torch.testing.assert_close(module.inputs.running_mean.float(), _expected(4)[0], atol=0.01, rtol=0.02)


def test_momenta_and_modes_are_those_before():
    module = Normed()
    module.inputs.momentum = 0.3
    trainer(LocalSGD(3), 1, max_steps=3, callbacks=[BatchNormReestimation(2)]).fit(module, loader())
    assert (module.inputs.momentum, module.body[1].momentum) == (0.3, 0.1)
    assert module.training


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(*loader().dataset.tensors))


@pytest.mark.parametrize(
    ("strategy", "data", "message"),
    [
        ("auto", loader(), "BatchNormReestimation needs a strategy of lightning_lopt, not SingleDeviceStrategy"),
        (LocalSGD(3), DataLoader(_Stream(), 4), "map-style"),
        (LocalSGD(3), {"a": loader()}, "not dict"),
    ],
)
def test_what_cannot_work_is_said(strategy, data, message):
    class First(Normed):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)

    run = trainer(strategy, 1, max_steps=3, callbacks=[BatchNormReestimation()])
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(First(), data, loader(24, shuffle=False))


class _HalfFrozen(Normed):
    """The inputs' BatchNorm is frozen; a dropout that is in eval mode in training drops all if it is in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen_dropout = nn.Dropout(1.0)
        self.trained_dropout = nn.Dropout(0.0)
        self.modes: list[tuple[bool, ...]] = []

    def forward(self, x):
        self.modes.append(tuple(m.training for m in (self.inputs, self.frozen_dropout, self.trained_dropout)))
        return super().forward(self.trained_dropout(self.frozen_dropout(x)))

    def on_train_epoch_start(self):
        self.inputs.eval()
        self.frozen_dropout.eval()


def test_every_layer_is_in_the_mode_in_which_it_trains():
    module = _HalfFrozen()
    module.inputs.running_mean.fill_(5.0)
    options = {"max_epochs": 1, "val_check_interval": 12, "num_sanity_val_steps": 0}
    run = trainer(LocalSGD(3), 1, callbacks=[BatchNormReestimation(4)], **options)
    run.fit(module, loader(), loader(24, shuffle=False))
    assert len(module.at_validation) == 2 * 6
    assert all((state["inputs.running_mean"] == 5).all() for state in (*module.at_validation, module.state_dict()))
    assert not module.at_validation[0]["body.1.running_mean"].isnan().any()
    during_estimation, validation = module.modes[12:16], module.modes[16:22]
    assert set(during_estimation) == {(False, False, True)}
    assert set(validation) == {(False, False, False)}
    assert set(module.modes[-4:]) == {(False, False, True)}  # at the end of training


class _WithoutNorm(Classifier):
    def __init__(self) -> None:
        super().__init__(seed=0)
        self.body[1] = nn.Identity()


def test_a_model_without_batch_norm_is_left_alone_with_a_warning():
    run = trainer(LocalSGD(3), 1, max_epochs=1, callbacks=[BatchNormReestimation(2)], val_check_interval=12)
    with pytest.warns(UserWarning, match="finds no BatchNorm with running statistics in _WithoutNorm") as caught:
        run.fit(_WithoutNorm(), loader(), loader(24, shuffle=False))
    assert len([w for w in caught if "BatchNorm" in str(w.message)]) == 1


def test_at_least_one_batch():
    with pytest.raises(ValueError, match="at least 1"):
        BatchNormReestimation(0)
