"""Damaged checkpoint files are refused, whatever is wrong with them."""

from __future__ import annotations

import random

import pytest
import torch

from lightning_lopt import CheckpointError, SlowMo
from lightning_lopt.strategies.checkpoint.atomic import AtomicCheckpointIO
from tests.strategies.support import Classifier, damaged, loader, trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "whole.ckpt"
    run = trainer(SlowMo(4, process_group_backend="gloo"), 1, max_epochs=1)
    run.fit(Classifier(seed=0), loader(24))
    run.save_checkpoint(path)
    return path


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def test_no_damaged_checkpoint_is_ever_loaded(saved, tmp_path):
    """400 files, cut off, extended, or with a bit or a stretch of bytes changed: an error, or what was saved."""
    io, whole, path = AtomicCheckpointIO(), saved.read_bytes(), tmp_path / "damaged.ckpt"
    expected, draw, refused = io.load_checkpoint(saved, weights_only=True), random.Random(0), 0
    for i in range(400):
        path.write_bytes(damaged(whole, i, draw))
        try:
            loaded = io.load_checkpoint(path, weights_only=True)
        except CheckpointError:
            refused += 1
        else:
            assert _equal(loaded, expected)  # between the entries there is padding
    assert refused > 200


def test_a_tensor_that_became_a_folder_is_refused(tmp_path):
    """One bit of the table of contents, which no checksum covers; torch would read nothing in the tensor's place."""
    io, path = AtomicCheckpointIO(), tmp_path / "damaged.ckpt"
    io.save_checkpoint({"a": torch.arange(4)}, path)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\1\2", 0, data.rindex(b"/data/0"))
    data[entry + 38] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="data/0 is not as it was written"):
        io.load_checkpoint(path)


@pytest.mark.parametrize("data", [b"", b"PK", b"no checkpoint at all"])
def test_other_files_are_refused(data, tmp_path):
    (tmp_path / "other.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match="no checkpoint, or was damaged"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "other.ckpt")


def test_parameters_of_another_shape_are_refused(saved, tmp_path):
    state = torch.load(saved, weights_only=True)
    anchors = state["lightning_lopt"]["rounds"]["sync"]["anchors"]
    anchors[0] = anchors[0].T.clone()
    torch.save(state, tmp_path / "other.ckpt")
    run = trainer(SlowMo(4, process_group_backend="gloo"), 1, max_epochs=2)
    with pytest.raises(ValueError, match="parameter 0 has the shape"):
        run.fit(Classifier(seed=0), loader(24), ckpt_path=tmp_path / "other.ckpt")
