"""Situations of practice, each under a Trainer on two processes: `tests/README.md` says what is right in each."""

from __future__ import annotations

import copy
import re
import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from lightning_lopt import DiLoCo, DisagreementError, LocalSGD
from tests.processes import run_cases
from tests.strategies.support import loader, trainer

ROWS = 72  # nine batches of four for each of two workers


class _Situation(pl.LightningModule):
    """A classifier; each situation adds to it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.build()

    def build(self):
        pass

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def seen(self):
        """What the test looks at, besides the tensors of the module."""


class _MomentumTeacher(_Situation):
    def build(self):
        self.predictor = nn.Linear(3, 3)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.predictor(self.net(batch[0])), self.teacher(batch[0] + 0.1))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        for teacher, student in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            teacher.data.lerp_(student.data, 0.05)


class _Parametrized(_Situation):
    def build(self):
        self.net[0] = parametrizations.weight_norm(self.net[0])
        self.net[3] = parametrizations.orthogonal(nn.Linear(8, 3))

    def seen(self):
        return self.net[3].weight.detach()


class _Memory(_Situation):
    def build(self):
        self.register_buffer("memory", torch.zeros(40, 6))

    def training_step(self, batch, batch_idx):
        self.memory[4 * batch_idx : 4 * batch_idx + len(batch[0])] = batch[0]
        return self.loss(batch)


class _Codebook(_Situation):
    def build(self):
        for name, value in {"codes": torch.randn(5, 3), "sizes": torch.ones(5), "uses": torch.zeros(5).long()}.items():
            self.register_buffer(name, value)
        self.register_buffer("sums", self.codes.clone())

    def training_step(self, batch, batch_idx):
        z = self.net(batch[0])
        codes = torch.cdist(z, self.codes).argmin(1)
        chosen = nn.functional.one_hot(codes, 5)
        self.uses += chosen.sum(0)
        self.sizes.lerp_(chosen.sum(0).float(), 0.1)
        self.sums.lerp_(chosen.float().T @ z.detach(), 0.1)
        self.codes = self.sums / self.sizes.clamp_min(1e-5).unsqueeze(1)
        return nn.functional.mse_loss(z, self.codes[codes])


class _Metrics(_Situation):
    def build(self):
        self.mean = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        self.mean(batch[0])
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return self.loss(batch)

    def seen(self):
        return self.trainer.callback_metrics["mean"]


class _AveragedByHand(_Situation):
    def build(self):
        self.average = AveragedModel(self.net).requires_grad_(False)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        return [optimizer], [SWALR(optimizer, 0.05, 3)]

    def on_train_epoch_end(self):
        self.average.update_parameters(self.net)

    def on_train_end(self):
        update_bn(self.trainer.train_dataloader, self.average)


class _SharpnessAware(torch.optim.Optimizer):
    """Two phases, each a method of its own, around an optimizer of its own."""

    def __init__(self, parameters):
        super().__init__(parameters, {"rho": 0.05})
        self.inner = torch.optim.SGD(self.param_groups, lr=0.1)
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def climb(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["before"] = p.clone()
            p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def descend(self):
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["before"])
        self.inner.step()
        self.zero_grad()


class _Manual(_Situation):
    def build(self):
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        optimizer.climb()
        self.manual_backward(self.loss(batch))
        optimizer.descend()

    def configure_optimizers(self):
        return _SharpnessAware(self.parameters())

    def seen(self):
        return self.trainer.strategy.rounds.round_idx


class _ByHand(_Manual):
    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        for p in self.parameters():
            p.data -= 0.1 * p.grad
            p.grad = None


class _Clipped(_Situation):
    """A critic whose weights are clipped after each step, and a generator with an EMA that steps in every third."""

    def build(self):
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(2, 6), nn.Linear(6, 1)
        self.ema = copy.deepcopy(self.generator).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        of_generator, of_critic = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 2))
        of_critic.zero_grad()
        self.manual_backward(self.critic(fake.detach()).mean() - self.critic(batch[0]).mean())
        of_critic.step()
        for p in self.critic.parameters():
            p.data.clamp_(-0.05, 0.05)
        if batch_idx % 3 == 2:
            of_generator.zero_grad()
            self.manual_backward(-self.critic(fake).mean())
            of_generator.step()
            for average, p in zip(self.ema.parameters(), self.generator.parameters(), strict=True):
                average.data.lerp_(p.data, 0.1)

    def configure_optimizers(self):
        return [torch.optim.RMSprop(module.parameters(), 0.01) for module in (self.generator, self.critic)]


class _Adapted(nn.Linear):
    """A frozen layer into which `train(False)` merges its adapter, and `train(True)` takes it out again."""

    def __init__(self):
        super().__init__(6, 8)
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6) / 10), nn.Parameter(torch.zeros(8, 2))
        self.merged = False

    def train(self, mode=True):
        if mode == self.merged:
            self.weight.data += (self.b @ self.a) * (-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) + (0 if self.merged else x @ self.a.T @ self.b.T)


class _Merged(_Situation):
    def build(self):
        self.net[0] = _Adapted()

    def on_validation_model_eval(self):
        self.eval()

    def on_validation_model_train(self):
        self.train()  # Lightning restores the attribute `training` and does not call this

    def validation_step(self, batch, batch_idx):
        assert self.net[0].merged


class _Cumulative(_Situation):
    def build(self):
        self.norm = nn.BatchNorm1d(6, momentum=None, affine=False)

    def training_step(self, batch, batch_idx):
        return self.loss((self.norm(batch[0]), batch[1]))


class _Validated(_Situation):
    """Buffers of the validation: one is written, one reassigned, one made there."""

    def build(self):
        self.register_buffer("batches", torch.zeros(1))
        self.register_buffer("best", torch.zeros(()))
        self.register_buffer("cache", None)

    def validation_step(self, batch, batch_idx):
        self.batches += 1
        self.best = torch.maximum(self.best, self.loss(batch))
        self.cache = torch.arange(3.0)


class _Centered(_Situation):
    def build(self):
        self.register_buffer("center", torch.zeros(3))
        self.found = {}

    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        return {"loss": nn.functional.cross_entropy(out - self.center, batch[1]), "out": out.detach()}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.center.lerp_(outputs["out"].mean(0), 0.1)
        if batch_idx % 4 == 3:  # right after a sync
            self.found["own"] = self.center.clone()

    def on_validation_start(self):
        self.found["validated"] = self.center.clone()

    def validation_step(self, batch, batch_idx):
        pass

    def on_save_checkpoint(self, checkpoint):
        self.found["saved"] = checkpoint["state_dict"]["center"].clone()

    def on_validation_end(self):
        self.trainer.save_checkpoint(self.path)

    def seen(self):
        return self.found


class _Inferred(_Situation):
    def build(self):
        self.register_buffer("level", torch.zeros(1))

    def training_step(self, batch, batch_idx):
        with torch.inference_mode():
            self.level = self.level + 1
        return self.loss(batch)


class _NewHead(_Situation):
    way = "add"

    def on_train_epoch_start(self):
        if self.current_epoch == 0:
            return
        torch.manual_seed(self.global_rank)
        self.net[3] = nn.Linear(8, 3)
        (optimizer,) = self.trainer.optimizers
        if self.way == "add":
            optimizer.add_param_group({"params": list(self.net[3].parameters())})
        elif self.way == "replace parameters":
            optimizer.param_groups[0]["params"] = list(self.parameters())
        else:
            self.trainer.strategy.setup_optimizers(self.trainer)


class _Compiled(_Situation):
    def build(self):
        self.net = torch.compile(self.net, backend="eager")


class _Prune(pl.Callback):
    def on_train_epoch_end(self, trainer, module):
        prune.l1_unstructured(module.net[0], "weight", amount=0.3)


class _Noise(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        torch.manual_seed(100 * batch_idx + module.global_rank)
        with torch.no_grad():
            for p in module.parameters():
                p += torch.randn_like(p) / 100


def _fit(make, strategy, epochs=1, validate=False, callbacks=(), **attributes):
    """The tensors of the module after a fit, what it has seen, and what was warned of."""
    module = make()
    vars(module).update(attributes)
    torch.manual_seed(1)
    run = trainer(
        strategy(),
        max_epochs=epochs,
        callbacks=[c() for c in callbacks],
        **({"val_check_interval": 4} if validate else {}),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, loader(ROWS), loader(16, shuffle=False) if validate else None)
    tensors = {n: t.detach().numpy() for n, t in [*module.named_parameters(), *module.named_buffers()]}
    return tensors, module.seen(), [str(w.message) for w in caught]


AVERAGING, WITH_OUTER = partial(LocalSGD, 4), partial(DiLoCo, 4)
RIGHT = {
    "momentum teacher": (_MomentumTeacher, AVERAGING),
    "parametrizations": (_Parametrized, WITH_OUTER),
    "pruning": (_Situation, AVERAGING, 3, False, [_Prune]),
    "memory": (_Memory, AVERAGING),
    "codebook": (_Codebook, partial(AVERAGING, sync_rules={"uses": "sum_of_changes"})),
    "metrics": (_Metrics, AVERAGING),
    "averaged by hand": (_AveragedByHand, AVERAGING, 2),
    "sharpness-aware": (_Manual, AVERAGING),
    "clipped": (_Clipped, AVERAGING),
    "merged adapter": (_Merged, WITH_OUTER, 2, True),
    "adapter never merged": (_Merged, WITH_OUTER, 2),
    "cumulative": (_Cumulative, AVERAGING),
    "validated": (_Validated, partial(WITH_OUTER, sync_rules={"best": "max"}), 2, True),
    "new head": (_NewHead, WITH_OUTER, 2),
    "compiled": (_Compiled, partial(AVERAGING, sync_rules={"net.1.running_mean": "local"})),
}
ERRORS = {
    "by hand": (MisconfigurationException, _ByHand, AVERAGING),
    "made in inference mode": (ValueError, _Inferred, AVERAGING),
    "new optimizer": (MisconfigurationException, _NewHead, AVERAGING, 2),
    "new parameters": (ValueError, _NewHead, AVERAGING, 2),
    "noise": (DisagreementError, _Situation, AVERAGING, 1, False, [_Noise]),
}


def _case(rank, name, folder):
    if name in RIGHT:
        return _fit(*RIGHT[name])
    if name.startswith("centered"):
        strategy = AVERAGING if name == "centered" else WITH_OUTER
        return _fit(_Centered, strategy, validate=True, path=f"{folder}/{name}.ckpt")
    error, *arguments = ERRORS[name]
    ways = {"new optimizer": {"way": "replace all"}, "new parameters": {"way": "replace parameters"}}
    with pytest.raises(error) as found:
        _fit(*arguments, **ways.get(name, {}))
    return str(found.value)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("situations"))
    names = [*RIGHT, "centered", "centered, with an outer step", *ERRORS]
    return run_cases(_case, 2, {name: (name, folder) for name in names}, connect=False)


@pytest.mark.parametrize("name", RIGHT)
def test_workers_end_with_the_same_tensors(results, name):
    (first, *_), (second, *_) = results[name]
    assert first.keys() == second.keys()
    assert {tensor for tensor in first if first[tensor].tobytes() != second[tensor].tobytes()} == set()


def test_orthogonal_weights_are_orthogonal(results):
    (_, weight, _), _ = results["parametrizations"]
    assert (weight @ weight.T).numpy() == pytest.approx(torch.eye(3).numpy(), abs=1e-5)


def _warnings(results, name):
    return " ".join(results[name][0][2])


def test_what_a_mean_may_spoil_is_warned_of(results):
    assert "net.0.weight_mask holds whole numbers" in _warnings(results, "pruning")
    assert "'max' or 'min' for masks" in _warnings(results, "pruning")
    assert "memory holds rows of which only some were written" in _warnings(results, "memory")
    assert "fit no parameter or buffer" in _warnings(results, "compiled")
    assert "such as 'net._orig_mod.1.running_mean'" in _warnings(results, "compiled")


def test_counts_and_metrics_are_of_all_workers(results):
    (tensors, *_), _ = results["codebook"]
    assert tensors["uses"].sum() == ROWS
    x = loader(ROWS).dataset.tensors[0]
    for _, mean, _ in results["metrics"]:
        assert mean.item() == pytest.approx(x.mean().item(), rel=1e-5)
    for tensors, *_ in results["cumulative"]:
        assert tensors["norm.running_mean"] == pytest.approx(x.mean(0).numpy(), rel=1e-5)
        assert tensors["norm.num_batches_tracked"] == 9


def test_a_step_of_an_optimizer_inside_of_another_one_counts(results):
    assert [rounds for _, rounds, _ in results["sharpness-aware"]] == [3, 3]


def test_clipped_weights_stay_in_their_box(results):
    (tensors, *_), _ = results["clipped"]
    assert 0 < abs(tensors["critic.weight"]).max() <= 0.05
    assert (tensors["ema.weight"] != tensors["generator.weight"]).any()


def test_an_adapter_that_is_merged_for_validation_leaves_no_trace(results):
    (merged, *_), (never, *_) = results["merged adapter"][0], results["adapter never merged"][0]
    for name in merged:
        assert merged[name] == pytest.approx(never[name], abs=1e-6)
    assert abs(merged["net.0.b"]).max() > 0.01


def test_buffers_of_the_validation_are_kept(results):
    (tensors, *_), _ = results["validated"]
    assert tensors["batches"] == [10]  # two in the sanity check, and two in each of four
    assert tensors["best"] > 0
    assert tensors["cache"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["centered", "centered, with an outer step"])
def test_what_a_hook_changes_after_a_sync_is_global_where_it_is_looked_at(results, name):
    (tensors, found, _), (others, other, _) = results[name]
    assert (found["own"] != other["own"]).any()
    assert (found["validated"] == other["validated"]).all()
    assert (found["saved"] == found["validated"]).all()
    if name == "centered":
        assert found["saved"].numpy() == pytest.approx(((found["own"] + other["own"]) / 2).numpy())
    assert tensors["center"].tobytes() == others["center"].tobytes()


MESSAGES = {
    "by hand": r"no optimizer of configure_optimizers took a step",
    "made in inference mode": r"^level was made under torch.inference_mode.*torch.no_grad",
    "new optimizer": r"optimizers of a fit cannot be replaced.*add_param_group",
    "new parameters": r"has other parameters than before.*add_param_group",
    "noise": r"the same seed. Noise of each worker's own may be added after the first step of a round",
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_right_is_an_error(results, name):
    for message in results[name]:
        assert re.search(MESSAGES[name], message), message
        assert message.count("same seed") <= 1
