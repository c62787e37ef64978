"""The command line of the benchmarks, as a user calls it from the root of a clone."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from examples.benchmarks import __main__ as bench
from tests.processes import run_command

ROOT = Path(__file__).resolve().parents[3]


def test_a_command_starts_its_workers(tmp_path):
    path = tmp_path / "overhead.json"
    sizes = ["--num-workers", "2", "--local-steps", "2", "--rounds", "1", "--json", str(path)]
    command = [sys.executable, "-m", "examples.benchmarks", "overhead", *sizes]
    printed, _ = run_command(command, 240, {"GLOO_SOCKET_IFNAME": "lo"}, ROOT)
    assert "K = 2, H = 2" in printed
    assert len(json.loads(path.read_text())["milliseconds_per_round"]["sync"]) == 1


@pytest.mark.parametrize("command", bench.COMMANDS)
def test_every_command_has_a_summary(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit, match="0"):
        bench.main([command, "--help"])
    printed = capsys.readouterr().out
    assert f"python -m examples.benchmarks {command}" in printed
    assert bench.COMMANDS[command].__doc__.splitlines()[0] in printed


def test_the_help_has_choices_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit, match="0"):
        bench.main(["heldout", "--help"])
    printed = capsys.readouterr().out
    assert "of 'constant', 'decaying'; default: 'constant', 'decaying'" in printed
    assert "threads of torch; default: 1" in printed


def test_an_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit):
        bench.main(["nothing"])
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot", "nowhere.jsonl"], "No such file or directory: 'nowhere.jsonl'"),
        (["run", "rows.jsonl", "--seeds", "0", "0"], "repeats a seed"),
        (["run", "rows.jsonl", "--task", "cifar10", "--data", "."], "There is no train\\*.parquet under \\."),
        (["run", "rows.jsonl", "--task", "cifar10"], "There is no train\\*.parquet without --data: point --data"),
        (["run", "rows.jsonl", "--methods", "learned", "--network", "nowhere"], "nowhere"),
        (["finetune", "rows.jsonl", "--model", "./nowhere", "--data", "."], "--model ./nowhere could not be read"),
        (["qsr", "rows.jsonl", "--data", "nowhere"], "There is no t10k-images-idx3-ubyte.gz under nowhere"),
        (["outer-step", "--model", "nowhere"], "Unknown model nowhere"),
    ],
)
def test_wrong_arguments_end_in_a_message(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(bench.__file__, run_name="__main__")
