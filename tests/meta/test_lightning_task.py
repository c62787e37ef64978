"""Tasks made of LightningModules: their training steps unchanged, and the optimizer of the workers."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from lightning_lopt.meta import LightningTask, LocalOptimizer, LocalTraining, ModuleTask
from lightning_lopt.meta.lightning_task import simulated

IMAGES, LABELS = torch.rand(40, 6, generator=torch.Generator().manual_seed(3)), torch.arange(40) % 4


class Classifier(L.LightningModule):
    """With a metric, logs, and whatever optimizers it is given."""

    def __init__(self, configured=None, dropout: float = 0.0, item: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Dropout(dropout), nn.Linear(7, 4))
        self.configured = configured
        self.item = item
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss, prog_bar=True)
        self.log_dict({"index": batch_idx})
        if self.item:
            self.seen.append(loss.item())  # torch.vmap has no rule for it
        return {"loss": loss}

    def configure_optimizers(self):
        return self.configured(self)


def twins(**keywords) -> tuple[ModuleTask, LightningTask]:
    def make():
        return Classifier().net

    data = TensorDataset(IMAGES, LABELS)
    plain = ModuleTask(make, data, F.cross_entropy, batch_size=8)
    return plain, LightningTask(lambda: Classifier(**keywords), data, batch_size=8)


@pytest.mark.parametrize("item", [False, True])
def test_equals_the_task_of_its_network_and_loss(item):
    plain, own = twins(item=item, dropout=0.5)
    assert own._together != item
    assert own.max_loss == pytest.approx(plain.max_loss)
    params = plain.init(3, torch.Generator().manual_seed(0))
    theirs = own.init(3, torch.Generator().manual_seed(0))
    assert all(torch.equal(p, theirs[f"module.net.{name}"]) for name, p in params.items())
    drawn = plain.draw(3, torch.Generator().manual_seed(1))
    batch = plain.read(drawn)
    loss, grads = plain.loss_and_grad(params, batch)
    found, of_own = own.loss_and_grad(theirs, own.read(drawn))
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(own.loss(theirs, own.read(drawn)), loss)
    for name, grad in grads.items():
        torch.testing.assert_close(of_own[f"module.net.{name}"], grad)
        assert not of_own[f"module.net.{name}"].requires_grad


def test_what_it_logs_is_dropped_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twins()


class Attention(L.LightningModule):
    """Tokens of one byte in a batch that is a dictionary, attention, a frozen part, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def training_step(self, batch):
        assert batch["tokens"].max() > 1  # not divided by 255
        x = self.frozen(self.embed(batch["tokens"][:, :-1].long())).unsqueeze(1)
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True).squeeze(1)
        return F.cross_entropy(self.head(x).flatten(0, 1), batch["tokens"][:, 1:].flatten().long())


class Sentences(Dataset):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int):
        return {"tokens": torch.arange(index, index + 6).remainder(8).to(torch.uint8)}


@pytest.mark.filterwarnings("ignore:.*assert.*")
def test_batches_are_nested_as_those_of_a_data_loader_and_frozen_parameters_stay():
    task = LightningTask(Attention, Sentences(), batch_size=5)
    params = task.init(2, torch.Generator().manual_seed(0))
    assert {name: tuple(p.shape) for name, p in params.items()} == {"module.embed.weight": (2, 8, 4)}
    assert repr(task) == "LightningTask(Attention, 30 examples, 32 parameters, batch_size=5)"
    before = params["module.embed.weight"].clone()
    task.sgd_step(params, task.batch(2, torch.Generator().manual_seed(0)), torch.ones(2))
    assert (params["module.embed.weight"] != before).any()


def configured(optimizer: type[torch.optim.Optimizer], **settings):
    return lambda module: optimizer(module.parameters(), **settings)


def with_scheduler(module: L.LightningModule):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.4)
    steps = module.trainer.estimated_stepping_batches
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


@pytest.mark.parametrize(
    ("configure", "optimizer", "local_lr", "decay_share"),
    [
        (configured(torch.optim.SGD, lr=0.3), LocalOptimizer(), 0.3, 0.0),
        (configured(torch.optim.SGD, lr=0.3, momentum=0.9), LocalOptimizer("momentum"), 0.3, 0.0),
        (configured(torch.optim.AdamW, lr=0.01), LocalOptimizer("adamw", 0.01), 0.01, 0.0),
        (configured(torch.optim.Adam, lr=0.01), LocalOptimizer("adamw"), 0.01, 0.0),
        (with_scheduler, LocalOptimizer(), 0.4, 1.0),
        (lambda module: [[configured(torch.optim.SGD, lr=0.3)(module)], []], LocalOptimizer(), 0.3, 0.0),
    ],
)
def test_the_optimizer_of_the_workers_is_the_modules(configure, optimizer, local_lr, decay_share):
    _, task = twins(configured=configure)
    expected = LocalTraining(3, 5, local_lr, decay_share, optimizer)
    assert task.local_training(num_workers=3, local_steps=5) == expected


@pytest.mark.parametrize(
    "configure",
    [
        configured(torch.optim.RMSprop, lr=0.1),
        configured(torch.optim.SGD, lr=0.1, momentum=0.5),
        configured(torch.optim.Adam, lr=0.1, weight_decay=0.1),
        configured(torch.optim.AdamW, lr=0.1, betas=(0.9, 0.95)),
        lambda module: torch.optim.SGD([{"params": [p], "lr": 0.1 * i} for i, p in enumerate(module.parameters())]),
        lambda module: [configured(torch.optim.SGD, lr=0.1)(module)] * 2,
        lambda module: None,
    ],
)
def test_other_optimizers_are_refused_with_what_to_pass(configure):
    _, task = twins(configured=configure)
    with pytest.raises(ValueError, match=r"Simulated|simulated.*LocalTraining\(.*optimizer=LocalOptimizer\('"):
        task.local_training()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
def test_muon_at_the_rates_of_adamw():
    p = torch.zeros(2, 2)
    muon = torch.optim.Muon([p], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    assert simulated(muon) == (LocalOptimizer("muon"), 0.02)
    with pytest.raises(ValueError, match="Muon at AdamW's rates"):
        simulated(torch.optim.Muon([p], lr=0.02))


def test_what_cannot_work_is_named():
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    class Nothing(Classifier):
        def training_step(self, batch, batch_idx):
            return None

    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            raise KeyError("mine")

    data = TensorDataset(IMAGES, LABELS)
    for make, error, message in (
        (Manual, ValueError, "Manual optimizes by itself"),
        (Nothing, ValueError, "training step of Nothing returned None instead of a loss"),
        (Broken, KeyError, "mine"),
    ):
        with pytest.raises(error, match=message):
            LightningTask(make, data, batch_size=8)
    with pytest.raises(TypeError, match="must hold tensors, not \\['Tensor', 'str'\\]"):
        LightningTask(Classifier, (IMAGES, "labels"), batch_size=8)
