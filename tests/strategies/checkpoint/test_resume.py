"""Checkpoints: a run that was stopped anywhere goes on bitwise as if it had not been."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import pickle
import warnings
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader, DistributedSampler, WeightedRandomSampler

import lightning_lopt.strategies.checkpoint.writing as checkpoint_module
from lightning_lopt import LOSCAR, QSR, AdaMLP, DiLoCo, Fragments, LearnedLocalSGD, LocalSGD, PowerSGD, SlowMo, TopK
from lightning_lopt.strategies import host
from lightning_lopt.strategies.checkpoint.atomic import AtomicCheckpointIO
from lightning_lopt.strategies.loaders import ResumableLoaders
from tests.processes import run_workers
from tests.strategies.support import Classifier, flat, loader, trainer
from tests.strategies.test_models import Accumulates, Gan
from tests.sync_support import WhileDriftIsSmall


class Trace(pl.Callback):
    """What every step did on this worker."""

    def __init__(self) -> None:
        self.steps: dict[int, tuple[float, float, int]] = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        rounds = trainer.strategy.rounds
        key = trainer.fit_loop.epoch_loop.total_batch_idx
        self.steps[key] = (outputs["loss"].item(), module.trainer.callback_metrics["train_loss"], rounds.round_idx)


class SaveEverywhere(pl.Callback):
    """Save wherever users do, in the middle of accumulating gradients too."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def _save(self, trainer, where):
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        trainer.save_checkpoint(self.folder / f"{batches:02d}_{where}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        self._save(trainer, "batch")

    def on_validation_end(self, trainer, *_):
        if not trainer.sanity_checking:
            self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self._save(trainer, "epoch")


class CountingLoader:
    """A loader with a state of its own, which differs between workers."""

    def __init__(self, batches: int = 6) -> None:
        self.batches, self.done, self.epoch = batches, 0, 0

    def __len__(self):
        return self.batches

    def __iter__(self):
        rank = torch.distributed.get_rank()
        if self.done == self.batches:
            self.done, self.epoch = 0, self.epoch + 1
        while self.done < self.batches:
            seed = torch.Generator().manual_seed(1000 * rank + 100 * self.epoch + self.done)
            x = torch.randn(4, 6, generator=seed)
            self.done += 1
            yield x, x[:, :3].argmax(1)

    def state_dict(self):
        return {"done": self.done, "epoch": self.epoch, "rank": torch.distributed.get_rank()}

    def load_state_dict(self, state):
        assert state.pop("rank") == torch.distributed.get_rank()
        self.done, self.epoch = state["done"], state["epoch"]


class TwoLoaders(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch["long"], batch_idx) + super().training_step(batch["short"], batch_idx)
        return loss


class OneCycle(Classifier):
    """Its schedule asks the Trainer for the number of steps, which sets up the data before anything is restored."""

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _from_every_step(rank, make, options, data, folder):
    """Train to the end, saving at every step; then again from each of the checkpoints."""
    devices = options.pop("devices", 2)
    multiprocessing.current_process()._config["daemon"] = False  # loaders may start processes
    everywhere = options.pop("everywhere", False)
    make_module = options.pop("module", Classifier)
    options = {"max_epochs": 2, **options}

    def run(ckpt_path, callbacks):
        pl.seed_everything(3, verbose=False)
        trace = Trace()
        run = trainer(
            make(),
            devices,
            callbacks=[trace, *callbacks],
            enable_checkpointing=bool(callbacks and not everywhere),
            **options,
        )
        module = make_module(seed=0, dropout=0.3)
        run.fit(module, data(), loader(24, shuffle=False), ckpt_path=ckpt_path)
        return flat(module), trace.steps, run.strategy.rounds.round_idx, run.global_step

    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    saving = SaveEverywhere(folder) if everywhere else saving
    weights, steps, *counts = run(None, [saving])
    failed = []
    paths = sorted(Path(folder).glob("*.ckpt"))
    for path in paths:
        again, again_steps, *again_counts = run(str(path), [])
        same_steps = all(steps[i] == value for i, value in again_steps.items())
        if not (torch.equal(weights, again) and same_steps and counts == again_counts):
            failed.append((path.stem, torch.equal(weights, again), same_steps, counts == again_counts))
    return failed, len(paths), len(steps)


def _loader_processes():
    return DataLoader(loader(48).dataset, batch_size=4, shuffle=True, num_workers=1)


def _two_loaders():
    return {"long": loader(56), "short": loader(24)}


def _weighted():
    data = loader(48).dataset
    return DataLoader(data, batch_size=4, sampler=WeightedRandomSampler(torch.linspace(1, 2, 48), 48))


def _own_generator():
    return DataLoader(loader(48).dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(5))


def _listening(**options):
    return LocalSGD(WhileDriftIsSmall(0.6, local_steps=1), **options)


short = partial(loader, 48)  # 6 batches per epoch on 2 workers
EVERY_STEP = {
    "average": (partial(LocalSGD, 4), {}, short),
    "momentum": (partial(SlowMo, 4), {"val_check_interval": 3}, short),
    "nesterov": (partial(DiLoCo, 4), {"max_steps": 11, "max_epochs": -1}, short),
    "learned": (partial(LearnedLocalSGD, 3, network=AdaMLP(seed=0)), {}, short),
    "schedule": (partial(LocalSGD, QSR(alpha=0.142, base_steps=1)), {}, short),
    "schedule that listens": (_listening, {"everywhere": True}, short),
    "accumulate": (partial(SlowMo, 2), {"accumulate_grad_batches": 2, "max_epochs": 3}, partial(loader, 56)),
    "everywhere": (partial(SlowMo, 4), {"val_check_interval": 2, "everywhere": True, "max_epochs": 3}, short),
    "everywhere, by steps": (partial(SlowMo, 4), {"max_steps": 17, "max_epochs": -1, "everywhere": True}, short),
    "everywhere, unvalidated": (
        partial(SlowMo, 4),
        {"limit_val_batches": 0, "everywhere": True, "max_epochs": 3},
        short,
    ),
    "everywhere, by steps, unvalidated": (
        partial(SlowMo, 4),
        {"limit_val_batches": 0, "max_steps": 17, "max_epochs": -1, "everywhere": True},
        short,
    ),
    "epochs that end unvalidated": (partial(SlowMo, 4), {"val_check_interval": 4, "everywhere": True}, short),
    "every other epoch is validated": (
        partial(SlowMo, 4),
        {"check_val_every_n_epoch": 2, "everywhere": True, "max_epochs": 4},
        short,
    ),
    "new loaders in every epoch": (
        partial(SlowMo, 4),
        {"reload_dataloaders_every_n_epochs": 1, "everywhere": True, "max_epochs": 4},
        short,
    ),
    "the same loader in every epoch": (
        partial(SlowMo, 4),
        {"reload_dataloaders_every_n_epochs": 1, "use_distributed_sampler": False, "max_epochs": 4},
        partial(loader, 24),
    ),
    "mid-accumulation": (partial(SlowMo, 2), {"accumulate_grad_batches": 3, "everywhere": True}, partial(loader, 56)),
    "two loaders": (partial(SlowMo, 4), {"module": TwoLoaders}, _two_loaders),
    "stateful loader": (partial(SlowMo, 4), {}, CountingLoader),
    "two optimizers by hand": (partial(SlowMo, 4), {"module": Gan}, short),
    "accumulation by hand": (partial(SlowMo, 2), {"module": Accumulates, "everywhere": True}, short),
    "coordinates in flight": (partial(LOSCAR, 4, overlap_steps=2, density=0.3), {"everywhere": True}, short),
    "learned in flight": (partial(LearnedLocalSGD, 4, network=AdaMLP(seed=0), overlap_steps=2), {}, short),
    "residuals": (partial(SlowMo, 3, compression=TopK(0.2), local_state="average"), {}, short),
    "residuals in flight": (
        partial(LocalSGD, 4, compression="int8", overlap_steps=1),
        {"val_check_interval": 3},
        short,
    ),
    "fragments": (partial(DiLoCo, 4, selection=Fragments(2)), {}, short),
    "sharded": (partial(LearnedLocalSGD, 4, network=AdaMLP(seed=0), sharded=True), {}, short),
    "sharded LAgg-A": (partial(LearnedLocalSGD, 4, network=AdaMLP(inputs=2, seed=0), sharded=True), {}, short),
    "limited": (partial(SlowMo, 4), {"limit_train_batches": 5}, short),
    "loader processes": (partial(SlowMo, 4), {}, _loader_processes),
    "schedule of the whole run": (partial(SlowMo, 4), {"module": OneCycle, "everywhere": True}, short),
    "schedule of the whole run, loader processes": (partial(SlowMo, 4), {"module": OneCycle}, _loader_processes),
    "schedule of the whole run, stateful loader": (partial(SlowMo, 4), {"module": OneCycle}, CountingLoader),
    "own sampler": (partial(SlowMo, 4), {"use_distributed_sampler": False, "limit_train_batches": 6}, _weighted),
    "own generator": (partial(SlowMo, 4), {"use_distributed_sampler": False, "limit_train_batches": 6}, _own_generator),
    "one worker": (partial(SlowMo, 4), {"devices": 1}, partial(loader, 24)),
}


@pytest.mark.parametrize("name", EVERY_STEP)
def test_resume_is_bitwise_from_every_step(name, tmp_path):
    make, options, data = EVERY_STEP[name]
    devices = options.get("devices", 2)
    for failed, checkpoints, batches in run_workers(
        _from_every_step, devices, make, dict(options), data, str(tmp_path), connect=False
    ):
        assert not failed
        assert checkpoints > 5
        assert batches > 8


class Interrupt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise InterruptedError


def _chain(rank, stride, folder):
    """Three epochs at once, and the same in pieces, each resumed from the piece before."""
    traces = []
    for halts, name in ([-1], "whole"), ([*range(stride, 18, stride), -1], "pieces"):
        trace = Trace()
        traces.append(trace.steps)
        for halt in halts:
            pl.seed_everything(11, verbose=False)
            saving = ModelCheckpoint(f"{folder}/{name}", "{step}", every_n_train_steps=1, save_last=True)
            options = {"max_epochs": 3, "val_check_interval": 0.5, "enable_checkpointing": True}
            run = trainer(SlowMo(4), callbacks=[trace, Interrupt(halt), saving], **options)
            module = Classifier(seed=0, dropout=0.3)
            with contextlib.suppress(InterruptedError):
                run.fit(module, short(), loader(16, shuffle=False), ckpt_path="last")
    return traces


@pytest.mark.parametrize("stride", [1, 4, 6])
def test_checkpoints_of_resumed_runs_are_as_good(stride, tmp_path):
    for whole, pieces in run_workers(_chain, 2, stride, str(tmp_path), connect=False):
        assert len(whole) == 18
        assert pieces == whole


def _in_files(rank, folder, ckpt_path):
    """A small model whose workers' parts are taken for too large to gather."""
    checkpoint_module.GATHER_BYTES = 0
    saving = ModelCheckpoint(
        folder, "{step}", every_n_train_steps=2, save_top_k=2, monitor="step", mode="max", save_last="link"
    )
    latest = ModelCheckpoint(folder, "latest[0]", every_n_train_steps=3, enable_version_counter=False)
    run = trainer(SlowMo(4), max_epochs=2, enable_checkpointing=True, callbacks=[saving, latest])
    pl.seed_everything(3, verbose=False)
    module = Classifier(seed=0, dropout=0.3)
    run.fit(module, short(), ckpt_path=ckpt_path)
    return flat(module)


def test_large_parts_lie_in_files_beside_the_checkpoint(tmp_path):
    whole, *_ = run_workers(_in_files, 2, str(tmp_path / "a"), None, connect=False)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    kept = [name for name in names if name.endswith(".ckpt")]
    assert kept == ["last.ckpt", "latest[0].ckpt", "step=10.ckpt", "step=12.ckpt"]
    parts = [name for name in names if name not in kept]
    assert all(name.split(".ckpt.")[0] + ".ckpt" in kept for name in parts)  # those of deleted checkpoints are gone
    assert sum(name.startswith("step=10.ckpt.") for name in parts) == 2
    assert sum(name.startswith("latest[0].ckpt.") for name in parts) == 4  # overwritten: the last two sets
    saved = torch.load(tmp_path / "a" / "step=10.ckpt", weights_only=True)
    assert saved["lightning_lopt"]["parts"] is None
    assert saved["optimizer_states"]  # one worker's, for those who load it without this package
    path = tmp_path / "a" / "step=10.ckpt"
    (tmp_path / "a" / "link.ckpt").symlink_to("step=10.ckpt")
    again, *_ = run_workers(_in_files, 2, str(tmp_path / "b"), str(tmp_path / "a" / "link.ckpt"), connect=False)
    assert torch.equal(whole, again)
    (first,), (second,) = (path.parent.glob(f"step=10.ckpt.*.worker{rank:05d}") for rank in range(2))
    (other,) = path.parent.glob("step=12.ckpt.*.worker00001")
    whole = second.read_bytes()
    for damage in (first.read_bytes(), other.read_bytes(), whole[: len(whole) // 2], None):
        second.unlink() if damage is None else second.write_bytes(damage)
        with pytest.raises(
            RuntimeError, match=r"CheckpointError: (Another worker could not .* beside )?/\S*step=10.ckpt"
        ):
            run_workers(_in_files, 2, str(tmp_path / "c"), str(path), connect=False)


class _Sealed(CheckpointIO):
    """Files in a format of its own."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(b"sealed" + pickle.dumps(checkpoint))

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        seal, content = (data := Path(path).read_bytes())[:6], data[6:]
        assert seal == b"sealed", f"{path} has another format."
        return pickle.loads(content)

    def remove_checkpoint(self, path):
        Path(path).unlink()


def _sealed(rank, folder):
    """Two epochs at once, saved after every third step; again from the third checkpoint."""
    checkpoint_module.GATHER_BYTES, weights = 0, []
    for name, ckpt_path in (("a", None), ("b", f"{folder}/a/step=9.ckpt")):
        saving = ModelCheckpoint(f"{folder}/{name}", "{step}", every_n_train_steps=3, save_top_k=-1)
        plugins = [AsyncCheckpointIO(_Sealed())]
        run = trainer(SlowMo(4), max_epochs=2, enable_checkpointing=True, callbacks=[saving], plugins=plugins)
        pl.seed_everything(3, verbose=False)
        module = Classifier(seed=0, dropout=0.3)
        run.fit(module, short(), ckpt_path=ckpt_path)
        run.strategy.remove_checkpoint(f"{folder}/{name}/step=12.ckpt")
        weights.append(flat(module))
    return weights


def test_parts_are_written_read_and_deleted_by_the_users_checkpoint_io(tmp_path):
    for whole, again in run_workers(_sealed, 2, str(tmp_path), connect=False):
        assert torch.equal(whole, again)
    files = list((tmp_path / "a").iterdir())
    assert sorted(file.name.split(".ckpt")[0] for file in files) == sorted(["step=3", "step=6", "step=9"] * 3)
    assert all(file.read_bytes().startswith(b"sealed") for file in files)


class _Killed(BaseException):
    pass


class _DiesWhenPickled:
    def __reduce__(self):
        raise _Killed


def test_a_broken_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)
    with pytest.raises(_Killed):
        io.save_checkpoint({"step": 2, "x": torch.zeros(1000), "y": _DiesWhenPickled()}, path)
    assert io.load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    io.save_checkpoint({"step": 3}, path)
    assert io.load_checkpoint(path) == {"step": 3}


def test_checkpoints_have_the_permissions_of_other_files(tmp_path):
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    (tmp_path / "b").touch()
    assert (tmp_path / "a.ckpt").stat().st_mode == (tmp_path / "b").stat().st_mode


class _AddsFilter(pl.Callback):
    def on_train_batch_start(self, *_):
        warnings.filterwarnings("ignore", "a user's")


def test_a_resume_leaves_the_filters_of_warnings(tmp_path):
    """A loader that goes on where it was needs no warning; filters that others add meanwhile stay."""
    saving = ModelCheckpoint(tmp_path, "a", every_n_train_steps=3, save_top_k=-1)
    run = trainer(LocalSGD(4), 1, max_steps=5, enable_checkpointing=True, callbacks=[saving])
    run.fit(Classifier(seed=0), loader(24))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        run = trainer(LocalSGD(4), 1, max_epochs=1, callbacks=[_AddsFilter()])
        run.fit(Classifier(seed=0), loader(24), ckpt_path=tmp_path / "a.ckpt")
        (_, users, *_), *after = warnings.filters
    assert users.pattern == "a user's"
    assert after == before
    assert run.global_step == 6
    assert not [w for w in caught if "resuming from a checkpoint" in str(w.message)]


def test_changed_settings_of_the_local_optimizer_are_said(tmp_path):
    """The local optimizer's rate is the checkpoint's, with a warning; the outer one's is the script's, with another."""
    said = []
    for i, (lr, strategy) in enumerate([(0.1, SlowMo(4)), (0.1, SlowMo(4)), (0.05, SlowMo(4, outer_lr=0.5))]):
        saving = ModelCheckpoint(tmp_path / str(i), "a", every_n_train_steps=3, save_top_k=-1)
        run = trainer(strategy, 1, max_epochs=1, enable_checkpointing=True, callbacks=[saving])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(Classifier(lr=lr, seed=0), loader(24), ckpt_path=tmp_path / "0" / "a.ckpt" if i else None)
        said.append([str(w.message) for w in caught if "the checkpoint was written: " in str(w.message)])
        said[-1] += [str(w.message) for w in caught if "as in the script" in str(w.message)]
    assert said[:2] == [[], []]
    local, outer = said[2]
    assert "Adam lr of group 0 0.1 -> 0.05, Adam lr of group 1 0.05 -> 0.025. The checkpoint's values hold" in local
    assert "as in the script: outer lr 1.0 -> 0.5." in outer
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5)  # halved by its schedule
    assert [group["lr"] for group in run.strategy.rounds.sync.outer.param_groups] == [0.5, 0.5]


def _continued(rank, folder):
    """One epoch, saved after its final sync, and a second from there; again with two epochs at once."""

    def fit(epochs, ckpt_path):
        pl.seed_everything(3, verbose=False)
        run = trainer(LearnedLocalSGD(4, network=AdaMLP(seed=0)), max_epochs=epochs)
        module = Classifier(seed=0, dropout=0.3)
        run.fit(module, short(), ckpt_path=ckpt_path)
        return run, flat(module)

    first, one_epoch = fit(1, None)
    first.save_checkpoint(f"{folder}/end.ckpt")
    loaded = Classifier.load_from_checkpoint(f"{folder}/end.ckpt")
    again, _ = fit(1, f"{folder}/end.ckpt")  # nothing left to do
    more, weights = fit(3, f"{folder}/end.ckpt")
    rounds = more.strategy.rounds
    return torch.equal(flat(loaded), one_epoch), again.global_step, more.global_step, rounds.round_idx, weights


def test_a_checkpoint_after_the_end_goes_on(tmp_path):
    (*first, weights), (*second, others) = run_workers(_continued, 2, str(tmp_path), connect=False)
    assert first == second == [True, 6, 18, 2 + 3]  # rounds end at 4, 6 | 10, 14, 18
    assert torch.equal(weights, others)


def _other_number(rank, num_workers, make, folder, ckpt_path, gather_bytes=2**27):
    checkpoint_module.GATHER_BYTES = gather_bytes
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(make(), num_workers, max_epochs=2, callbacks=[saving], enable_checkpointing=True)
    module = Classifier(seed=0)
    seen = []

    class Start(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            if not seen:
                rounds = trainer.strategy.rounds
                local = rounds.local_state()
                states = trainer.optimizers[0].state_dict()["state"]
                seen.append(copy.deepcopy((local["sync"], states, rounds.step_idx, rounds.local_step)))

    run.callbacks.insert(0, Start())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, loader(96), ckpt_path=ckpt_path)
    said = [str(w.message) for w in caught if "workers, there are" in str(w.message)]
    return flat(module), said, seen[0], run.strategy.rounds.step_idx


def _mean(trees):
    """Of what several workers have; what is no floating-point tensor is the first one's."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: _mean([tree[key] for tree in trees]) for key in first}
    if isinstance(first, list):
        return [_mean(list(items)) for items in zip(*trees, strict=True)]
    floating = isinstance(first, torch.Tensor) and first.is_floating_point()
    return torch.stack(trees).double().mean(0).to(first.dtype) if floating else first


OTHER_NUMBER = {
    "1": (1, partial(SlowMo, 4), 2**27),
    "2": (2, partial(SlowMo, 4), 2**27),
    "8": (8, partial(SlowMo, 4), 2**27),
    "2, in files": (2, partial(SlowMo, 4), 0),
    "2 virtual": (2, partial(SlowMo, 4, virtual_workers=2), 2**27),
    "2, residuals": (2, partial(SlowMo, 4, compression=PowerSGD(1)), 2**27),
    "2, sharded": (2, partial(LearnedLocalSGD, 4, network=AdaMLP(seed=0), sharded=True), 2**27),
    "8, in flight": (8, partial(LOSCAR, 4, overlap_steps=3, density=0.5), 2**27),
}


@pytest.mark.parametrize("name", OTHER_NUMBER)
def test_another_number_of_workers(name, tmp_path):
    """A run of 4 workers goes on with others from the mean of what they had."""
    num_workers, make, gather_bytes = OTHER_NUMBER[name]
    virtual = make.keywords.get("virtual_workers", 1)
    before = partial(make, virtual_workers=1) if virtual > 1 else make
    run_workers(_other_number, 4, 4, before, str(tmp_path / "a"), None, gather_bytes, connect=False)
    path = tmp_path / "a" / "step=6.ckpt"  # the round has 4 steps
    parts = torch.load(path, weights_only=True)["lightning_lopt"]["parts"]
    if parts is None:
        parts = [torch.load(file, weights_only=True) for file in sorted(path.parent.glob("step=6.ckpt.*.worker*"))]
    local = {**_mean([{**part["local"]["sync"], "exchange": None} for part in parts])}
    states = _mean([part["checkpoint"]["optimizer_states"][0]["state"] for part in parts])
    assert len(parts) == 4
    processes = num_workers // virtual
    results = run_workers(
        _other_number, processes, processes, make, str(tmp_path), str(path), gather_bytes, connect=False
    )
    for weights, _, (start, start_states, step, local_step), steps in results:
        torch.testing.assert_close({**start, "exchange": None}, local, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(start_states, states, rtol=1e-5, atol=1e-9)
        assert torch.equal(weights, results[0][0])
        assert (step, local_step) == (6, 2)
        assert steps > 8
    (said,) = (text for text in results[0][1] if f"holds 4 workers, there are {num_workers} workers now" in text)
    assert ("so is a sync in flight" in said) == name.endswith("in flight")


def _rows_seen(rank, num_workers, folder, ckpt_paths):
    """The rows of each epoch that this worker trains on."""
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen[-1] += [(trainer.current_epoch, x) for x in batch[0][:, 0].tolist()]

    for path in ckpt_paths:
        seen.append([])
        callbacks = [Look(), *([SaveEverywhere(folder)] if path is None else [])]
        run = trainer(SlowMo(4), num_workers, max_epochs=2, callbacks=callbacks)
        pl.seed_everything(3, verbose=False)
        run.fit(Classifier(seed=0), loader(96), loader(8), ckpt_path=path)
    return seen


@pytest.mark.parametrize("num_workers", [1, 2])
def test_another_number_of_workers_sees_the_rest_of_the_epoch(num_workers, tmp_path):
    before = [rows for (rows,) in run_workers(_rows_seen, 4, 4, str(tmp_path), [None], connect=False)]
    paths = sorted(tmp_path.glob("*.ckpt"))
    after = run_workers(_rows_seen, num_workers, num_workers, str(tmp_path), [*map(str, paths)], connect=False)
    assert len(paths) == 12 + 2 + 2  # after each batch, validation, epoch
    for path, *rows in zip(paths, *after, strict=True):
        batches = int(path.stem[:2])
        everything = [row for worker in before for row in worker[: 4 * batches]] + [row for own in rows for row in own]
        assert len(everything) == len(set(everything)) == 2 * 96, path.stem


PLACES = {  # batch sizes and processes before and after, and batches left of 8 where 5 of 8 were done
    "workers of larger batches": ((4, 4), (8, 2), 3),
    "a script with the same batches per rank": ((4, 4), (4, 4), 3),
    "fewer ranks": ((4, 4), (4, 2), 6),
    "larger batches": ((4, 4), (16, 4), 1),
    "hidden from the loader": (None, (16, 4), 0),  # 2 batches, of which 10 were done with twice the workers
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_in_the_data_is_that_of_all_rows(case, monkeypatch):
    """Whatever share of them a batch is now."""
    monkeypatch.setattr(host, "batches_done", lambda trainer: 5)
    monkeypatch.setattr(host, "restarts_short_loaders", lambda trainer: False)
    before, after, left = PLACES[case]

    def loaders(batch_size, replicas):
        own = ResumableLoaders()
        data = DataLoader(range(128), batch_size, sampler=DistributedSampler(range(128), replicas, 0, shuffle=False))
        return own, data

    own, data = loaders(*before or (4, 4))
    own.wrap(data, 0)
    (state,) = own.state_dicts(SimpleNamespace(num_training_batches=8))
    if before is None:
        del state["rows"]
    other, data = loaders(*after)
    list_of_all = list(data)
    other.load_state_dicts([{**state, "batch_ratio": Fraction(2), "start": None}], 0)
    other.wrap(data, 0)
    assert [batch.tolist() for batch in data] == [batch.tolist() for batch in list_of_all][len(list_of_all) - left :]


def test_lagg_with_another_number_of_workers_says_the_way_out(tmp_path):
    make = partial(LearnedLocalSGD, 4, network=AdaMLP(inputs=2, seed=0))
    run_workers(_other_number, 2, 2, make, str(tmp_path), None, connect=False)
    with pytest.raises(RuntimeError, match="weights with inputs='mean', which take any number"):
        run_workers(_other_number, 1, 1, make, str(tmp_path), str(tmp_path / "step=6.ckpt"), connect=False)
