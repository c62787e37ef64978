"""The published comparison: which settings go on, and that a second start runs nothing twice."""

from __future__ import annotations

import gzip
import json
import re

import numpy as np
import pytest

from examples.benchmarks import __main__ as bench
from examples.benchmarks.compare import paper


@pytest.fixture
def data(tmp_path):
    """Small files of Fashion-MNIST's layout."""
    numbers = np.random.default_rng(0)
    for split, count in (("train", 300), ("t10k", 200)):
        for part, array in {
            "images-idx3": numbers.integers(0, 256, (count, 28, 28)),
            "labels-idx1": numbers.permutation(np.arange(count) % 10),
        }.items():
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            content = gzip.compress(header + array.astype(np.uint8).tobytes())
            (tmp_path / f"{split}-{part}-ubyte.gz").write_bytes(content)
    return tmp_path


def test_grids_are_halved_and_done_runs_reused(data, capsys):
    out = data / "paper.jsonl"
    command = ["paper", str(out), "--task", "fashion_mnist_8x8", "--data", str(data), "--threads", "1"]
    command += ["--num-workers", "2", "--local-steps", "2", "--rounds", "10", "--local-lr", "1e30", "0.1"]
    command += ["--methods", "local_sgd", "diloco", "--shares", "0.2", "0.5", "1", "--keep", "8", "4"]
    command += ["--tuning-seeds", "7", "8", "--seeds", "0", "1", "--networks"]
    bench.main([*command, "default"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = {}
    for row in rows:
        found.setdefault((row["stage"], row["method"]), []).append(row)
    sizes = {key: (len(runs), {len(row["losses"]) - 1 for row in runs}) for key, runs in found.items()}
    assert sizes == {
        ("last rung", "local_sgd"): (4, {10}),  # so few that all take all rounds
        ("rung 0", "diloco"): (60, {2}),
        ("rung 1", "diloco"): (8, {5}),
        ("last rung", "diloco"): (8, {10}),
        ("final", "local_sgd"): (2, {10}),
        ("final", "diloco"): (2, {10}),
        ("final", "learned"): (2, {10}),
    }
    assert {row["local_lr"] for row in found["rung 1", "diloco"]} == {0.1}  # the others diverged
    best = paper.ranked(found["last rung", "diloco"])[0]
    assert all(paper.setting_of(row) == best for row in found["final", "diloco"])
    assert all(
        len(row["test_losses"]) == 11 and row["test_losses"] != row["losses"] for row in found["final", "diloco"]
    )

    bench.main([*command, "default", "--seeds", "0", "1", "2"])
    added = [json.loads(line) for line in out.read_text().splitlines()][len(rows) :]
    assert [(row["method"], row["seed"]) for row in added] == [("local_sgd", 2), ("diloco", 2), ("learned", 2)]

    rows += added
    bench.main([*command, "default", "lopt_a_short"])
    added = [json.loads(line) for line in out.read_text().splitlines()][len(rows) :]
    assert [(row["method"], row["network"], row["seed"]) for row in added] == [
        ("learned", "lopt_a_short", 0),
        ("learned", "lopt_a_short", 1),
    ]
    table = capsys.readouterr().out
    assert "test 10" in table
    assert re.search(r"^lopt_a_short +gamma 0.5 ", table, re.MULTILINE)


def test_the_seeds_of_the_result_are_fresh(tmp_path):
    with pytest.raises(ValueError, match=r"must be fresh, but \[1000\]"):
        bench.main(["paper", str(tmp_path / "x"), "--seeds", "0", "1000"])


def test_other_tasks_have_no_test_data(tmp_path):
    with pytest.raises(ValueError, match="There is no test data of 'digits'"):
        bench.main(["paper", str(tmp_path / "x"), "--task", "digits"])
