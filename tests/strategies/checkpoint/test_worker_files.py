"""Parts of a checkpoint: files that are damaged or somebody else's, and the mean of several."""

from __future__ import annotations

import os
import random
import shutil
from fractions import Fraction

import pytest
import torch

from lightning_lopt import CheckpointError, LocalSGD
from lightning_lopt.strategies.checkpoint.atomic import AtomicCheckpointIO
from lightning_lopt.strategies.checkpoint.mean import mean_part
from lightning_lopt.strategies.checkpoint.worker_files import load_part, part_file, remove_parts
from tests.strategies.support import damaged, trainer

TOKENS = ["first", "second"]


def _part(params, states=(), **local):
    state = {"state": dict(enumerate(states)), "param_groups": []}
    return {
        "checkpoint": {"optimizer_states": [state], "loops": {}},
        "local": {"sync": {"params": params, **local}},
        "random": {},
        "gradients": {},
        "loaders": [{"consumed": 6, "start": {}, "generators": []}, None],
    }


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints of two workers; the second one's path."""
    for token in TOKENS:
        for rank in range(2):
            part = {"token": token, "rank": rank, **_part([torch.randn(50)])}
            AtomicCheckpointIO().save_checkpoint(part, part_file(tmp_path / "a.ckpt", token, rank))
    return tmp_path / "a.ckpt"


def _load(path, token="second", rank=1):
    return load_part(AtomicCheckpointIO(), path, token, rank, weights_only=True)


def test_no_damaged_file_is_ever_loaded(saved):
    """200 files, cut off or extended, or with a bit or a stretch of bytes changed: an error, or what was saved."""
    file = part_file(saved, "second", 1)
    with open(file, "rb") as opened:
        whole = opened.read()
    expected, draw, refused = _load(saved)["local"]["sync"]["params"][0], random.Random(0), 0
    for i in range(200):
        with open(file, "wb") as opened:
            opened.write(damaged(whole, i, draw))
        try:
            loaded = _load(saved)
        except CheckpointError:
            refused += 1
        else:
            assert torch.equal(loaded["local"]["sync"]["params"][0], expected)  # between the entries there is padding
    assert refused > 100


@pytest.mark.parametrize(("token", "rank"), [("second", 0), ("first", 1), ("first", 0)])
def test_the_file_of_another_worker_or_step_is_refused(saved, token, rank):
    shutil.copy(part_file(saved, token, rank), part_file(saved, "second", 1))
    with pytest.raises(CheckpointError, match="another worker's file, or of another checkpoint"):
        _load(saved)


def test_other_files_are_refused(saved, tmp_path):
    torch.save({"state_dict": {}}, part_file(saved, "second", 1))  # a checkpoint, but no part of one
    with pytest.raises(CheckpointError, match="another worker's file"):
        _load(saved)
    torch.save([1, 2], part_file(saved, "second", 1))
    with pytest.raises(CheckpointError, match="another worker's file"):
        _load(saved)
    with pytest.raises(CheckpointError, match=r"third.worker00001 is missing"):
        _load(saved, "third")


def _written(folder, tokens, number):
    """The parts of a checkpoint that was written once per token, by that many processes, and of two others."""
    path, others = folder / "a[0].ckpt", (folder / "a[0].ckpt.b", folder / "a[0].ckptc")
    for at, token in enumerate(tokens):
        for rank in range(number):
            file = part_file(path, token, rank)
            torch.save({}, file)
            os.utime(file, (at, at))
    for other in others:
        torch.save({}, part_file(other, "first", 0))
    return path, {os.path.basename(part_file(other, "first", 0)) for other in others}


def test_all_parts_of_a_deleted_checkpoint_are_deleted(tmp_path):
    """It was written by four processes, and there is one now."""
    path, others = _written(tmp_path, TOKENS, 4)
    trainer(LocalSGD(4), 1).strategy.remove_checkpoint(path)
    assert {file.name for file in tmp_path.iterdir()} == others


def test_the_last_parts_of_an_overwritten_checkpoint_stay(tmp_path):
    """Three times by four processes, and then twice by two, the second of which deletes its share."""
    path, others = _written(tmp_path, ["one", "two", "three"], 4)
    left = []
    for at, token in ((3, "four"), (4, "five")):
        for rank in range(2):
            torch.save({}, part_file(path, token, rank))
            os.utime(part_file(path, token, rank), (at, at))
        remove_parts(AtomicCheckpointIO(), path, keep=2, share=(1, 2))
        left.append({file.name.removeprefix("a[0].ckpt.") for file in tmp_path.glob("*.worker0000[13]")})
    assert left[0] == {"three.worker00001", "three.worker00003", "four.worker00001"}
    assert left[1] == {"four.worker00001", "five.worker00001"}
    first = {f"a[0].ckpt.{token}.worker{rank:05d}" for token in ("one", "two", "three") for rank in (0, 2)}
    assert first | others <= {file.name for file in tmp_path.iterdir()}


def _adam(x, step):
    return {"exp_avg": torch.tensor([x]), "step": torch.tensor(step)}


def test_the_mean_of_workers():
    parts = [
        _part([torch.tensor([x]), None], [_adam(x, step)], residuals=[torch.tensor([3 * x])])
        for x, step in ((1.0, 4.0), (2.0, 4.0), (6.0, 7.0))
    ]
    mean = mean_part(parts, Fraction(len(parts), 2))
    assert mean["local"]["sync"] == {
        "params": [torch.tensor([3.0]), None],
        "residuals": [torch.tensor([9.0])],
        "exchange": None,
    }
    assert mean["checkpoint"]["optimizer_states"][0]["state"] == {0: _adam(3.0, 5.0)}
    loader = {"consumed": 6, "batch_ratio": Fraction(3, 2), "start": None, "generators": []}
    assert mean["loaders"] == [loader, None]  # the loader goes to 9
    assert mean["random"] is None


def test_workers_that_diverged_are_not_in_the_mean():
    values = (float("nan"), 1.0, float("inf"), 3.0)
    parts = [_part([torch.tensor([x])], [_adam(abs(x), 4.0)]) for x in values]
    mean = mean_part(parts, Fraction(len(parts), 2))
    assert mean["local"]["sync"]["params"] == [torch.tensor([2.0])]
    assert mean["checkpoint"]["optimizer_states"][0]["state"] == {0: _adam(2.0, 4.0)}
    gone = mean_part([_part([torch.tensor([x])]) for x in (float("nan"), float("inf"))], Fraction(1))
    assert not gone["local"]["sync"]["params"][0].isfinite()  # the next round leaves out all, and keeps the anchor


def test_states_that_cannot_be_averaged_are_the_first_workers():
    history = {"old_dirs": [torch.ones(1)], "d": torch.ones(1)}
    codes = {"codes": torch.ones(1, dtype=torch.uint8), "scale": torch.ones(1)}
    buffer = {"momentum_buffer": torch.ones(1)}
    parts = [_part([], [history, codes, {}]), _part([], [{"old_dirs": [], "d": 3 * torch.ones(1)}, codes, buffer])]
    states = mean_part(parts, Fraction(len(parts)))["checkpoint"]["optimizer_states"][0]["state"]
    assert states == {0: history, 1: codes, 2: {}}
    parts[0]["checkpoint"]["optimizer_states"][0]["state"].pop(2)  # an optimizer without a state for it
    states = mean_part(parts, Fraction(len(parts)))["checkpoint"]["optimizer_states"][0]["state"]
    assert states[2] == buffer
