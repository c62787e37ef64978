"""Packages that users train with: only with `-m practice`, and skipped one by one where a package is missing."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_lopt import LocalSGD, Rounds
from tests.processes import run_workers
from tests.strategies.support import Classifier, flat, loader, trainer

pytestmark = [pytest.mark.practice, pytest.mark.processes]


class _Stepped(Classifier):
    """A classifier without a schedule, for an optimizer of its own."""

    make_optimizer = staticmethod(torch.optim.SGD)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


# -- schedulefree -----------------------------------------------------------------------------------------------------


class _ScheduleFree(_Stepped):
    def on_train_start(self):
        self.optimizers().train()

    def on_validation_model_eval(self):
        super().on_validation_model_eval()
        self.optimizers().eval()

    def on_validation_model_train(self):
        super().on_validation_model_train()
        self.optimizers().train()


def _schedule_free(rank, validates):
    import schedulefree

    module = _ScheduleFree(seed=0)
    module.make_optimizer = lambda parameters: schedulefree.AdamWScheduleFree(parameters, lr=0.01)
    torch.manual_seed(0)
    run = trainer(LocalSGD(4), max_epochs=2, val_check_interval=3 if validates else None)
    run.fit(module, loader(72), loader(16, shuffle=False) if validates else None)
    weights = flat(module)
    module.optimizers().eval()
    return weights.numpy(), flat(module).numpy()


def test_schedulefree_trains_as_without_validation():
    pytest.importorskip("schedulefree")
    first, second = run_workers(_schedule_free, 2, True, connect=False)
    never, _ = run_workers(_schedule_free, 2, False, connect=False)
    assert first[0] == pytest.approx(never[0], abs=1e-6)
    assert (first[1] == second[1]).all()  # in the mode for evaluation
    assert (first[0] != first[1]).any()


# -- prodigyopt -------------------------------------------------------------------------------------------------------


class _SaveAt(pl.Callback):
    def __init__(self, path, at):
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


def _prodigy(rank, path, resume):
    import prodigyopt

    module = _Stepped(seed=0)
    module.make_optimizer = lambda parameters: prodigyopt.Prodigy(parameters, lr=1.0)
    torch.manual_seed(0)
    run = trainer(LocalSGD(4), max_epochs=1, callbacks=[] if resume else [_SaveAt(path, 6)])
    run.fit(module, loader(72), ckpt_path=path if resume else None)
    return flat(module).numpy(), run.optimizers[0].param_groups[0]["d"]


def test_prodigy_resumes_with_each_workers_estimate(tmp_path):
    pytest.importorskip("prodigyopt")
    path = str(tmp_path / "prodigy.ckpt")
    whole = run_workers(_prodigy, 2, path, False, connect=False)
    resumed = run_workers(_prodigy, 2, path, True, connect=False)
    assert (whole[0][0] == whole[1][0]).all()
    for (weights, d), (again, same_d) in zip(whole, resumed, strict=True):
        assert (weights == again).all()
        assert 1e-6 < d == same_d  # it has grown from its start


# -- peft -------------------------------------------------------------------------------------------------------------


class _Lora(pl.LightningModule):
    """It puts its adapter into checkpoints, as read from the model, and merges it there."""

    def __init__(self):
        super().__init__()
        import peft

        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.net = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "2"]))
        self.get_adapter = peft.get_peft_model_state_dict

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["adapter"] = {name: t.detach().clone() for name, t in self.get_adapter(self.net).items()}


class _Keep(_SaveAt):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            self.own = {name: t.detach().clone() for name, t in module.get_adapter(module.net).items()}
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)


def _lora(rank, path):
    module, keep = _Lora(), _Keep(path, 6)
    base = {n: p.detach().clone() for n, p in module.named_parameters() if not p.requires_grad}
    torch.manual_seed(0)
    run = trainer(LocalSGD(4), max_epochs=1, callbacks=[keep])
    run.fit(module, loader(72))
    frozen = dict(module.named_parameters())
    assert all(torch.equal(p, frozen[n]) for n, p in base.items())
    sent = run.strategy.rounds.last_report.bytes_sent
    return {n: t.numpy() for n, t in keep.own.items()}, sent, sum(p.numel() for p in base.values())


def test_peft_adapters_in_checkpoints_are_the_workers_mean(tmp_path):
    pytest.importorskip("peft")
    path = tmp_path / "lora.ckpt"
    (own, sent, frozen), (other, *_) = run_workers(_lora, 2, str(path), connect=False)
    saved = torch.load(path, weights_only=True)["adapter"]
    assert any((own[name] != other[name]).any() for name in own)
    for name, value in saved.items():
        assert value.numpy() == pytest.approx((own[name] + other[name]) / 2, abs=1e-7)
    adapter = sum(value.numel() for value in saved.values())
    assert sent < 4 * adapter + 2000  # the adapter and a status
    assert frozen > 0


# -- accelerate -------------------------------------------------------------------------------------------------------


def _accelerate(rank, wrapped):
    import accelerate

    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer) if wrapped else optimizer
    rounds = Rounds(model, prepared, 4)
    for x, y in loader(72, shuffle=False):
        loss = nn.functional.cross_entropy(model(x + rank), y)
        loss.backward()
        prepared.step()
        prepared.zero_grad()
        rounds.step()
    rounds.finish_round()
    return flat(model).numpy()


def test_rounds_with_accelerates_optimizer():
    pytest.importorskip("accelerate")
    first, second = run_workers(_accelerate, 2, True)
    plain, _ = run_workers(_accelerate, 2, False)
    assert (first == second).all()
    assert (first == plain).all()


# -- litdata and webdataset -------------------------------------------------------------------------------------------


class _Reader(pl.LightningModule):
    """It notes what it is given."""

    def __init__(self, make_loader):
        super().__init__()
        self.layer, self.make_loader, self.read = nn.Linear(1, 1), make_loader, []

    def train_dataloader(self):
        return self.make_loader()

    def training_step(self, batch, batch_idx):
        self.read += [int(x) for x in batch]
        return self.layer(batch.float().view(-1, 1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def _read(rank, make_loader, folder, path, resume, stop):
    torch.manual_seed(0)
    module = _Reader(lambda: make_loader(folder))
    callbacks = [] if resume else [_SaveAt(path, stop)]
    run = trainer(LocalSGD(2), max_epochs=1, callbacks=callbacks, use_distributed_sampler=False)
    run.fit(module, ckpt_path=path if resume else None)
    return module.read, flat(module).numpy()


def _check_reading(make_loader, folder, path, rows, stop, batch_size=2):
    whole = run_workers(_read, 2, make_loader, folder, path, False, stop, connect=False)
    resumed = run_workers(_read, 2, make_loader, folder, path, True, stop, connect=False)
    assert sorted(whole[0][0] + whole[1][0]) == list(range(rows))
    for (read, weights), (rest, again) in zip(whole, resumed, strict=True):
        assert rest == read[batch_size * stop :]
        assert (weights == again).all()


def _number(index):
    return torch.tensor(index)


def _litdata(folder):
    import litdata

    return litdata.StreamingDataLoader(litdata.StreamingDataset(folder), batch_size=2)


def test_litdata_resumes_with_the_rest_of_the_epoch(tmp_path):
    litdata = pytest.importorskip("litdata")
    folder = str(tmp_path / "data")
    litdata.optimize(fn=_number, inputs=list(range(24)), output_dir=folder, chunk_bytes=64, num_workers=1)
    _check_reading(_litdata, folder, str(tmp_path / "state.ckpt"), 24, 3)


def _webdataset(folder):
    import webdataset

    shards = [f"{folder}/{i}.tar" for i in range(2)]
    data = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=webdataset.split_by_node)
    return DataLoader(data.decode().map(lambda sample: torch.tensor(sample["x.cls"])), batch_size=2)


def test_webdataset_with_unequal_shards_is_read_once(tmp_path):
    """An `IterableDataset` without a state: a resume would begin the epoch again, as everywhere in Lightning."""
    webdataset = pytest.importorskip("webdataset")
    for shard, numbers in enumerate((range(12), range(12, 32))):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for i in numbers:
                writer.write({"__key__": f"{i:04}", "x.cls": i})
    path = str(tmp_path / "state.ckpt")
    (read, weights), (others, same) = run_workers(
        _read, 2, _webdataset, str(tmp_path), path, False, None, connect=False
    )
    assert (read, others) == ([*range(12)], [*range(12, 32)])
    assert (weights == same).all()
