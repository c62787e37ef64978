"""Training over limited links, with a model small enough for a test."""

from __future__ import annotations

import json
import os

import pytest

from examples.benchmarks import __main__ as bench
from examples.benchmarks.wire import namespaces, wire
from examples.benchmarks.wire import worker as wire_worker
from examples.benchmarks.wire.methods import USUAL
from tests.processes import run_workers

SMALL = [
    "--width",
    "48",
    "--depth",
    "2",
    "--local-steps",
    "8",
    "--seconds",
    "2",
    "--ddp-steps",
    "2",
    "--batch-size",
    "4",
]


def _run(path, *options):
    bench.main(["wire", *SMALL, "--out", str(path), "--png", str(path.with_suffix(".png")), *options])
    assert path.with_suffix(".png").exists()
    return wire.read(path)


def _worker(rank, setup):
    os.environ.update(GROUP_RANK=str(rank), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")  # each on a node of its own
    wire_worker.main(setup)


@pytest.fixture
def unlimited(monkeypatch):
    """Pretend that no link can be limited; fork the workers, which spares them the seconds of their imports."""

    def run_local(command, num_workers):
        run_workers(_worker, num_workers, command[-1], connect=False, limit=200)

    monkeypatch.setattr(wire, "why_not", lambda: "nobody may")
    monkeypatch.setattr(wire, "run_local", run_local)


def test_links_are_limited_and_all_methods_train_over_them(tmp_path, capfd):
    if reason := namespaces.why_not():
        pytest.skip(reason)
    setup, measured = _run(tmp_path / "rows.jsonl", "--mbit", "4", "--seconds", "1", "--methods", *USUAL)
    assert not setup.delayed
    assert "DELAYED" not in capfd.readouterr().out
    assert [m.name for m in measured] == USUAL
    by_name = {m.name: m for m in measured}
    transfer = by_name["Local SGD"].link.seconds(by_name["Local SGD"].round.transfer)
    assert 0.4 < transfer < 0.7
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()[1:]]
    assert all(row["transfer_seconds"] > 0.8 * transfer for row in rows if row["method"] == "Local SGD")
    assert by_name["int8"].seconds < by_name["Local SGD"].seconds
    assert by_name["overlap"].hidden > by_name["Local SGD"].hidden == 0
    gains = by_name["Local SGD"].rates([1e9], by_name["DDP"])
    assert gains["10"] > gains["10000"]


def test_without_the_rights_collectives_are_delayed_and_it_says_so(tmp_path, capfd, unlimited):
    setup, measured = _run(tmp_path / "rows.jsonl", "--mbit", "2", "--seconds", "1", "--methods", "DDP", "Local SGD")
    printed = capfd.readouterr().out
    assert "nobody may" in printed
    assert "DELAYED" in printed
    assert setup.delayed
    assert all(m.seconds > m.link.seconds(m.round.transfer) > 0.5 for m in measured)


def test_steps_are_stretched_on_each_worker(tmp_path, unlimited):
    options = ["--mbit", "1000", "--methods", "Local SGD", "--step-seconds", "0.1", "0.3"]
    _, (local,) = _run(tmp_path / "rows.jsonl", *options)
    assert local.seconds == pytest.approx(8 * 0.3, rel=0.2)
    header, *rows = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert header["setup"]["step_seconds"] == [0.1, 0.3]
    assert all(row["step_seconds"] == pytest.approx([0.1, 0.3], rel=0.2) for row in rows)
    assert all(row["waited_seconds"] > 8 * 0.15 for row in rows)  # of worker 0, for the other


def test_unequal_speeds_with_several_seeds(tmp_path, unlimited, capfd):
    methods = ["Local SGD", "Local SGD, paced", "LOSCAR, pace measured"]
    options = ["--mbit", "1000", "--step-seconds", "0.06", "0.18", "--seeds", "0", "1", "--methods", *methods]
    _, (equal, given, measured) = _run(tmp_path / "rows.jsonl", *options, "--seconds", "2.4")
    assert "± last loss" in capfd.readouterr().out
    assert (equal.local_steps, given.local_steps) == ([8, 8], [8, 3])
    assert 0.8 < equal.bound / 1.44 < 1.2
    assert 0.8 < given.bound / 0.54 < 1.2
    assert given.seconds < 0.7 * equal.seconds
    assert measured.seconds < 0.7 * equal.seconds
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()[1:]]
    paced = [row for row in rows if row["method"] == "Local SGD, paced"]
    assert {row["seed"] for row in paced} == {0, 1}
    assert all(row["steps"] == [8, 3] for row in paced)
    first, second = (run.losses for run in given.runs)
    assert first != second


@pytest.mark.processes
def test_paced_methods_must_know_the_speeds(tmp_path):
    with pytest.raises(SystemExit, match="--step-seconds"):
        bench.main(["wire", *SMALL, "--out", str(tmp_path / "rows.jsonl"), "--methods", "LOSCAR, paced"])
