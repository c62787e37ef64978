"""Lost workers, full disks and signals, on real processes."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.connectors import signal_connector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lightning_lopt import SlowMo
from lightning_lopt.strategies.signals import Signals
from tests.processes import free_port, run_workers
from tests.strategies.support import Classifier, flat, loader, trainer


class At(pl.Callback):
    """Call something on one worker after a step."""

    def __init__(self, step: int, rank: int | None, action) -> None:
        self.step, self.rank, self.action = step, rank, action

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            self.action()


def _lost(rank, number, folder, pids):
    Path(pids, str(rank)).write_text(str(os.getpid()))
    saving = ModelCheckpoint(folder, "last", every_n_train_steps=2, enable_version_counter=False)
    fault = At(6, 1, lambda: os.kill(os.getpid(), number))
    strategy = SlowMo(4, timeout=timedelta(seconds=3))
    run = trainer(strategy, max_epochs=1, callbacks=[fault, saving], enable_checkpointing=True)
    start = time.monotonic()
    try:
        run.fit(Classifier(seed=0), loader())
    except RuntimeError as error:
        Path(folder, "error").write_text(f"{type(error).__name__} {time.monotonic() - start:.1f} {error}")
        os.kill(int(Path(pids, "1").read_text()), signal.SIGKILL)  # nobody need wait for a stopped one


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_stops_the_others_with_the_reason(number, tmp_path):
    """One worker is killed, or hangs: the other ends within the timeout, and the last checkpoint is usable."""
    with pytest.raises((EOFError, TimeoutError)):
        run_workers(_lost, 2, number, str(tmp_path), str(tmp_path), connect=False, limit=12)
    name, seconds, text = (tmp_path / "error").read_text().split(" ", 2)
    assert name == "WorkerLostError"
    assert float(seconds) < 12
    assert "The last checkpoint is intact" in text
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] in (4, 6)
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def _disk_full(rank, folder):
    if rank == 0:
        at_4 = At(4, 0, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
    else:
        at_4 = At(4, 1, lambda: None)
    saving = ModelCheckpoint(folder, "last", every_n_train_steps=2, enable_version_counter=False)
    run = trainer(SlowMo(4), max_epochs=1, callbacks=[at_4, saving], enable_checkpointing=True)
    with pytest.raises(Exception, match="File too large" if rank == 0 else "could not write") as raised:
        run.fit(Classifier(seed=0), loader())
    return run.global_step, str(raised.value)


def test_a_full_disk_stops_all_and_leaves_the_last_checkpoint(tmp_path):
    (step, _), (other_step, reason) = run_workers(_disk_full, 2, str(tmp_path), connect=False)
    assert step == other_step == 4
    assert "Another worker could not write" in reason
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def _unwritable(rank, folder):
    run = trainer(SlowMo(4), max_epochs=1)
    run.fit(Classifier(seed=0), loader(48))
    with pytest.raises((NotADirectoryError, FileExistsError, RuntimeError)) as raised:
        run.save_checkpoint(f"{folder}/file/x.ckpt")
    run.save_checkpoint(f"{folder}/fine.ckpt")
    return str(raised.value)


def test_an_unwritable_folder_is_said_on_all_workers(tmp_path):
    (tmp_path / "file").touch()
    assert all("file" in reason for reason in run_workers(_unwritable, 2, str(tmp_path), connect=False))
    assert (tmp_path / "fine.ckpt").exists()


def _terminated_in_a_sync(rank):
    """SIGTERM reaches all workers while the first waits in a sync for the second, which is slow."""

    def slow():
        time.sleep(2)

    strategy = SlowMo(4, timeout=timedelta(seconds=20))
    at = At(3, 1, slow)
    run = trainer(strategy, max_epochs=1, callbacks=[at])
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    class Alarm(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                signal.setitimer(signal.ITIMER_REAL, 1.0)

    run.callbacks.insert(0, Alarm())
    start = time.monotonic()
    with pytest.raises(SIGTERMException) as raised:
        run.fit(Classifier(seed=0), loader())
    return type(raised.value).__name__, time.monotonic() - start


def test_sigterm_while_another_waits_in_a_sync():
    for name, seconds in run_workers(_terminated_in_a_sync, 2, connect=False):
        assert name == "SIGTERMException"
        assert seconds < 15


def _signals(rank, store, **kwargs):
    """Those of one of two workers, and a function that acts at a step."""
    connector = SimpleNamespace(_sigterm_notifier_fn=None, _slurm_sigusr_handler_fn=None)
    fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace())
    launch = SimpleNamespace(launcher=None)
    worker = SimpleNamespace(
        world_size=1, global_rank=rank, fit_loop=fit_loop, strategy=launch, _signal_connector=connector
    )
    signals = Signals(worker, "test", **kwargs)
    worker.world_size, signals._store = 2, store

    def act(step):
        signals.act(step)
        return getattr(connector, "received_sigterm", False)

    return signals, act


def test_nobody_waits_for_a_worker_that_has_gone_on():
    store = torch.distributed.HashStore()
    first, first_act = _signals(0, store, patience=1.0)
    _, second_act = _signals(1, store, interval=0.0, patience=1.0)
    assert not second_act(6)
    first._note_sigterm(signal.SIGTERM, None)
    assert not first_act(7)  # alone: it trains on, perhaps into a sync
    assert not second_act(7)  # does not wait for it here


def test_who_has_heard_of_a_signal_says_at_every_step_where_it_is():
    store = torch.distributed.HashStore()
    store.set("any", "1")
    signals, act = _signals(1, store, interval=0.0)
    assert not act(5)
    signals._interval = 1000.0
    assert not act(6)
    assert store.get("1") == b"7 going"


def test_a_worker_that_holds_the_store_may_finish_first():
    options = {"world_size": 1, "wait_for_workers": False, "timeout": timedelta(seconds=5)}
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, **options)
    client = torch.distributed.TCPStore("127.0.0.1", server.port, is_master=False, **options)
    signals, act = _signals(1, client, interval=0.0)
    assert not act(5)
    del server
    assert not act(6)
    signals._note_sigterm(signal.SIGTERM, None)
    assert act(7)


class _Requeue(pl.Callback):
    """SLURM's signal reaches the workers at different steps of a very long round."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == (5 if trainer.global_rank == 0 else 8):
            os.kill(os.getpid(), signal.SIGUSR1)


def _requeued(rank, folder, again):
    slurm = {
        "SLURM_NTASKS": 2,
        "SLURM_NTASKS_PER_NODE": 2,
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank,
        "SLURM_JOB_ID": 7,
        "SLURM_JOB_NAME": "job",
    }
    slurm["SLURM_NODEID"] = 0
    os.environ.update({name: str(value) for name, value in slurm.items()})
    commands = []
    pl.seed_everything(3, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal_connector, "call", lambda command: commands.append(command) or 0)
        callbacks = [_Requeue()] if again is False else []
        plugins = [SLURMEnvironment(auto_requeue=True)]
        run = trainer(SlowMo(1000), max_epochs=2, plugins=plugins, callbacks=callbacks, default_root_dir=folder)
        module = Classifier(seed=0, dropout=0.3)
        run.fit(module, loader())  # finds the checkpoint of a requeued job by itself
    return flat(module), run.global_step, commands


def test_slurm_requeue_saves_all_workers_at_one_step_of_a_long_round(tmp_path):
    first = run_workers(_requeued, 2, str(tmp_path), False, connect=False)
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] >= 8
    assert len(saved["lightning_lopt"]["parts"]) == 2
    assert first[0][2] == [["scontrol", "requeue", "7"]]
    for (weights, *_), (again, step, _) in zip(
        first, run_workers(_requeued, 2, str(tmp_path), True, connect=False), strict=True
    ):
        assert step == 24
        assert torch.equal(weights, again)


class _Die(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and trainer.global_step == 7 and trainer.global_rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def _restarted(folder):
    pl.seed_everything(3, verbose=False)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_last=True)
    run = trainer(SlowMo(4), 4, max_epochs=2, callbacks=[_Die(), saving], enable_checkpointing=True)
    module = Classifier(seed=0, dropout=0.3)
    run.fit(module, loader(), ckpt_path="last")
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"]), run.global_step, flat(module)


def _agent(rank, folder):
    """What torchrun does, but that its workers are forked from here, which spares them the seconds of their imports."""
    multiprocessing.current_process()._config["daemon"] = False  # it starts processes
    group = {"rdzv_backend": "c10d", "rdzv_endpoint": f"127.0.0.1:{free_port()}", "local_addr": "127.0.0.1"}
    config = LaunchConfig(1, 1, nproc_per_node=4, max_restarts=1, start_method="fork", **group)
    return elastic_launch(config, _restarted)(folder)


def _undisturbed(rank):
    pl.seed_everything(3, verbose=False)
    run = trainer(SlowMo(4), 4, max_epochs=2)
    module = Classifier(seed=0, dropout=0.3)
    run.fit(module, loader())
    return flat(module)


def test_torchrun_restarts_a_job_that_lost_one_of_four_workers(tmp_path):
    (restarted,) = run_workers(_agent, 1, str(tmp_path), connect=False)
    assert sorted(restarted) == [0, 1, 2, 3]
    for rank, undisturbed in enumerate(run_workers(_undisturbed, 4, connect=False)):
        restarts, step, weights = restarted[rank]
        assert (restarts, step) == (1, 12)
        assert torch.equal(weights, undisturbed)
