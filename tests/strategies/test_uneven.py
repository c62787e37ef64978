"""Unequal data and unequal speeds in a real Trainer: nobody waits for ever, nothing is dropped, all meet."""

from __future__ import annotations

import os
import signal
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_lopt.strategies.checkpoint.writing as checkpoint_module
import lightning_lopt.strategies.uneven as uneven_module
from lightning_lopt import LOSCAR, QSR, DiLoCo, LocalSGD, RoundMonitor, SlowMo, TopK
from lightning_lopt.comm import DisagreementError
from tests.processes import run_cases, run_workers
from tests.strategies.support import Classifier, cli_trainer, flat, loader, trainer

BATCHES = [3, 14, 6, 9]


class Stream(IterableDataset):
    """A worker's own rows: worker k has 1 in coordinate k of each."""

    def __init__(self, rank: int, num: int, width: int) -> None:
        self.rank, self.num, self.width = rank, num, width

    def __iter__(self):
        for _ in range(self.num):
            yield torch.eye(self.width, dtype=torch.float64)[self.rank]


class Summing(pl.LightningModule):
    """Its weights move by minus the sum of the rows that it sees; with a schedule per step, which changes nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=torch.float64))
        self.spare = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.seen: list[list[float]] = []
        self.validated: list[tuple[int, list[float]]] = []

    def training_step(self, batch, batch_idx):
        self.log("epoch_loss", self.weight.sum(), on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        return (self.weight * batch).sum() + 0 * self.spare.sum()

    def validation_step(self, batch, batch_idx):
        self.log("val_sum", self.weight.sum(), sync_dist=True, batch_size=1)

    def on_validation_epoch_end(self):
        self.validated.append((self.trainer.current_epoch, self.weight.tolist()))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _rows(rank, batches, *, stream):
    data = Stream(rank, batches[rank], len(batches))
    return DataLoader(data if stream else list(data), batch_size=None)


def _fit(
    rank, strategy, batches, *, stream=True, folder=None, ckpt=None, epochs=2, callbacks=(), module=Summing, **options
):
    callbacks = [RoundMonitor(), *callbacks]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1))
    run = trainer(
        strategy,
        devices=len(batches),
        max_epochs=epochs,
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        use_distributed_sampler=False,
        **{"num_sanity_val_steps": 1, **options},
    )
    module = module(len(batches))
    validation = DataLoader(list(Stream(0, 1, len(batches))), batch_size=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*resuming from a checkpoint that ended before the epoch ended.*")
        run.fit(module, _rows(rank, batches, stream=stream), validation, ckpt_path=ckpt)
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    return module, run, metrics


STRATEGIES = {
    "local sgd": lambda **kw: LocalSGD(local_steps=4, **kw),
    "in flight": lambda **kw: LOSCAR(local_steps=4, overlap_steps=2, density=1.0, **kw),
    "loscar": lambda **kw: LOSCAR(local_steps=4, overlap_steps=2, density=0.5, **kw),
    "top-k": lambda **kw: LocalSGD(local_steps=4, compression=TopK(0.5), **kw),
    "diloco": lambda **kw: DiLoCo(local_steps=4, outer_lr=1.0, momentum=0.0, **kw),
}


def _sums(rank, batches, speeds, stream):
    ends = {}
    for name, make in STRATEGIES.items():
        module, run, metrics = _fit(rank, make(worker_speeds=speeds), batches, stream=stream)
        rounds = run.strategy.rounds
        ends[name] = (
            module.weight.tolist(),
            module.validated[1:],  # the first is the sanity check
            metrics,
            (rounds.round_idx, rounds.step_idx, run.global_step, run.current_epoch),
        )
    return ends


@pytest.mark.parametrize(
    ("num_workers", "speeds", "stream"),
    [(2, None, True), (4, None, True), (4, None, False), (4, [1, 4, 2, 3], False), (2, "measured", True)],
    ids=str,
)
def test_every_batch_of_every_worker_counts(num_workers, speeds, stream):
    """Every row moves the global weights by 1/K of itself, and the last validation has seen all of them."""
    batches = BATCHES[:num_workers]
    results = run_workers(_sums, num_workers, batches, speeds, stream, connect=False, limit=150)
    first = results[0]
    for rank, ends in enumerate(results):
        for name, (weights, validated, metrics, (rounds, steps, global_step, epoch)) in ends.items():
            expected = [-2 * n / num_workers for n in batches]
            assert weights == pytest.approx(expected, abs=1e-12), name
            assert validated == first[name][1], name
            assert [epoch for epoch, _ in validated] == [0, 1]
            if name != "top-k":  # whose first epoch is partly in what is not yet sent
                assert validated[0][1] == pytest.approx([w / 2 for w in expected], abs=1e-12), name
            assert validated[1][1] == weights, name
            assert metrics == first[name][2], name
            assert rounds == first[name][3][0], name
            assert (steps, global_step, epoch) == (2 * batches[rank], 2 * batches[rank], 2), name


class _Rows(IterableDataset):
    """The batches of a map-style loader, as a stream."""

    def __init__(self, batches) -> None:
        self.batches = batches

    def __iter__(self):
        yield from self.batches


def _same(rank):
    ends = []
    for make in (list, _Rows):
        monitor = RoundMonitor()
        batches = list(loader(24 + 4 * rank, shuffle=False))[rank:]  # six, others on each worker
        run = trainer(SlowMo(local_steps=4), max_epochs=2, callbacks=[monitor], use_distributed_sampler=False)
        module = Classifier(seed=0)
        run.fit(module, DataLoader(make(batches), batch_size=None), loader(8, shuffle=False))
        ends.append((flat(module), module.seen, [(row["step"], row["rounds/drift"]) for row in monitor.history]))
    return ends


def test_streams_of_equal_length_train_as_other_data_does():
    for known, unknown in run_workers(_same, 2, connect=False):
        assert torch.equal(known[0], unknown[0])
        assert [step for step, _ in known[2]] == [step for step, _ in unknown[2]] == [4, 8, 12]
        assert torch.equal(known[1][0], unknown[1][0])


def _stopped_and_resumed(rank, folder, speeds, name):
    ends = []
    whole = Path(folder) / "whole"
    for path, ckpt in ((whole, None), (Path(folder) / "again", whole / "epoch=0.ckpt")):
        strategy = STRATEGIES[name](worker_speeds=speeds)
        module, run, _ = _fit(rank, strategy, BATCHES, stream=False, folder=path, ckpt=ckpt, epochs=3)
        rounds = run.strategy.rounds
        ends.append((flat(module), module.validated[-1], rounds.round_idx, rounds.step_idx))
    saved = torch.load(whole / "epoch=0.ckpt", weights_only=True)["lightning_lopt"]
    return ends, saved["rounds"]["seconds"]


def _monitored(rank):
    _, run, _ = _fit(rank, LocalSGD(local_steps=4), [5, 12])
    (monitor,) = (callback for callback in run.callbacks if isinstance(callback, RoundMonitor))
    return [(row["rounds/round"], row["rounds/local_steps"]) for row in monitor.history], run.strategy.rounds.round_idx


def test_a_waiting_worker_monitors_the_rounds_of_the_others():
    (waiting, rounds), (working, _) = run_workers(_monitored, 2, connect=False)
    assert [number for number, _ in waiting] == [number for number, _ in working] == [*range(1, rounds + 1)]
    assert [steps for _, steps in waiting] == [4, 1, 0] * 2
    assert [steps for _, steps in working] == [4, 4, 4] * 2


@pytest.mark.parametrize(("speeds", "name"), [([1, 4, 2, 3], "loscar"), (None, "top-k"), ("measured", "local sgd")])
def test_resume_from_a_meeting(tmp_path, speeds, name):
    for (whole, again), seconds in run_workers(
        _stopped_and_resumed, 4, str(tmp_path), speeds, name, connect=False, limit=150
    ):
        assert whole[1] == again[1] or speeds == "measured"
        torch.testing.assert_close(whole[0], again[0], rtol=0, atol=1e-12 if speeds == "measured" else 0)
        assert whole[3] == again[3]
        assert [s > 0 for s in seconds] == [speeds == "measured"] * 4


def _informed(rank):
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uneven_module, "rank_zero_info", said.append)
        for batches, speeds in (([4, 4], [1, 2]), ([4, 8], [1, 2]), ([4, 4], None)):
            _fit(rank, LocalSGD(local_steps=4, worker_speeds=speeds), batches, stream=False, epochs=1)
    return said


def test_who_gives_unequal_workers_equal_data_is_told():
    for said in run_workers(_informed, 2, connect=False):
        assert ["all workers have 4 batches" in text for text in said] == [True]


REFUSED = {
    "max_steps=5": {"max_steps": 5},
    "min_steps=5": {"min_steps": 5},
    "val_check_interval=2": {"val_check_interval": 2},
    "max_time": {"max_time": timedelta(hours=1)},
    "every_n_train_steps=2": {"callbacks": [ModelCheckpoint(every_n_train_steps=2)]},
    "train_time_interval": {"callbacks": [ModelCheckpoint(train_time_interval=timedelta(hours=1))]},
}


def _refused(rank, speeds, batches):
    said = {}
    for name, options in REFUSED.items():
        with pytest.raises(Exception, match="take unequal numbers of steps") as error:
            _fit(rank, LocalSGD(local_steps=4, worker_speeds=speeds), batches, stream=False, **options)
        said[name] = str(error.value)
    return said


@pytest.mark.parametrize(
    ("speeds", "batches", "why"),
    [([1, 2], [6, 6], "(worker_speeds)"), (None, [4, 6], "(they have between 4 and 6 batches)")],
)
def test_what_counts_steps_is_refused(speeds, batches, why):
    for said in run_workers(_refused, 2, speeds, batches, connect=False):
        for name, text in said.items():
            assert name in text
            assert why in text


def _parted(rank, batches, options, every):
    strategy = LocalSGD(local_steps=4, timeout=timedelta(seconds=30))
    saving = [ModelCheckpoint(every_n_train_steps=every, save_top_k=-1)] if every else []
    with pytest.raises(DisagreementError) as error:
        _fit(rank, strategy, batches, callbacks=saving, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("batches", "options", "every", "places"),
    [
        ([0, 5], {}, 0, ["worker 0 at the epoch end", "worker 1 at the validation"]),
        ([3, 5], {"max_steps": 5}, 0, ["disagree on whether everything is sent", "unequal data"]),
        ([3, 9], {}, 5, ["worker 0 at the validation", "worker 1 at the collective within a batch"]),
        ([3, 9], {"val_check_interval": 5}, 0, ["worker 0 at the", "worker 1 at the validation within an epoch"]),
    ],
)
def test_streams_that_part_are_an_error_that_says_where(batches, options, every, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for said in run_workers(_parted, 2, batches, options, every, connect=False):
        assert all(place in said for place in places), said


class _Reducing(Summing):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, sync_dist=True, batch_size=1)
        return loss


def _reduces(rank, make, batches):
    with pytest.raises(DisagreementError, match="on_step=False"):
        _fit(rank, make(timeout=timedelta(seconds=30)), batches, module=_Reducing)
    return True


@pytest.mark.parametrize(
    ("make", "batches"),
    [
        (partial(LocalSGD, local_steps=4, worker_speeds=[1, 2]), [8, 8]),
        (partial(LOSCAR, local_steps=4, overlap_steps=2, worker_speeds=[1, 2]), [8, 8]),
        (partial(LocalSGD, local_steps=4), [3, 8]),
    ],
)
def test_a_reduction_in_every_batch_is_an_error_not_a_deadlock(make, batches):
    assert run_workers(_reduces, 2, make, batches, connect=False) == [True, True]


def _best(rank, folder):
    """Large checkpoints, in files whose names hold each worker's own step; then the best one is tested.

    Training stops after the second epoch and goes on, with other speeds.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_module, "GATHER_BYTES", 0)
        ckpt = None
        for epochs, speeds in ((2, [1, 2]), (3, "measured")):
            saving = ModelCheckpoint(folder, monitor="val_sum", mode="min", save_top_k=2)
            strategy = LocalSGD(local_steps=4, worker_speeds=speeds)
            module, run, _ = _fit(rank, strategy, [3, 8], callbacks=[saving], ckpt=ckpt, epochs=epochs)
            ckpt = f"{folder}/epoch=1-step=6.ckpt"
        weights = module.weight.tolist()
        module.weight.data.zero_()
        run.validate(module, DataLoader([torch.zeros(2)], batch_size=None), ckpt_path="best", verbose=False)
    return weights, module.weight.tolist()


def test_the_best_checkpoint_is_that_of_the_first_worker(tmp_path):
    for weights, best in run_workers(_best, 2, str(tmp_path), connect=False):
        assert weights == best == [-4.5, -12.0]
    files = sorted(path.name.split(".")[0] for path in tmp_path.iterdir())
    assert files == ["epoch=1-step=6"] * 3 + ["epoch=2-step=9"] * 3


def _early(rank):
    stop = EarlyStopping("val_sum", patience=1, mode="max")  # it only falls
    module, run, _ = _fit(rank, LocalSGD(local_steps=4, worker_speeds=[1, 2]), [3, 8], epochs=9, callbacks=[stop])
    return module.weight.tolist(), run.current_epoch


def test_early_stopping_stops_all_after_the_same_epoch():
    assert run_workers(_early, 2, connect=False) == [([-3.0, -8.0], 2)] * 2


class _Signal(pl.Callback):
    """SIGTERM for one worker, in the second epoch."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.strategy.signals._interval = 0.0
        if trainer.current_epoch == 1 and batch_idx == 1 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def _signalled(rank, speeds, batches):
    strategy = LocalSGD(local_steps=4, worker_speeds=speeds, timeout=timedelta(seconds=30))
    with pytest.raises(SIGTERMException):
        _fit(rank, strategy, batches, stream=False, epochs=50, callbacks=[_Signal()])
    return strategy.rounds.round_idx, strategy.rounds.step_idx


@pytest.mark.parametrize(("speeds", "batches"), [([1, 4], [5, 20]), (None, [3, 40])])
def test_a_signal_stops_all_after_the_same_round(speeds, batches):
    (rounds, *_), (others, *_) = run_workers(_signalled, 2, speeds, batches, connect=False)
    assert rounds == others


class _Act(pl.Callback):
    """Do something on each worker after a step of its own, in a fit of equal workers."""

    def __init__(self, steps, action) -> None:
        self.steps, self.action = steps, action

    def on_train_batch_end(self, trainer, *_):
        if self.steps.get(trainer.global_rank) == trainer.global_step:
            self.action(trainer)


class _SkipsOnOne(Summing):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.global_rank == 1 and batch_idx == 2 else None


class _LogsOnOne(Summing):
    def training_step(self, batch, batch_idx):
        if self.global_rank == 0 and batch_idx == 5:
            self.log("mine", 1.0, sync_dist=True)
        return super().training_step(batch, batch_idx)


class _ValidationLogsOnOne(Summing):
    def validation_step(self, batch, batch_idx):
        if self.global_rank == 0 and not self.trainer.sanity_checking:
            self.log("mine", 1.0, sync_dist=True)
        return super().validation_step(batch, batch_idx)


class _GathersUnequal(Summing):
    def training_step(self, batch, batch_idx):
        self.all_gather(torch.ones(1 + self.global_rank))
        return super().training_step(batch, batch_idx)


class _Plateau(Summing):
    """Each worker's rate follows a loss of its own, and H the rate."""

    def validation_step(self, batch, batch_idx):
        self.log("own", float(self.current_epoch * (1 - 2 * self.global_rank)), batch_size=1)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "own"}}


def _save(trainer):
    trainer.save_checkpoint("mine.ckpt")


def _stop(trainer):
    trainer.should_stop = True


AT = "worker {} at the {}".format
PARTED = {  # keyword arguments of the fit on each worker, and what the error says
    "a checkpoint": (
        {"callbacks": [_Act({0: 3}, _save)]},
        [AT(0, "checkpoint"), AT(1, "sync"), "call trainer.save_checkpoint on each"],
    ),
    "a checkpoint without a mean": (
        {"strategy": "diloco", "callbacks": [_Act({0: 3}, _save)]},
        [AT(0, "checkpoint"), AT(1, "sync"), "call trainer.save_checkpoint on each"],
    ),
    "checkpoints after other steps": (
        {"callbacks": [_Act({0: 2, 1: 3}, _save)]},
        ["the number of batches so far (between 2 and 3", "call trainer.save_checkpoint on each"],
    ),
    "a stop": (
        {"callbacks": [_Act({1: 2}, _stop)], "limit_val_batches": 0},
        [AT(0, "sync"), AT(1, "epoch end"), "trainer.should_stop was set on worker 1 alone"],
    ),
    "a stop in flight": (
        {"strategy": "in flight", "callbacks": [_Act({1: 3}, _stop)]},
        [AT(0, "launch"), AT(1, "validation"), "trainer.should_stop was set on worker 1 alone"],
    ),
    "a stop after an epoch": (
        {"callbacks": [_Act({0: 8}, _stop)]},
        [AT(0, "training end"), AT(1, "sync"), "trainer.should_stop was set on worker 0 alone"],
    ),
    "the rest of an epoch": (
        {"module": _SkipsOnOne, "limit_val_batches": 0},
        [AT(0, "sync"), AT(1, "epoch end")],
    ),
    "a validation": (
        {"by_rank": [{}, {"check_val_every_n_epoch": 2}]},
        [AT(0, "validation"), AT(1, "epoch end"), "must validate together"],
    ),
    "the first validation": (
        {"by_rank": [{}, {"limit_val_batches": 0}]},
        [AT(0, "collective in a validation"), AT(1, "collective between batches"), "must validate together"],
    ),
    "a callback": (
        {"by_rank": [{"callbacks": [ModelCheckpoint(".")]}, {}]},
        ["disagree on the collective and its tensors"],
    ),
    "an average of weights": (
        {"by_rank": [{"callbacks": [EMAWeightAveraging()]}, {}]},
        [AT(0, "collective in a validation"), AT(1, "evaluation of the workers' mean")],
    ),
    "a metric": (
        {"module": _LogsOnOne},
        [AT(0, "collective within a batch"), AT(1, "sync"), "must be logged on all workers"],
    ),
    "a metric of a validation": (
        {"module": _ValidationLogsOnOne},
        ["must be logged on all workers"],
    ),
    "shapes of tensors": (
        {"module": _GathersUnequal},
        ["disagree on the collective and its tensors", "tensors of one shape"],
    ),
    "the rate that H follows": (
        {"module": _Plateau, "strategy": "qsr", "epochs": 9},
        ["The learning rate is 0.1 on worker 0 and 1 on worker 1", "ReduceLROnPlateau"],
    ),
}


def _part(rank, folder, arguments):
    options = {**arguments, **arguments.get("by_rank", [{}, {}])[rank]}
    name, _ = options.pop("strategy", "local sgd"), options.pop("by_rank", None)
    make = partial(LocalSGD, QSR(0.5, 4)) if name == "qsr" else STRATEGIES[name]
    os.chdir(folder)
    with pytest.raises(DisagreementError) as error:
        _fit(rank, make(timeout=timedelta(seconds=30)), [8, 8], stream=False, **options)
    return str(error.value)


@pytest.fixture(scope="module")
def parted(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("parted"))
    cases = {name: (folder, arguments) for name, (arguments, _) in PARTED.items()}
    return run_cases(_part, 2, cases, connect=False)


@pytest.mark.parametrize("name", PARTED)
def test_what_only_one_worker_does_is_an_error_that_names_it(name, parted):
    for said in parted[name]:
        assert all(text in said for text in PARTED[name][1]), said


def _one_stops(rank):
    """The second is told so in its second epoch; validation loaders are asked for when one is out of data."""
    strategy, stop = LocalSGD(local_steps=4, worker_speeds=[1, 2]), _Act({1: 11}, _stop)
    options = {"num_sanity_val_steps": 0, "reload_dataloaders_every_n_epochs": 1}
    module, run, _ = _fit(rank, strategy, [3, 8], epochs=9, callbacks=[stop], **options)
    return module.weight.tolist(), run.current_epoch


def test_unequal_workers_stop_together_where_one_is_told_to():
    assert run_workers(_one_stops, 2, connect=False) == [([-3.0, -5.5], 2)] * 2


def test_lightning_cli(tmp_path):
    config = """
            trainer:
              accelerator: cpu
              logger: false
              strategy:
                class_path: lightning_lopt.LOSCAR
                init_args: {local_steps: 48, worker_speeds: SPEEDS}
            """
    for text, speeds in (("[3, 1]", [3.0, 1.0]), ("measured", "measured")):
        assert cli_trainer(tmp_path, config.replace("SPEEDS", text)).strategy._worker_speeds == speeds


def test_wrong_speeds():
    with pytest.raises(ValueError, match="worker_speeds must be"):
        LocalSGD(worker_speeds="fast")
