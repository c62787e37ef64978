"""Workers that share a sharded model in a Trainer: K workers of R ranks beside K plain workers of the same rows."""

from __future__ import annotations

import copy
import io
import os
import signal
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, OnExceptionCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader

from lightning_lopt import LOSCAR, AdaMLP, DiLoCo, LearnedLocalSGD, LocalSGD, PowerSGD, SlowMo
from lightning_lopt.selection import Fragments
from lightning_lopt.strategies.checkpoint import writing
from lightning_lopt.strategies.errors import CheckpointError, WorkerLostError
from lightning_lopt.strategies.islands import check_islands
from tests.processes import run_cases, run_workers
from tests.strategies.support import trainer
from tests.test_islands import _batch, _loss, _Model, _shard, _split_matrices

STRATEGIES = {
    "diloco": partial(DiLoCo, local_steps=3),
    "learned": partial(LearnedLocalSGD, local_steps=3),
    "mean": partial(LocalSGD, local_steps=3, overlap_steps=1, compression=PowerSGD(1)),
    "shared out": partial(SlowMo, local_steps=3, momentum=0.5, sharded=True),
    "in flight": partial(DiLoCo, local_steps=8, overlap_steps=2, selection=Fragments(2)),
    "learned, in flight": partial(LearnedLocalSGD, local_steps=4, overlap_steps=2),
    "coordinates, in flight": partial(LOSCAR, local_steps=4, overlap_steps=2, density=0.5),
    "shared out, in flight": partial(SlowMo, local_steps=4, overlap_steps=2, momentum=0.5, sharded=True),
    "every worker's, in flight": partial(LearnedLocalSGD, local_steps=4, overlap_steps=2, network=AdaMLP(2, seed=0)),
}
CLIPPED = {"gradient_clip_val": 1.0}
SAVED = (10, 11)  # steps
MID_ROUND = ("diloco", "learned", "shared out")  # at step 10; the others are in flight at 11
RESUMED = ("diloco", "mean", "shared out", "in flight", "learned, in flight")
GIVEN_UP = {  # syncs in flight that other ranks cannot go on with, and a change that makes plain workers give them up
    "coordinates, in flight": None,  # other coordinates for other ranks
    "shared out, in flight": {"sharded": False},
    "every worker's, in flight": {"sharded": True},
}


class _Module(pl.LightningModule):
    """All of the model on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = _Model(self.hidden)

    def training_step(self, tokens, _):
        return _loss(self.model, tokens)

    def validation_step(self, tokens, _):
        self.log("val", _loss(self.model, tokens), sync_dist=True)

    def test_step(self, tokens, batch_idx):
        self.log("test", _loss(self.model, tokens), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=self.foreach)

    hidden, foreach = 9, True


class _Sharded(_Module):
    """Word for word what `ModelParallelStrategy` takes."""

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            _shard(self.model, self.device_mesh["data_parallel"])


class _Meta(_Module):
    """Initialised by the strategy, shard by shard."""

    def configure_model(self) -> None:
        if self.model is None:
            with torch.device("meta"):
                super().configure_model()
            _shard(self.model, self.device_mesh["data_parallel"])


class _Matrices(_Module):
    """The matrices of the blocks in halves, all else on each rank."""

    hidden, foreach = 8, False  # torch splits even matrices, and steps one kind of tensor at once

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            _split_matrices(self.model, self.device_mesh["tensor_parallel"])


class _Plain(_Module):
    hidden, foreach = 8, False


class _Follows(_Module):
    """With a frozen block, and a copy of the head that follows it and weighs the loss; no optimizer has these."""

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            self.model.blocks[0].requires_grad_(False)
            self.teacher = copy.deepcopy(self.model.head).requires_grad_(False)
            if self.device_mesh is not None:
                _shard(self.model, self.device_mesh["data_parallel"])
                fully_shard(self.teacher, mesh=self.device_mesh["data_parallel"])

    def training_step(self, tokens, batch_idx):
        with torch.no_grad():
            weight = self.teacher(torch.ones(1, 5)).square().mean()
        return (1 + weight) * super().training_step(tokens, batch_idx)

    def on_before_optimizer_step(self, *_):  # a callback that saves comes before the module's hook of a batch's end
        with torch.no_grad():
            for own, p in zip(self.teacher.parameters(), self.model.head.parameters(), strict=True):
                own.lerp_(p, 0.1)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)


class _Gan(_Module):
    """Two optimizers by hand, of which the second steps in every other batch: each sees the other's model frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_model(self) -> None:
        if self.model is None:
            torch.manual_seed(0)
            generator, critic = (nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, n)) for n in (6, 1))
            self.model = nn.ModuleDict({"generator": generator, "critic": critic})
            if self.device_mesh is not None:
                for part in self.model.values():
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, tokens, batch_idx):
        real = tokens.double()
        generator, critic = self.model.values()
        losses = [lambda: -critic(generator(real)).mean(), lambda: (critic(generator(real)) - critic(real)).mean()]
        for optimizer, loss in zip(self.optimizers(), losses[: 1 + batch_idx % 2], strict=False):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss())
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def validation_step(self, tokens, _):
        self.log("val", self.model["critic"](tokens.double()).mean(), sync_dist=True)

    def configure_optimizers(self):
        return [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in self.model.values()]


class _Save(pl.Callback):
    """Saves at given steps, and may run a function of its own before."""

    def __init__(self, path, steps, before=lambda step: None) -> None:
        self.path, self.steps, self.before = path, steps, before

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in self.steps:
            self.before(trainer.global_step)
            trainer.save_checkpoint(f"{self.path}-{trainer.global_step}.ckpt")


class _Losses(pl.Callback):
    """Records the losses of validations, many of them in mid-round."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_validation_end(self, trainer, *_):
        if not trainer.sanity_checking:
            self.values.append(float(trainer.callback_metrics["val"]))


def _loaders(size):
    data = torch.cat([_batch(i % 2, i) for i in range(16)])
    return DataLoader(data, batch_size=4 // size), DataLoader(data[:16], batch_size=4 // size)


def _trainer(strategy, num_workers, size, **options):
    options = {"precision": "64-true", "max_epochs": 2, "val_check_interval": 2, **options}
    return trainer(strategy, devices=num_workers * size, **options)


def _seeded(make):
    torch.set_default_dtype(torch.float64)
    pl.seed_everything(0, verbose=False)
    return make()


def _weights(run, folder):
    path = f"{folder}/export.ckpt"
    run.save_checkpoint(path, weights_only=True)
    weights = torch.load(path, weights_only=True)["state_dict"]
    run.strategy.barrier()
    return weights


def _fit(
    rank, folder, name, num_workers, size, save=None, resume=None, make=None, strategy=None, steps=SAVED, **options
):
    """Weights, validated losses and number of steps of a run; it saves to `save`-step, and goes on from `resume`."""
    module = _seeded(make or (_Sharded if size > 1 else _Module))
    losses = _Losses()
    callbacks = [losses] if save is None else [losses, _Save(f"{folder}/{save}", steps)]
    strategy = STRATEGIES[name](**{"ranks_per_worker": size, **(strategy or {})})
    run = _trainer(strategy, num_workers, size, callbacks=callbacks, **CLIPPED | options)
    loaders = _loaders(1 if make in (_Matrices, _Plain) else size)
    run.fit(module, *loaders, ckpt_path=resume and f"{folder}/{resume}.ckpt")
    return _weights(run, folder), losses.values, run.global_step


def _fit_and_hear(rank, *arguments, **options):
    """The result of `_fit`, and the warning about what a resume drops."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = _fit(rank, *arguments, **options)
    return result, [text for w in caught if "are dropped" in (text := str(w.message))]


def _evaluate(rank, folder, size, resume):
    """The losses of a validation and a test of new weights, and of those of a checkpoint, without a fit."""
    module, losses = _seeded(_Sharded if size > 1 else _Module), []
    for ckpt_path in (None, f"{folder}/{resume}.ckpt"):
        run = _trainer(STRATEGIES["diloco"](ranks_per_worker=size), 2, size)
        (of_validation,) = run.validate(module, _loaders(size)[1], ckpt_path=ckpt_path, verbose=False)
        (of_test,) = run.test(module, _loaders(size)[1], ckpt_path=ckpt_path, verbose=False)
        losses += [of_validation["val"], of_test["test"]]
    return losses


def _model_parallel(rank, folder, saved):
    """The same module under the strategy that it was written for: steps, and the loss of a checkpoint of islands."""
    module = _seeded(_Sharded)
    module.float()
    torch.set_default_dtype(torch.float32)
    run, evaluation = (
        trainer(ModelParallelStrategy(data_parallel_size=4, tensor_parallel_size=1), devices=4, max_epochs=1)
        for _ in range(2)
    )
    run.fit(module, _loaders(1)[0])
    (found,) = evaluation.validate(module, _loaders(4)[1], ckpt_path=f"{folder}/{saved}.ckpt", verbose=False)
    return run.global_step, found["val"]


def _loaded(rank, folder, saved):
    """The loss of a checkpoint of islands in a module without a Trainer, and the types of its file."""
    torch.set_default_dtype(torch.float64)
    path = f"{folder}/{saved}.ckpt"
    module = _Module.load_from_checkpoint(path).eval()
    with torch.no_grad():
        losses = [_loss(module.model, tokens).item() for tokens in _loaders(1)[1]]
    return sum(losses) / len(losses), sorted(torch.load(path, weights_only=True))


# -- refusals ---------------------------------------------------------------------------------------------------------


class _FSDP1(_Module):
    def configure_model(self) -> None:
        if self.model is None:
            self.model = nn.Sequential(FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")))


class _DeepSpeed(_Module):
    def configure_model(self) -> None:
        super().configure_model()
        for i, p in enumerate(self.parameters()):
            p.ds_id = i  # as `deepspeed.zero.Init` numbers them


def _fsdp1(rank):
    with pytest.raises(MisconfigurationException, match=r"fully_shard \(FSDP2\) in configure_model"):
        _trainer(LocalSGD(3, ranks_per_worker=2), 2, 2).fit(_seeded(_FSDP1), _loaders(2)[0])
    return True


def _virtual_or_averaged(rank):
    model = _seeded(_Model)
    _shard(model, init_device_mesh("cpu", (4,)))
    with pytest.raises(MisconfigurationException, match=r"use Trainer\(devices=K \* R\) with ranks_per_worker=R"):
        check_islands(SimpleNamespace(lightning_module=model, callbacks=[]), 2)
    strategy = LocalSGD(3)
    with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging copies the module"):
        check_islands(
            SimpleNamespace(lightning_module=model, callbacks=[StochasticWeightAveraging(0.1)], strategy=strategy), 1
        )
    return True


def _norms_replaced(rank):
    with pytest.raises(MisconfigurationException, match="convert them in configure_model before fully_shard"):
        _trainer(LocalSGD(3, ranks_per_worker=2), 2, 2, sync_batchnorm=True).fit(_seeded(_Sharded), _loaders(2)[0])
    return True


class _Partly(_Module):
    """Without the last line of `_shard`: what is outside of the blocks stays plain."""

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            for block in self.model.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])


def _not_averaged(rank):
    for make in (_Partly, _Matrices):  # the mesh of the matrices has one rank
        with pytest.raises(MisconfigurationException, match=r"averages the gradients of .*model\.embed\.weight"):
            _trainer(LocalSGD(3, ranks_per_worker=2), 2, 2).fit(_seeded(make), _loaders(2)[0])
    return True


def _not_split(rank):
    for size in (1, 2):
        strategy = LocalSGD(3, ranks_per_worker=size, tensor_parallel_size=2)
        with pytest.raises(MisconfigurationException, match="=2, but configure_model shards nothing"):
            _trainer(strategy, 4 // size, size).fit(_seeded(_Module), _loaders(size)[0])
    return True


def _averaged(rank):
    run = _trainer(LocalSGD(3, ranks_per_worker=2), 2, 2, callbacks=[EMAWeightAveraging()])
    with pytest.raises(MisconfigurationException, match="EMAWeightAveraging copies the module"):
        run.fit(_seeded(_Sharded), _loaders(2)[0])
    return True


class _WholeModule(_Module):
    """Sharded as one with the model, of which the steps call a part."""

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


def _part_called(rank):
    with pytest.raises(MisconfigurationException, match=r"fully_shard\(self\.model, mesh=mesh\)` where the steps call"):
        _trainer(LocalSGD(3, ranks_per_worker=2), 2, 2).fit(_seeded(_WholeModule), _loaders(2)[0])
    return True


def _fail(*_):
    raise ArithmeticError


class _FailsInside(_Sharded):
    def training_step(self, tokens, batch_idx):
        if batch_idx == 1:
            self.model.blocks[1].register_forward_hook(_fail)
        return super().training_step(tokens, batch_idx)


def _exception_while_gathered(rank):
    """It is the one that the user sees."""
    with pytest.raises(ArithmeticError):
        _trainer(LocalSGD(3, ranks_per_worker=2), 2, 2).fit(_seeded(_FailsInside), _loaders(2)[0])
    return True


class _Fails(_Sharded):
    def on_train_batch_end(self, *_):
        if self.trainer.global_step == 4:
            raise ArithmeticError


def _after_an_exception(rank, folder):
    options = {"callbacks": [OnExceptionCheckpoint(folder, "after")], "enable_checkpointing": True}
    with pytest.raises((ArithmeticError, CheckpointError)) as error:
        _trainer(LocalSGD(3, ranks_per_worker=2), 2, 2, **options).fit(_seeded(_Fails), _loaders(2)[0])
    return "Go on from the last checkpoint" in str(error.value) and not Path(folder, "after.ckpt").exists()


# -- all of it, in as few launches as the order allows ----------------------------------------------------------------

FULL = [f"{name} {way}" for name in RESUMED for way in ("islands", "islands again", "from plain", "to plain")]
RANKS = ["one sharded", "four", "four to two", "two to one", "one to four"]
REFUSED = [
    "fsdp1",
    "virtual or averaged",
    "not averaged",
    "not split",
    "norms replaced",
    "averaged",
    "part called",
    "exception while gathered",
    "after an exception",
]
OTHER_K = ["islands to one of two", "islands to one of four", "islands to four"]


def _case(rank, function, *arguments):
    if isinstance(arguments[-1], dict):
        return function(rank, *arguments[:-1], **arguments[-1])
    return function(rank, *arguments)


def _launch(number, cases):
    """Run cases in launches of a few: the process groups of each stay, and threads of gloo wake up for them."""
    names, found = [*cases], {}
    for start in range(0, len(names), 12):
        few = {name: cases[name] for name in names[start : start + 12]}
        found |= run_cases(_case, number, few, connect=False, limit=200)
    return found


def _step(name):
    return SAVED[name not in MID_ROUND]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("islands"))

    def fit(name, num_workers, size, save=None, resume=None, **options):
        return (_fit, folder, name, num_workers, size, {"save": save, "resume": resume, **options})

    one = partial(fit, "learned, in flight", 1)
    plain = {f"{name} plain": fit(name, 2, 1, f"{name}-plain") for name in RESUMED}
    plain |= {f"{name} plain": fit(name, 2, 1, f"{name}-plain") for name in GIVEN_UP}
    plain["follows plain"] = fit("learned", 2, 1, "follows-plain", make=_Follows)
    plain["gan plain"] = fit("diloco", 2, 1, make=_Gan, gradient_clip_val=None)
    plain["matrices plain"] = fit("diloco", 2, 1, make=_Plain, gradient_clip_val=None)
    alone = one(1, make=_Sharded, strategy={"ranks_per_worker": "node"}, max_epochs=1)
    found = _launch(1, {"one": one(1, "one", max_epochs=1), "one sharded": alone}) | _launch(2, plain)
    cases = {}
    for name in RESUMED:
        cases[f"{name} islands"] = fit(name, 2, 2, f"{name}-islands")
        cases[f"{name} islands again"] = fit(name, 2, 2, None, f"{name}-islands-{_step(name)}")
        cases[f"{name} from plain"] = fit(name, 2, 2, None, f"{name}-plain-{_step(name)}")
    for name in GIVEN_UP:
        cases[name] = (_fit_and_hear, *fit(name, 2, 2, None, f"{name}-plain-{_step(name)}")[1:])
    cases |= {
        "meta": fit("diloco", 2, 2, "meta", make=_Meta),
        "meta again": fit("diloco", 2, 2, None, "diloco-islands-10", make=_Meta),
        "matrices": fit("diloco", 2, 2, make=_Matrices, strategy={"tensor_parallel_size": 2}, gradient_clip_val=None),
        "bf16": fit("learned", 2, 2, precision="bf16-true"),
        "follows": fit("learned", 2, 2, "follows-islands", make=_Follows),
        "follows from plain": fit("learned", 2, 2, None, "follows-plain-10", make=_Follows),
        "gan": fit("diloco", 2, 2, make=_Gan, gradient_clip_val=None),
        "accumulated": fit("diloco", 2, 2, accumulate_grad_batches=2),
        "four": one(4, "four", max_epochs=1),
        "one to four": one(4, None, "one-11", max_epochs=1),
        "islands to one of four": fit("diloco", 1, 4, None, "diloco-islands-10"),
        "islands to four": fit("diloco", 4, 1, None, "diloco-islands-10"),
        "plain to four": fit("diloco", 4, 1, None, "diloco-plain-10"),
        "in flight to four": (_fit_and_hear, *fit("in flight", 4, 1, None, "in flight-islands-11")[1:]),
        "plain in flight to four": (_fit_and_hear, *fit("in flight", 4, 1, None, "in flight-plain-11")[1:]),
        "evaluated": (_evaluate, folder, 2, "diloco-islands-10"),
        "model parallel": (_model_parallel, folder, "diloco-islands-10"),
        "fsdp1": (_fsdp1, {}),
        "virtual or averaged": (_virtual_or_averaged, {}),
        "not averaged": (_not_averaged, {}),
        "not split": (_not_split, {}),
        "norms replaced": (_norms_replaced, {}),
        "averaged": (_averaged, {}),
        "part called": (_part_called, {}),
        "exception while gathered": (_exception_while_gathered, {}),
        "after an exception": (_after_an_exception, folder, {}),
    }
    found |= _launch(4, cases)
    again = {f"{name} to plain": fit(name, 2, 1, None, f"{name}-islands-{_step(name)}") for name in RESUMED}
    for name, change in GIVEN_UP.items():
        if change is not None:
            again[f"{name} given up"] = fit(name, 2, 1, None, f"{name}-plain-{_step(name)}", strategy=change)
    again |= {
        "four to two": one(2, "two", "four-11", max_epochs=1),
        "islands to one of two": fit("diloco", 1, 2, None, "diloco-islands-10"),
        "bf16 plain": fit("learned", 2, 1, precision="bf16-true"),
        "follows to plain": fit("learned", 2, 1, None, "follows-islands-10", make=_Follows),
        "accumulated plain": fit("diloco", 2, 1, accumulate_grad_batches=2),
        "evaluated plain": (_evaluate, folder, 1, "diloco-plain-10"),
    }
    found |= _launch(2, again)
    last = {
        "two to one": one(1, None, "four-11", max_epochs=1),
        "plain to one": fit("diloco", 1, 1, None, "diloco-plain-10"),
        "loaded": (_loaded, folder, "diloco-islands-10"),
    }
    return found | _launch(1, last)


def _check_equal(found, expected, atol=1e-10):
    _check_same(found[0], expected[0], atol)


def _check_same(found, expected, atol=1e-10):
    (weights, losses, steps), (expected_weights, expected_losses, expected_steps) = found, expected
    assert weights.keys() == expected_weights.keys()
    for key, value in expected_weights.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
    assert losses == pytest.approx(expected_losses[-len(losses) :], abs=atol)
    assert steps == expected_steps


@pytest.mark.parametrize("case", FULL)
def test_islands_train_and_resume_as_plain_workers_do(results, case):
    """Resumed from their own checkpoint, in mid-round or in flight, they end bitwise the same."""
    name = next(name for name in RESUMED if case.startswith(name))
    _check_equal(results[case], results[f"{name} plain"])
    if case.endswith("again"):
        exact = results[f"{name} islands"][0][0]
        assert all(torch.equal(value, exact[key]) for key, value in results[case][0][0].items())


@pytest.mark.parametrize("case", RANKS)
def test_one_worker_goes_on_in_flight_with_other_ranks(results, case):
    _check_equal(results[case], results["one"])


@pytest.mark.parametrize("case", OTHER_K)
def test_other_numbers_of_workers_go_on_from_the_mean(results, case):
    """As they do from the checkpoint of plain workers at the same step."""
    _check_equal(results[case], results["plain to four" if case.endswith("to four") else "plain to one"])


@pytest.mark.parametrize("name", GIVEN_UP)
def test_syncs_in_flight_that_other_ranks_cannot_go_on_with(results, name):
    """They are given up, which a warning says, and the round ends with a sync of its own."""
    found, (said,) = results[name][0]
    assert "so is a sync in flight: its round ends with one of its own" in said
    expected = results.get(f"{name} given up", results[f"{name} plain"])[0]
    _check_same(found, expected, 1e-10 if GIVEN_UP[name] else 0.05)


def test_other_numbers_of_workers_give_up_a_sync_in_flight(results):
    (found, (said,)), (expected, (said_of_plain,)) = (
        results[name][0] for name in ("in flight to four", "plain in flight to four")
    )
    assert "so is a sync in flight" in said
    assert "so is a sync in flight" in said_of_plain
    _check_same(found, expected)


def test_tensor_parallel_workers_train_as_plain_workers_do(results):
    _check_equal(results["matrices"], results["matrices plain"])


@pytest.mark.parametrize("case", ["follows", "follows from plain", "follows to plain"])
def test_parameters_that_no_optimizer_steps(results, case):
    """They are frozen, or follow others; each rank has its part of them."""
    _check_equal(results[case], results["follows plain"])


def test_optimizers_that_take_turns(results):
    _check_equal(results["gan"], results["gan plain"])


def test_accumulated_gradients(results):
    _check_equal(results["accumulated"], results["accumulated plain"])


def test_bfloat16(results):
    (weights, losses, _), (_, expected, _) = results["bf16"][0], results["bf16 plain"][0]
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert losses == pytest.approx(expected, abs=0.1)


def test_models_on_the_meta_device_are_initialised_or_loaded(results):
    weights, losses, _ = results["meta"][0]
    assert all(bool(value.isfinite().all() and value.any()) for value in weights.values())
    assert losses[-1] < 2.5  # the logarithm of the size of the vocabulary is 2.56
    exact = results["diloco islands"][0][0]
    assert all(torch.equal(value, exact[key]) for key, value in results["meta again"][0][0].items())


def test_evaluation_without_a_fit(results):
    for losses in results["evaluated"]:
        assert losses == pytest.approx(results["evaluated plain"][0], abs=1e-10)
        assert losses[0] != pytest.approx(losses[2], abs=1e-3)


def test_the_module_trains_under_model_parallel_strategy(results):
    assert [steps for steps, _ in results["model parallel"]] == [4] * 4


def test_others_read_the_weights(results):
    """`ModelParallelStrategy`, `load_from_checkpoint` and a loader of plain tensors."""
    expected = results["evaluated plain"][0][2]
    assert [loss for _, loss in results["model parallel"]] == pytest.approx([expected] * 4, abs=1e-5)
    ((loss, keys),) = results["loaded"]
    assert loss == pytest.approx(expected, abs=1e-10)
    assert "state_dict" in keys
    assert "optimizer_states" not in keys  # which would be those of rank 0 alone


@pytest.mark.parametrize("case", REFUSED)
def test_what_islands_cannot_do_is_refused(results, case):
    assert results[case] == [True] * 4


def test_modules_of_deepspeed_are_refused():
    with pytest.raises(MisconfigurationException, match=r"modules of DeepSpeed, .*fully_shard \(FSDP2\)"):
        trainer(LocalSGD(3), 1, max_epochs=1).fit(_DeepSpeed(), _loaders(1)[0])


# -- every K and R to every other --------------------------------------------------------------------------------------

SIZES = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]  # K, R
MATRIX = ("diloco", "learned", "mean", "shared out")


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """Runs that are saved at step 5, and runs of all K and R that go on from each of them."""
    folder, found = str(tmp_path_factory.mktemp("matrix")), {}
    path = "{}-{}x{}".format
    for number in (1, 2, 4):
        saved = {
            (name, size): (_fit, folder, name, *size, {"save": path(name, *size), "steps": (5,)})
            for name in MATRIX
            for size in SIZES
            if size[0] * size[1] == number
        }
        _launch(number, saved)
    for number in (1, 2, 4):
        resumed = {
            (name, size, source): (_fit, folder, name, *size, {"resume": f"{path(name, *source)}-5"})
            for name in MATRIX
            for size in SIZES
            for source in SIZES
            if size[0] * size[1] == number
        }
        found |= _launch(number, resumed)
    return found


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("source", SIZES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MATRIX)
def test_any_workers_and_ranks_go_on_from_any_others(matrix, name, size, source):
    """They end as plain workers do that go on from plain workers."""
    _check_equal(matrix[name, size, source], matrix[name, (size[0], 1), (source[0], 1)])


# -- files ------------------------------------------------------------------------------------------------------------


def _in_files(rank, folder, resume=None, before=lambda step: None):
    """A run that saves after 5 and 10 steps, each rank in a file of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "GATHER_BYTES", 0)
        callbacks = [_Save(f"{folder}/saved", (5, 10), before)]
        run = _trainer(DiLoCo(3, ranks_per_worker=2), 2, 2, callbacks=callbacks, **CLIPPED)
        run.fit(_seeded(_Sharded), *_loaders(2), ckpt_path=resume and f"{folder}/{resume}.ckpt")
        return _weights(run, folder)


def _killed(rank, folder):
    """Rank 3 is killed when half of its file of the second checkpoint is written."""
    save = torch.save

    def save_half(checkpoint, file):
        whole = io.BytesIO()
        save(checkpoint, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def before(step):
        if rank == 3 and step == 10:
            torch.save = save_half

    with pytest.raises((WorkerLostError, RuntimeError)):
        _in_files(rank, folder, before=before)
    Path(folder, f"survivor{rank}").touch()


def _damaged(rank, folder):
    """Resumes from the checkpoint before the kill; from damaged files, which all ranks refuse; and from whole ones."""
    whole = _in_files(rank, f"{folder}/whole")
    runs = [_in_files(rank, folder, "saved-5")]  # saves over what the kill has left
    (file,) = Path(folder).glob("saved-10.ckpt.*.worker00003")
    content = file.read_bytes()
    values = max(torch.load(file)["local"]["sync"]["params"], key=torch.numel)
    torch.distributed.barrier()
    said = []
    for damage in ("missing", "flipped"):
        if rank == 0:
            file.unlink()
            if damage == "flipped":
                at = content.index(values.numpy().tobytes())  # between the entries there is padding
                file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        torch.distributed.barrier()
        with pytest.raises(CheckpointError) as error:
            _in_files(rank, folder, "saved-10")
        said.append(str(error.value))
        if rank == 0:
            file.write_bytes(content)
        torch.distributed.barrier()
    runs += [_in_files(rank, folder, resume) for resume in ("saved-5", "saved-10")]
    return said, [all(torch.equal(value, whole[key]) for key, value in weights.items()) for weights in runs]


def test_a_kill_during_a_save_leaves_the_checkpoint_before(tmp_path):
    with pytest.raises(EOFError):
        run_workers(_killed, 4, str(tmp_path), connect=False)
    assert {path.name for path in tmp_path.glob("survivor*")} == {"survivor0", "survivor1", "survivor2"}
    assert not (tmp_path / "saved-10.ckpt").exists()
    for rank, (said, same) in enumerate(run_workers(_damaged, 4, str(tmp_path), connect=False)):
        assert same == [True] * 3
        assert ["is missing" in said[0], "was damaged" in said[1]] == [rank == 3] * 2, said
