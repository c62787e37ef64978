"""Trainers that come and go, as threads of this process with a fake lighthouse; and processes with torchft's."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import groupby

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lopt import LocalSGD, RoundMonitor, SlowMo
from lightning_lopt.callbacks import BatchNormReestimation
from tests.elastic_support import (
    OUTER,
    FakeLighthouse,
    FakeMembership,
    Processes,
    Trial,
    die,
    seeded,
    torchft_member,
)
from tests.strategies.support import trainer

ALL, SOME = (0, 1, 2), (0, 1)
STEPS, EPOCHS, H = 6, 4, 4  # batches of a worker in an epoch; rounds 2 and 5 end with an epoch


class Follower(pl.LightningModule):
    """It notes what it is given at each step; `at` is called before each batch."""

    def __init__(self, seed, at=lambda: None):
        super().__init__()
        with seeded(seed):
            self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).double()
        self.at = at
        self.steps = {}  # rows and learning rate by global step
        self.validated = {}  # weights by global step

    def on_train_batch_start(self, batch, batch_idx):
        self.at()

    def training_step(self, batch, batch_idx):
        rows, x = batch
        self.steps[self.global_step] = rows.tolist(), self.optimizers().param_groups[0]["lr"]
        loss = (self.net(x) - x.roll(1, 1)).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated[self.global_step] = self.weights()

    def weights(self):
        return torch.cat([t.detach().double().flatten() for t in self.state_dict().values()])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.8)
        by_step = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.9)
        by_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8)
        schedules = [{"scheduler": by_step, "interval": "step"}, {"scheduler": by_epoch, "interval": "epoch"}]
        return [optimizer], schedules


def _loader():
    x = torch.randn(3 * STEPS * 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return DataLoader(TensorDataset(torch.arange(len(x)), x), batch_size=4, shuffle=True)


def _validation():
    x = torch.zeros(2, 4, dtype=torch.float64)
    return DataLoader(TensorDataset(torch.arange(2), x), batch_size=2)


class Run(Trial):
    """Trainers in place of rounds in a plain loop.

    Args:
        plan: Functions that are called once at a place, with this run.
        make_strategy: Function of a membership.
        checkpoints: Path of the checkpoint from which a worker resumes.
        folder: Folder for a checkpoint of every worker after each step, none without.
    """

    def __init__(self, plan, make_strategy=None, checkpoints=None, folder=None, **options):
        if not dist.is_initialized():  # all Trainers of this process take it
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self._make_strategy = make_strategy or partial(LocalSGD, H, OUTER)
        self._checkpoints, self.folder = checkpoints or {}, folder
        self._options = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, **options}
        self.trainers, self.modules, self.monitors, self.reports = {}, {}, {}, {}
        super().__init__(0, ALL, plan)

    def _train(self, worker, life):
        strategy = self._make_strategy(elastic=self.membership(worker))
        module = Follower(
            100 * life + worker, at=lambda: self._at(worker, strategy.rounds.round_idx, strategy.rounds.local_step)
        )
        self.monitors[worker] = RoundMonitor()
        callbacks = [_Reports(self.reports), self.monitors[worker]]
        if self.folder is not None:
            folder = self.folder / str(worker)
            callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1))
        with seeded(0):
            run = trainer(
                strategy, 1, callbacks=callbacks, enable_checkpointing=self.folder is not None, **self._options
            )
        self.trainers[worker], self.modules[worker] = run, module
        with suppress(SIGTERMException):
            run.fit(module, _loader(), _validation(), ckpt_path=self._checkpoints.get(worker), weights_only=False)
        self.lighthouse.bury(worker)

    def check_end(self, workers=ALL):
        """All workers end at the same place with the same weights; what they validated is the same, too."""
        runs, modules = ([named[w] for w in workers] for named in (self.trainers, self.modules))
        assert {(run.global_step, run.current_epoch) for run in runs} == {(STEPS * EPOCHS, EPOCHS)}
        assert all(torch.equal(module.weights(), modules[0].weights()) for module in modules)
        for module in modules:
            for step, weights in module.validated.items():
                assert torch.equal(weights, modules[0].validated[step]), step


class _Reports(pl.Callback):
    """Notes the workers of every round, on which all agree."""

    def __init__(self, workers):
        self.workers = workers

    def on_train_start(self, trainer, pl_module):
        trainer.strategy.rounds.listeners.append(self._note)

    def _note(self, report):
        assert self.workers.setdefault(report.round_idx, report.workers) == report.workers


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run in which nothing happens."""
    run = Run({}, folder=tmp_path_factory.mktemp("checkpoints"))
    run.run()
    run.check_end()
    return run


def test_without_any_change_it_is_the_run_of_a_fixed_group(undisturbed):
    fixed = Follower(100)
    strategy = LocalSGD(H, OUTER, virtual_workers=3)
    trainer(strategy, 1, max_epochs=EPOCHS, num_sanity_val_steps=0).fit(fixed, _loader(), _validation())
    torch.testing.assert_close(undisturbed.modules[0].weights(), fixed.weights(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("joins_in", [2, 3, 4], ids=["at an epoch's end", "within an epoch", "next to the last"])
def test_one_that_joins_is_where_the_others_are(undisturbed, joins_in):
    """It has the others' step, epoch and learning rates, and the batches of its own share that belong there."""
    run = Run({(2, 1, "mean"): die, (0, joins_in, 1): lambda run: run.let_in(2)})
    run.run()
    run.check_end()
    assert run.reports == {r: SOME if 1 <= r <= joins_in else ALL for r in range(6)}
    monitored = run.monitors[0].history
    assert [row["rounds/workers"] for row in monitored] == [len(run.reports[r]) for r in range(6)]
    assert [*run.modules[2].steps] == [*range(H * (joins_in + 1), STEPS * EPOCHS)]
    for worker, module in run.modules.items():
        assert module.steps.items() <= undisturbed.modules[worker].steps.items()


def test_one_that_joins_at_the_end_has_the_weights_and_no_steps():
    run = Run({(2, 1, 1): die, (0, 5, 1): lambda run: run.let_in(2)})
    run.run()
    run.check_end()
    assert not run.modules[2].steps


def _signal(run):
    run.trainers[2].strategy.signals._note_sigterm(15, None)


def test_a_signal_is_a_leave_after_the_round_and_the_others_say_so(monkeypatch):
    said = []
    monkeypatch.setattr("lightning_lopt.strategies.elastic.rank_zero_info", said.append)
    run = Run({(2, 1, 1): _signal, (0, 3, 1): lambda run: run.let_in(2)})
    run.run()
    run.check_end()
    assert run.reports == {r: SOME if 2 <= r <= 3 else ALL for r in range(6)}
    assert Counter(said) == {
        "Round 0 begins with workers [0, 1, 2].": 3,
        "Worker 2 leaves the others after round 1.": 1,
        "Round 2 begins with workers [0, 1]: 2 is gone.": 2,
        "Round 4 begins with workers [0, 1, 2]: 2 joins.": 2,
        "Round 4 begins with workers [0, 1, 2].": 1,  # itself
    }


def _stop(run):
    run.trainers[2].should_stop = True


def test_one_that_stops_within_a_round_goes_back_to_the_global_weights():
    run = Run({(2, 3, 2): _stop}, val_check_interval=2)
    run.run()
    run.check_end(SOME)
    assert run.reports == {r: ALL if r < 3 else SOME for r in range(6)}
    stopped = run.modules[2]
    assert max(stopped.steps) == 14
    assert torch.equal(stopped.weights(), run.modules[0].validated[14])  # in the same round


@pytest.mark.parametrize("step", [12, 14], ids=["at a round's end", "within a round"])
def test_a_checkpoint_of_one_worker_is_enough(undisturbed, step):
    """Others without one, and with an older one, go to its place."""
    folder = undisturbed.folder
    again = Run({}, checkpoints={1: folder / f"1/step={step}.ckpt", 2: folder / "2/step=5.ckpt"})
    again.run()
    again.check_end()
    assert [*again.reports] == [3, 4, 5]
    for worker, module in again.modules.items():
        assert min(module.steps) == step
        assert module.steps.items() <= undisturbed.modules[worker].steps.items()


def test_a_fixed_group_goes_on_from_a_checkpoint_of_one_worker(undisturbed):
    fixed, run = Follower(7), trainer(LocalSGD(H, OUTER, virtual_workers=3), 1, max_epochs=EPOCHS)
    with pytest.warns(UserWarning, match="The checkpoint holds one of 3 workers"):
        run.fit(fixed, _loader(), _validation(), ckpt_path=undisturbed.folder / "0/step=12.ckpt", weights_only=False)
    assert run.global_step == STEPS * EPOCHS
    assert fixed.steps.items() <= undisturbed.modules[0].steps.items()


def _membership(max_workers=3):
    return FakeMembership(0, max_workers, FakeLighthouse((0,)), lambda *_: None)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"sharded": True}, "outer state of a lost worker"),
        ({"overlap_steps": 1}, "cannot be repeated"),
        ({"density": 0.5}, "common weights"),
        ({"worker_speeds": "measured"}, "a fixed number"),
        ({"ranks_per_worker": 2}, "a worker is one process"),
        ({"virtual_workers": 2}, "all in one process"),
        ({"eval_weights": "mean"}, "come together between syncs"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_with_the_reason(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        SlowMo(H, elastic=_membership(), **arguments)


def test_several_processes_are_refused():
    with pytest.raises(MisconfigurationException, match="start the script once for each worker_id"):
        trainer(LocalSGD(H, elastic=_membership()), 2)


class _Logging(Follower):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("reduced", loss, sync_dist=True)
        return loss


class _ScheduleFree(torch.optim.SGD):
    def eval(self):
        pass

    train = eval


class _WithModes(Follower):
    def configure_optimizers(self):
        return _ScheduleFree(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("module", "callbacks", "reason"),
    [
        (_Logging, [], "reduced cannot be logged with sync_dist=True"),
        (_WithModes, [], "a mode for evaluation"),
        (Follower, [EMAWeightAveraging()], "average this worker's own weights"),
        (Follower, [BatchNormReestimation()], "every sync averages the running statistics"),
    ],
    ids=["sync_dist", "modes", "averages", "BatchNorm"],
)
def test_what_needs_all_workers_between_syncs_is_refused(module, callbacks, reason):
    run = trainer(LocalSGD(H, elastic=_membership()), 1, callbacks=callbacks, max_steps=2)
    with pytest.raises(MisconfigurationException, match=reason):
        run.fit(module(0), _loader(), _validation())


def test_one_that_begins_alone_is_told_that_others_may_have_ended():
    run = trainer(LocalSGD(H, elastic=_membership()), 1, max_steps=2)
    with pytest.warns(UserWarning, match="Worker 0 begins a new run alone"):
        run.fit(Follower(0), _loader())


def test_other_optimizers_and_schedules_are_another_setting(undisturbed):
    place = undisturbed.trainers[0].strategy.rounds.companions[0]
    assert place.kind == "SGD, StepLR, StepLR, Precision"


def test_one_without_contact_for_rounds_is_told_to_start_again(undisturbed):
    place = undisturbed.trainers[0].strategy.rounds.companions[0]
    with pytest.raises(RuntimeError, match="start this one again"):
        place.load_state_dict(place.state_dict())


# -- real processes on torchft's lighthouse ---------------------------------------------------------------------------

ROUNDS = 80


def _fit(worker, life, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    log = (folder / f"{worker}.jsonl").open("a", buffering=1)

    def note(event, **values):
        print(json.dumps({"event": event, "life": life, "time": time.time(), **values}), file=log)

    class Listening(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            note("up")
            trainer.strategy.rounds.listeners.append(lambda r: note("round", round=r.round_idx, workers=r.workers))

    module = Follower(100 * life + worker, at=lambda: time.sleep(0.03))
    strategy = LocalSGD(H, OUTER, elastic=torchft_member(worker, port))
    run = trainer(strategy, 1, max_steps=H * ROUNDS, callbacks=[Listening()], num_sanity_val_steps=0)
    with suppress(SIGTERMException):
        run.fit(module, _loader(), _validation())
    note("ends", step=run.global_step, left=strategy.rounds.left, first=min(module.steps))
    torch.save(module.weights(), folder / f"{worker}.pt")


@pytest.fixture
def processes(tmp_path):
    pytest.importorskip("torchft")
    processes = Processes(tmp_path, multiprocessing.get_context("fork"))
    yield processes
    processes.kill()


@pytest.mark.long
def test_one_trainer_is_killed_and_another_gets_a_signal(processes):
    """Worker 2 is killed and started again; then worker 1 is told to leave. The others never stop."""
    first = [processes.launch(_fit, worker, 0, processes.port, processes.folder) for worker in ALL]
    processes.wait_for(2, 2)
    first[2].kill()
    processes.wait_for(0, 1 + max(event["round"] for event in processes.events(0, "round")))
    processes.launch(_fit, 2, 1, processes.port, processes.folder)
    processes.wait_until(lambda: any(event["life"] == 1 for event in processes.events(2, "round")))
    first[1].terminate()
    processes.end()
    rounds = {w: {event["round"]: tuple(event["workers"]) for event in processes.events(w, "round")} for w in ALL}
    assert [*rounds[0]] == [*range(ROUNDS)]
    assert all(own[index] == rounds[0][index] for own in rounds.values() for index in own)
    assert [workers for workers, _ in groupby(rounds[0].values())] == [ALL, SOME, ALL, (0, 2)]
    (zero,), (one,), (two,) = (processes.events(w, "ends") for w in ALL)
    joined = min(event["round"] for event in processes.events(2, "round") if event["life"] == 1)
    assert (zero["step"], two["step"], two["first"]) == (H * ROUNDS, H * ROUNDS, H * joined)
    assert (one["left"], one["step"]) == (True, H * len(rounds[1]))
    weights = [torch.load(processes.folder / f"{worker}.pt") for worker in (0, 2)]
    assert torch.equal(*weights)
