"""The strategies in a real Trainer on real processes."""

from __future__ import annotations

import copy
import inspect
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import DeepSpeedPrecision, FSDPPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_lopt import QSR, AdaMLP, DiLoCo, LearnedLocalSGD, LocalSGD, RoundMonitor, SlowMo, SyncOptions
from tests.processes import free_port, living, run_command, run_workers
from tests.strategies.support import Classifier, check_script, cli_trainer, flat, loader, trainer, write_script

STRATEGIES = {
    "local_sgd": partial(LocalSGD),
    "slowmo": partial(SlowMo),
    "diloco": partial(DiLoCo),
    "adamw": partial(LocalSGD, outer_optimizer=partial(torch.optim.AdamW, lr=1e-2)),
    "learned": partial(LearnedLocalSGD, network=AdaMLP(seed=0)),
}


def _contract(rank, name, num_workers):
    """What every strategy promises; each worker returns what must be the same on all."""
    strategy = STRATEGIES[name](local_steps=4)
    monitor = RoundMonitor()
    run = trainer(strategy, num_workers, max_epochs=2, callbacks=[monitor])
    module = Classifier(seed=rank)
    run.fit(module, loader(), loader(24, shuffle=False))
    steps = [int(row["step"]) for row in monitor.history]
    start = Classifier(seed=0)
    moved = [not torch.equal(a, b) for a, b in zip(module.parameters(), start.parameters(), strict=True)]
    frozen = [p.requires_grad for p in module.parameters()]
    return flat(module), steps, frozen == moved, run.callback_metrics["val_loss"].item(), module.seen


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("name", STRATEGIES)
def test_contract(name, num_workers):
    results = run_workers(_contract, num_workers, name, num_workers, connect=False)
    weights, steps, only_trainable_moved, val_loss, seen = results[0]
    batches = 2 * 24 // num_workers
    assert steps == sorted({*range(4, batches + 1, 4), batches})  # the last round is cut to end at the last step
    assert only_trainable_moved
    assert 0 < val_loss < 10
    for other in results[1:]:
        assert torch.equal(other[0], weights)
        assert other[1] == steps
        assert other[3] == val_loss
        assert all(torch.equal(a, b) for a, b in zip(other[4], seen, strict=True))


def _step_numbers(rank, options):
    monitor = RoundMonitor()
    run = trainer(LocalSGD(options.pop("local_steps")), callbacks=[monitor, *options.pop("callbacks", [])], **options)
    module = Classifier(seed=0)
    run.fit(module, loader(), loader(24, shuffle=False))
    return [int(row["step"]) for row in monitor.history], run.global_step, flat(module)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"local_steps": 5, "max_steps": 12}, [5, 10, 12]),
        ({"local_steps": 5, "max_steps": 12, "max_epochs": 1}, [5, 10, 12]),
        ({"local_steps": 4, "max_epochs": 1, "accumulate_grad_batches": 5}, [3]),
        ({"local_steps": 2, "max_epochs": 2, "accumulate_grad_batches": 5}, [2, 4, 6]),
        ({"local_steps": 100, "max_epochs": 1, "precision": "bf16-mixed", "gradient_clip_val": 0.5}, [12]),
        ({"local_steps": 3, "max_epochs": 1, "precision": "bf16-true"}, [3, 6, 9, 12]),
        ({"local_steps": lambda info: 1 + info.round_idx, "max_epochs": 1}, [1, 3, 6, 10, 12]),
        # learning rate .1 for 5 steps, .05 for 5, then .025: H = 2, 2, 2 (begun at step 4), 8 cut to 6
        ({"local_steps": QSR(alpha=0.142, base_steps=1), "max_epochs": 1}, [2, 4, 6, 12]),
        (
            {"local_steps": 5, "max_epochs": 9, "callbacks": [EarlyStopping("val_loss", patience=1, min_delta=9)]},
            [5, 10, 15, 20, 24],
        ),
    ],
    ids=lambda value: "" if isinstance(value, list) else ",".join(f"{k}={v}" for k, v in value.items())[:60],
)
def test_steps_at_which_a_sync_happens(options, expected):
    results = run_workers(_step_numbers, 2, options, connect=False)
    for steps, global_step, weights in results:
        assert steps == expected
        assert global_step == expected[-1]
        assert torch.equal(weights, results[0][2])


def _collectives(rank):
    """Names of the torch.distributed calls made in each batch, with H = 4 and 12 batches."""
    calls: list[str] = []

    class Count(pl.Callback):
        def __init__(self):
            self.per_batch = []

        def on_train_batch_start(self, *_):
            self.per_batch.append(len(calls))
            calls.clear()

        def on_train_epoch_end(self, *_):
            self.per_batch.append(len(calls))

    def recording(name, function):
        def wrapper(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return wrapper

    for name in ("all_reduce", "broadcast", "all_gather", "barrier", "broadcast_object_list", "reduce", "send", "recv"):
        setattr(dist, name, recording(name, getattr(dist, name)))
    count = Count()
    trainer(LocalSGD(4), max_epochs=1, callbacks=[count]).fit(Classifier(seed=0), loader())
    return count.per_batch[1:]


def test_nothing_is_communicated_between_syncs():
    sync = 3  # agreement, floats, BatchNorm's counter
    for per_batch in run_workers(_collectives, 2, connect=False):
        assert per_batch == [*[0, 0, 0, sync] * 2, 0, 0, 0, sync + 1]  # the end of the epoch is agreed on


def _validated(rank, every, folder):
    """Weights after fit with validation and saving every `every` batches, and what was saved."""
    checkpoint = ModelCheckpoint(dirpath=folder, every_n_train_steps=every, save_top_k=-1, filename="{step}")
    run = trainer(
        SlowMo(4),
        max_epochs=2,
        val_check_interval=every,
        callbacks=[checkpoint],
        enable_checkpointing=True,
        num_sanity_val_steps=2,
    )
    module = Classifier(seed=0)  # no dropout: any validation loader draws a seed from torch's generator
    run.fit(module, loader(), loader(24, shuffle=False))
    return flat(module), module.seen


def test_validating_and_saving_leave_no_trace(tmp_path):
    often = run_workers(_validated, 2, 3, str(tmp_path / "often"), connect=False)
    rarely = run_workers(_validated, 2, 12, str(tmp_path / "rarely"), connect=False)
    assert torch.equal(often[0][0], rarely[0][0])
    # all workers validate the same weights: at batch 3 the start, at 6 and 9 what was synced at 4 and 8
    seen = often[0][1]
    assert all(torch.equal(a, b) for a, b in zip(seen, often[1][1], strict=True))
    saved = torch.load(tmp_path / "often" / "step=9.ckpt", weights_only=True)["state_dict"]
    parameters = torch.cat([t.double().flatten() for t in saved.values()])
    assert torch.equal(parameters, seen[3])  # sanity check, 3, 6, then 9
    assert torch.equal(saved["alias"], saved["square.weight"])
    at_8 = torch.load(tmp_path / "often" / "step=9.ckpt", weights_only=True)["lightning_lopt"]["rounds"]["sync"]
    assert torch.equal(at_8["anchors"][0], saved["body.0.weight"])


def _mean_weights(rank):
    """With plain averaging, validation in mid-round sees the mean of the workers."""
    own = []

    class Own(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            own.append(flat(module))

    module = Classifier(seed=0)
    run = trainer(LocalSGD(10), max_epochs=1, limit_train_batches=3, val_check_interval=3, num_sanity_val_steps=0)
    run.callbacks.insert(0, Own())
    run.limit_train_batches = 3
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(), loader(24, shuffle=False))
    return own[2], module.seen[0]


def test_plain_averaging_validates_the_mean():
    (own_0, seen_0), (own_1, seen_1) = run_workers(_mean_weights, 2, connect=False)
    assert torch.equal(seen_0, seen_1)
    assert not torch.equal(own_0, own_1)
    mean = (own_0 + own_1) / 2
    tracked = flat_index_of_counter()
    mean[tracked] = own_0[tracked]
    torch.testing.assert_close(seen_0, mean, rtol=0, atol=1e-7)


def flat_index_of_counter() -> int:
    """Where BatchNorm's integer counter is in `flat(Classifier())`."""
    at = 0
    for name, t in Classifier().state_dict().items():
        if name.endswith("num_batches_tracked"):
            return at
        at += t.numel()
    raise AssertionError


def _resume(rank, name, folder, ckpt):
    """4 epochs of 12 batches with H = 4; a checkpoint at every epoch's end."""
    checkpoint = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")
    run = trainer(STRATEGIES[name](local_steps=4), max_epochs=4, callbacks=[checkpoint], enable_checkpointing=True)
    pl.seed_everything(3, verbose=False)
    module = Classifier(seed=0, dropout=0.3)
    run.fit(module, loader(), ckpt_path=ckpt)
    return flat(module), run.strategy.rounds.round_idx, run.global_step


@pytest.mark.parametrize("name", STRATEGIES)
def test_resume_is_bitwise_at_round_boundaries(name, tmp_path):
    whole = run_workers(_resume, 2, name, str(tmp_path / "a"), None, connect=False)
    resumed = run_workers(_resume, 2, name, str(tmp_path / "b"), str(tmp_path / "a" / "epoch=1.ckpt"), connect=False)
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a[0], b[0])
        assert a[1:] == b[1:] == (12, 48)


def _plain_checkpoint(rank, folder):
    run = trainer(LearnedLocalSGD(4, network=AdaMLP(seed=0)), max_epochs=1)
    module = Classifier(seed=0)
    run.fit(module, loader())
    run.save_checkpoint(Path(folder) / "ours.ckpt")
    plain = trainer("auto", 1, max_epochs=2) if rank == 0 else None
    return flat(module), plain is not None


def test_checkpoints_load_without_the_strategy(tmp_path):
    weights, _ = run_workers(_plain_checkpoint, 2, str(tmp_path), connect=False)[0]
    module = Classifier(seed=5)
    run = trainer("auto", 1, max_epochs=2)
    run.fit(module, loader(48), ckpt_path=tmp_path / "ours.ckpt")
    assert run.global_step == 12 + 12
    state = torch.load(tmp_path / "ours.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(torch.cat([t.double().flatten() for t in state.values()]), weights)


def test_foreign_checkpoints_load(tmp_path):
    run = trainer("auto", 1, max_epochs=1)
    run.fit(Classifier(seed=0), loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    ours = trainer(LocalSGD(5), 1, max_epochs=2)
    with pytest.warns(UserWarning, match="a fresh round begins"):
        ours.fit(Classifier(seed=1), loader(), ckpt_path=tmp_path / "plain.ckpt")
    assert ours.strategy.rounds.step_idx == 48


class _Fails(Classifier):
    def training_step(self, batch, batch_idx):
        if batch_idx == 6 and self.global_rank == 1:
            raise RuntimeError("this worker fails")
        return super().training_step(batch, batch_idx)


def _interrupted(rank, folder):
    """An exception in one worker: no collective on the way out, and the model is back at the anchor."""
    strategy = SlowMo(4, timeout=__import__("datetime").timedelta(seconds=10))
    module = _Fails(seed=0)
    callbacks = [pl.callbacks.OnExceptionCheckpoint(folder)]
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        trainer(strategy, max_epochs=1, callbacks=callbacks, enable_checkpointing=True).fit(module, loader())
    assert torch.equal(module.body[0].weight, next(iter(strategy.rounds.sync.state_dict()["anchors"])))
    return time.monotonic() - start, strategy.rounds.step_idx


def test_an_exception_in_one_worker_ends_all_in_time(tmp_path):
    for seconds, step in run_workers(_interrupted, 2, str(tmp_path), connect=False):
        assert seconds < 30
        assert step == 4
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["lightning_lopt"]["parts"] is None


class _NoOptimizer(Classifier):
    def configure_optimizers(self):
        return None


class _Frozen(Classifier):
    def configure_optimizers(self):
        self.requires_grad_(False)
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("module", "error", "match"),
    [
        (_NoOptimizer, ValueError, "nothing to train"),
        (_Frozen, ValueError, "nothing to train"),
    ],
)
def test_modules_that_are_refused(module, error, match):
    with pytest.raises(error, match=match):
        trainer(LocalSGD(4), 1, max_epochs=1).fit(module(), loader())


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: LocalSGD(0), ValueError, "integer >= 1"),
        (lambda: LocalSGD(locl_steps=3), TypeError, "locl_steps"),
        (lambda: LocalSGD(model_averaging_period=3), TypeError, "model_averaging_period"),
        (lambda: DiLoCo(nesterov=False), TypeError, "nesterov"),
        (lambda: LocalSGD(eval_weights="best"), ValueError, "eval_weights"),
        (lambda: LearnedLocalSGD(outer_optimizer=torch.optim.SGD), TypeError, "brings its own"),
        (lambda: LearnedLocalSGD(network="no/such/file"), FileNotFoundError, "no weights file"),
        (lambda: LearnedLocalSGD(network=3), TypeError, "must be an AdaMLP"),
        (lambda: LocalSGD(outer_optimizer="adam"), TypeError, "make an optimizer from parameters"),
        (lambda: LocalSGD(timeout=60), ValueError, r"positive datetime.timedelta, as .* not 60"),
        (lambda: LocalSGD(timeout=timedelta(0)), ValueError, "positive datetime.timedelta"),
        (lambda: SlowMo(momentum=1.0), ValueError, "momentum"),
        (lambda: DiLoCo(outer_lr=-1.0), ValueError, "outer_lr > 0"),
        (lambda: DiLoCo(momentum=math.nan), ValueError, r"momentum in \[0, 1\)"),
        (
            lambda: trainer(LocalSGD(precision_plugin=FSDPPrecision("32-true")), 1, max_epochs=1).fit(
                Classifier(), loader()
            ),
            MisconfigurationException,
            "FSDPPrecision",
        ),
        (
            lambda: trainer(LocalSGD(precision_plugin=DeepSpeedPrecision("bf16-mixed")), 1, max_epochs=1).fit(
                Classifier(), loader()
            ),
            MisconfigurationException,
            r"cannot use DeepSpeedPrecision: use Trainer\(precision=...\) .*fully_shard \(FSDP2\)",
        ),
        (
            lambda: trainer("auto", 1, max_epochs=1, callbacks=[RoundMonitor()]).fit(Classifier(), loader()),
            MisconfigurationException,
            "RoundMonitor needs a strategy of lightning_lopt, not SingleDeviceStrategy",
        ),
    ],
)
def test_wrong_arguments(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_names_are_registered():
    run = trainer("slowmo", 1)
    assert isinstance(run.strategy, SlowMo)
    assert trainer("local_sgd_fork", 1).strategy._start_method == "fork"


def test_lightning_cli(tmp_path):
    config = """
            trainer:
              accelerator: cpu
              logger: false
              strategy:
                class_path: lightning_lopt.LocalSGD
                init_args:
                  local_steps: {class_path: lightning_lopt.QSR, init_args: {alpha: 0.3, base_steps: 4}}
                  outer_optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.7}}
                  process_group_backend: gloo
              callbacks: [{class_path: lightning_lopt.RoundMonitor}]
            """
    strategy = cli_trainer(tmp_path, config, _Data).strategy
    assert strategy._schedule == QSR(alpha=0.3, base_steps=4)
    assert strategy._global_weights.weights == "anchor"


def _terminated(rank):
    """SIGTERM in mid-round, on all workers, as schedulers send it."""

    class Terminate(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    run = trainer(SlowMo(4), max_epochs=1, callbacks=[Terminate()])
    with pytest.raises(SIGTERMException):
        run.fit(Classifier(seed=0), loader())
    return run.global_step, run.strategy.rounds.step_idx, flat(run.lightning_module)


def test_sigterm_goes_back_to_the_last_synced_weights():
    (*first, weights), (*second, others) = run_workers(_terminated, 2, connect=False)
    assert first == second  # both stop at one step: the sixth, or where the first to hear of it waited for the other
    step, synced = first
    assert 6 <= step <= 12
    assert synced == step // 4 * 4
    assert torch.equal(weights, others)


class _Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(24, shuffle=False)


def test_data_module_test_and_second_fit():
    run = trainer(LocalSGD(5), 1, max_epochs=1)
    module = Classifier(seed=0)
    run.fit(module, datamodule=_Data())
    first = run.strategy.rounds.round_idx
    run.validate(module, datamodule=_Data(), verbose=False)
    run.fit_loop.max_epochs = 2
    run.fit(module, datamodule=_Data())
    assert first == 5
    assert run.strategy.rounds.step_idx == run.global_step == 48


def test_callbacks_can_be_copied():
    run = trainer(SlowMo(5), 1, max_epochs=1)
    run.fit(Classifier(seed=0), loader())
    assert len(copy.deepcopy(run.callbacks)) == len(run.callbacks)


@pytest.mark.parametrize("launcher", ["trainer", "torchrun"])
def test_launchers(tmp_path, launcher):
    path, environment = write_script(tmp_path, "LocalSGD(4)", 2, max_epochs=1)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command = [sys.executable, *(torchrun if launcher == "torchrun" else []), str(path)]
    printed, _ = run_command(command, 120, environment, tmp_path)
    check_script(printed, 2)


def test_ctrl_c_leaves_no_process(tmp_path):
    path, environment = write_script(tmp_path, "LocalSGD(4)", 2, max_epochs=100_000, logger=True)
    process = subprocess.Popen(
        [sys.executable, str(path)],
        env=environment,
        cwd=tmp_path,
        start_new_session=True,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        end = time.monotonic() + 120
        while not list(tmp_path.rglob("events*")) and time.monotonic() < end:
            time.sleep(0.2)
        time.sleep(2)  # in the middle of training
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
        end = time.monotonic() + 20
        while living(process.pid) and time.monotonic() < end:
            time.sleep(0.2)
        assert living(process.pid) == []
    finally:
        if living(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


class _Spoiled(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.global_rank == 1 and batch_idx == 5 else loss


def _spoiled(rank):
    monitor = RoundMonitor()
    module = _Spoiled(seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(LearnedLocalSGD(4), max_epochs=1, callbacks=[monitor]).fit(module, loader())
    said = [str(w.message) for w in caught if "leaves out" in str(w.message)]
    return flat(module), [row["rounds/left_out"] for row in monitor.history], said


def test_a_worker_that_diverges_is_left_out_of_its_round():
    results = run_workers(_spoiled, 2, connect=False)
    for rank, (weights, left_out, said) in enumerate(results):
        assert weights.isfinite().all()
        assert torch.equal(weights, results[0][0])
        assert left_out == [0, 1, 1]
        assert len(said) == (rank == 0)


class _Idle(Classifier):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        return None


@pytest.mark.parametrize(("module", "last"), [(Classifier, "There is one worker"), (_Idle, "Nothing was synced")])
def test_what_does_not_happen_is_said(module, last, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_lopt.strategies.local_sgd.rank_zero_info", said.append)
    trainer(LocalSGD(4), 1, max_epochs=1).fit(module(), loader())
    assert [text for text in said if "There is one worker" in text] == said[:1]
    assert last in said[-1]


def _arguments(documented: type) -> dict[str, str]:
    """The entries of Args in the docstring of a class."""
    docstring = inspect.getdoc(documented).split("Args:\n")[1].split("\n\n")[0]
    return dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", docstring, re.MULTILINE))


def test_options_of_a_sync_are_described_in_the_same_words():
    options, strategy = _arguments(SyncOptions), _arguments(LocalSGD)
    assert set(options) == {field.name for field in fields(SyncOptions)}
    assert {name: strategy[name] for name in options} == options
