"""State that no optimizer steps, under a Trainer: EMA teachers, loaded weights, counts, and what stays local."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_lopt import DiLoCo, LocalSGD
from tests.processes import run_cases
from tests.strategies.support import cli_trainer, loader, trainer


class _Taught(pl.LightningModule):
    """A student of an EMA teacher; it counts batches, and keeps a bias of the worker's own."""

    def __init__(self, rank, lr=0.1, loaded=None):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Linear(6, 3)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.own = nn.Parameter(torch.full((1 if loaded is None else 1 + rank,), float(rank)))
        self._ddp_params_and_buffers_to_ignore = ["own"]
        self.register_buffer("count", torch.zeros(1))
        self.lr, self.loaded = lr, loaded

    def on_fit_start(self):
        if self.loaded is not None:
            own = {"own": self.own.detach().clone()}
            self.load_state_dict({n: torch.full_like(t, self.loaded) for n, t in self.state_dict().items()} | own)

    def training_step(self, batch, batch_idx):
        self.count += 1
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                t.lerp_(s, 0.1)
        out = self.student(batch[0])
        return (
            nn.functional.cross_entropy(out, batch[1]) + (out - self.teacher(batch[0])).square().sum() + self.own.sum()
        )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class _Save(pl.Callback):
    """Saves in mid-round, and keeps the worker's own teacher of that time."""

    def __init__(self, path, at):
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.at:
            self.teacher = module.teacher.weight.detach().clone()
            trainer.save_checkpoint(self.path)


def _fit(module, strategy, path=None, at=0, ckpt_path=None):
    save = _Save(path, at)
    torch.manual_seed(1)
    run = trainer(strategy, max_epochs=1, callbacks=[save] if path else [])
    run.fit(module, loader(72), ckpt_path=ckpt_path)  # nine batches for each worker
    found = {name: t.detach().clone().numpy() for name, t in module.state_dict().items()}
    return found, save.teacher.numpy() if path else None


def _case(rank, name, folder):
    rules = {"count": "sum_of_changes"}
    if name == "loaded":
        return _fit(_Taught(rank, 0.0, loaded=5.0), DiLoCo(local_steps=4))[0]
    at, path = {"first round": 1, "second round": 5}[name], f"{folder}/{name}.ckpt"
    whole, teacher = _fit(_Taught(rank), LocalSGD(local_steps=4, sync_rules=rules), path, at)
    resumed, _ = _fit(_Taught(rank), LocalSGD(local_steps=4, sync_rules=rules), ckpt_path=path)
    saved = torch.load(path, weights_only=True)["state_dict"]["teacher.weight"].numpy()
    return whole, resumed, teacher, saved


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("state"))
    return run_cases(_case, 2, {n: (n, folder) for n in ("first round", "second round", "loaded")}, connect=False)


@pytest.mark.parametrize("name", ["first round", "second round"])
def test_a_teacher_and_counts_are_global_and_resume_bitwise(results, name):
    (whole, resumed, teacher, saved), (other, other_resumed, other_teacher, _) = results[name]
    assert (teacher != other_teacher).any()
    assert saved == pytest.approx((teacher + other_teacher) / 2, rel=1e-6)
    assert whole["count"].tolist() == other["count"].tolist() == [18.0]
    for tensor in ("student.weight", "teacher.weight", "count"):
        assert whole[tensor].tobytes() == other[tensor].tobytes()
    for a, b in [(whole, resumed), (other, other_resumed)]:
        assert all(a[tensor].tobytes() == b[tensor].tobytes() for tensor in a)


def test_what_ddp_is_told_to_ignore_stays_each_workers_own(results):
    (whole, *_), (other, *_) = results["first round"]
    assert whole["own"] == pytest.approx([-0.9])
    assert other["own"] == pytest.approx([0.1])
    assert [found["own"].tolist() for found in results["loaded"]] == [[0.0], [1.0, 1.0]]


def test_training_starts_from_weights_that_are_loaded_on_fit_start(results):
    for found in results["loaded"]:
        assert {name: t.flatten()[0] for name, t in found.items() if name != "own"} == {
            "student.weight": 5.0,
            "student.bias": 5.0,
            "teacher.weight": 5.0,
            "teacher.bias": 5.0,
            "count": 14.0,  # 5 and 9 batches: the maximum and the mean of the workers are the same
        }


def test_rules_in_yaml(tmp_path):
    config = """
        trainer:
          accelerator: cpu
          devices: 1
          strategy:
            class_path: CLASS
            init_args:
              local_steps: 8
              sync_rules:
                queue: local
                "*.running_*": mean
    """
    for name in ("LocalSGD", "DiLoCo"):
        strategy = cli_trainer(tmp_path, config.replace("CLASS", f"lightning_lopt.{name}")).strategy
        assert strategy._options.sync_rules == {"queue": "local", "*.running_*": "mean"}
