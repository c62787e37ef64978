"""The comparison of QSR with constant numbers of local steps, on a few images."""

from __future__ import annotations

import gzip
import json
import struct

import pytest
import torch

from examples.benchmarks import __main__ as bench
from examples.benchmarks.compare import qsr


def _write(path, tensor):
    header = struct.pack(">HBB", 0, 8, tensor.dim()) + b"".join(struct.pack(">i", n) for n in tensor.shape)
    path.write_bytes(gzip.compress(header + tensor.to(torch.uint8).numpy().tobytes()))


@pytest.fixture
def data(tmp_path):
    for split in ("train", "t10k"):
        _write(tmp_path / f"{split}-images-idx3-ubyte.gz", torch.randint(256, (500, 28, 28)))
        _write(tmp_path / f"{split}-labels-idx1-ubyte.gz", torch.arange(500) % 10)
    return tmp_path


def test_all_schedules_are_run_and_the_rule_syncs_less(data, capfd):
    out = data / "rows.jsonl"
    options = ["--steps", "40", "--batch-size", "4", "--num-batches", "2", "--seeds", "0"]
    bench.main(["qsr", str(out), "--data", str(data), *options])
    rows = {row["schedule"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == list(qsr.SCHEDULES)
    first, _, rule = (rows[name]["syncs"] for name in qsr.SCHEDULES)
    assert first == 10
    assert 1 < rule < 8
    assert all(0 <= row[key] <= 100 for row in rows.values() for key in ("accuracy", "reestimated"))
    assert "QSR" in capfd.readouterr().out


def test_accuracy_counts_hits():
    module = qsr.ConvNet(steps=1)
    images = torch.randint(256, (1000, 28, 28))
    module.eval()
    with torch.no_grad():
        labels = module(images).argmax(1)
    assert module.accuracy(images, labels) == 100
    labels[:250] = (labels[:250] + 1) % 10
    assert module.accuracy(images, labels) == 75
