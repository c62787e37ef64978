"""Optimizers with a mode for training and one for evaluation, as schedule-free ones: hooks may change it anywhere."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_lopt import DiLoCo, LocalSGD
from tests.processes import run_cases
from tests.strategies.support import flat, trainer


class Doubling(torch.optim.Optimizer):
    """SGD; for evaluation it doubles some weights, others on each worker. This is undone without rounding.

    With another factor there is rounding, too.
    """

    def __init__(self, params, factor):
        super().__init__(params, {"lr": 0.1, "train_mode": True, "factor": factor})

    @torch.no_grad()
    def step(self, closure=None):
        assert all(group["train_mode"] for group in self.param_groups)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])
                self.state[p].setdefault("factor", torch.where(p.grad > 0, group["factor"], 1.0))
        return loss

    @torch.no_grad()
    def _change(self, train_mode):
        for group in self.param_groups:
            for p in group["params"] if group["train_mode"] != train_mode else ():
                factor = self.state[p].get("factor", 1.0)
                p.copy_(p / factor if train_mode else p * factor)
            group["train_mode"] = train_mode

    def eval(self):
        self._change(False)

    def train(self):
        self._change(True)


class Regression(pl.LightningModule):
    """A line; two of its hooks, by name, change the mode of its optimizer."""

    def __init__(self, to_eval="", to_train="", factor=2.0):
        super().__init__()
        self.factor = factor
        torch.manual_seed(1)
        self.line = nn.Linear(4, 2)
        self.own, self.seen, self.expected = torch.empty(0), [], []
        for name, change in ((to_eval, self._eval), (to_train, self._train)):
            if name:
                setattr(self, name, change)

    def _eval(self, *_):
        self.optimizers().optimizer.eval()

    def _train(self, *_):
        self.optimizers().train()  # by Lightning's wrapper

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.line(batch[0]), batch[0][:, :2].sin())

    def on_train_batch_end(self, *_):
        self.own = flat(self)

    def validation_step(self, batch, batch_idx):
        self.seen.append(flat(self))
        state = self.optimizers().state
        self.expected.append(self.own * torch.cat([state[p]["factor"].flatten() for p in self.line.parameters()]))

    def configure_optimizers(self):
        return Doubling(self.parameters(), self.factor)


class Unequal(IterableDataset):
    """Five batches for the first worker and three for the second, in each epoch."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        rank = torch.distributed.get_rank()
        yield from self.rows[rank : 20 - 8 * rank : 2]


def _fit(rank, strategy, hooks, unequal=False):
    rows = torch.randn(32, 4, generator=torch.Generator().manual_seed(2))
    data = Unequal(TensorDataset(rows)) if unequal else TensorDataset(rows)
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, "devices": 2}
    if isinstance(strategy, dict):
        options["devices"] = 1
        strategy = LocalSGD(5, **strategy)
    run = trainer(strategy, **options)
    module = Regression(*hooks)
    validation = DataLoader(TensorDataset(rows[:2]), 2)
    run.fit(module, DataLoader(data, 2, shuffle=not unequal), validation)
    return module.own, module.seen, module.expected, flat(module)


NEVER, LAST = ("", ""), ("on_train_end", "")
IN_VALIDATION = ("on_validation_model_eval", "on_validation_model_train")
OF_EPOCHS = ("on_validation_epoch_start", "on_train_epoch_start")
MIXED = ("on_validation_start", "on_validation_epoch_end")


@pytest.fixture(scope="module")
def fits():
    return run_cases(
        _fit,
        2,
        {
            "never": (LocalSGD(5), NEVER),
            "in_validation": (LocalSGD(5), IN_VALIDATION),
            "of_epochs": (LocalSGD(5), OF_EPOCHS),
            "mixed": (LocalSGD(5), MIXED),
            "last": (LocalSGD(5), LAST),
            "rounding": (LocalSGD(5), (*IN_VALIDATION, 3.0)),
            "diloco_never": (DiLoCo(5), NEVER),
            "diloco": (DiLoCo(5), OF_EPOCHS),
            "synced_never": (DiLoCo(4), NEVER),
            "synced": (DiLoCo(4), (*OF_EPOCHS, 3.0)),
            "unequal_never": (LocalSGD(3), NEVER, True),
            "unequal": (LocalSGD(3), OF_EPOCHS, True),
            "unequal_in_validation": (LocalSGD(3), IN_VALIDATION, True),
        },
        connect=False,
    )


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("in_validation", "never"),
        ("of_epochs", "never"),
        ("mixed", "never"),
        ("diloco", "diloco_never"),
        ("synced", "synced_never"),
        ("unequal", "unequal_never"),
        ("unequal_in_validation", "unequal_never"),
    ],
)
def test_training_goes_on_from_the_workers_own_weights(fits, name, without):
    for (own, *_), (expected, *_) in zip(fits[name], fits[without], strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("name", ["in_validation", "of_epochs", "mixed", "diloco"])
def test_validation_sees_the_mean_of_the_weights_for_evaluation(fits, name):
    (_, seen, first, _), (_, also_seen, second, _) = fits[name]
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for a, b, x, y in zip(seen, also_seen, first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, (x + y) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["last", "of_epochs", "rounding", "diloco", "unequal"])
def test_all_workers_end_with_the_same_weights_for_evaluation(fits, name):
    (*_, final), (*_, also_final) = fits[name]
    assert torch.equal(final, also_final)
    if name == "last":
        (own, *_, expected), _ = fits["never"]
        assert torch.equal(own, expected)
        assert 1 < (final / own).max() <= 2


@pytest.mark.parametrize("hooks", [IN_VALIDATION, OF_EPOCHS])
def test_modes_of_all_virtual_workers_change(fits, hooks):
    name = "in_validation" if hooks == IN_VALIDATION else "of_epochs"
    own, seen, _, final = _fit(0, {"virtual_workers": 2}, hooks)
    assert torch.equal(own, fits[name][0][0])
    assert torch.equal(final, fits[name][0][3])
    assert all(torch.equal(a, b) for a, b in zip(seen, fits[name][0][1], strict=True))


def test_an_exception_in_validation_leaves_the_anchor_and_training_mode():
    class Failing(Regression):
        def validation_step(self, batch, batch_idx):
            raise KeyError("validation")

    run = trainer(DiLoCo(5, virtual_workers=2), 1, max_epochs=2, num_sanity_val_steps=0)
    module = Failing(*OF_EPOCHS)
    rows = torch.randn(32, 4, generator=torch.Generator().manual_seed(2))
    with pytest.raises(KeyError):
        run.fit(module, DataLoader(TensorDataset(rows), 2), DataLoader(TensorDataset(rows[:2]), 2))
    rounds = run.strategy.rounds
    assert rounds.round_idx == 1
    for p, anchored in zip(module.parameters(), rounds.sync.replica.parameters(), strict=True):
        assert torch.equal(p, anchored.anchor)
    optimizer = run.optimizers[0]
    assert optimizer.param_groups[0]["train_mode"]
    assert "eval" not in vars(optimizer)
