"""The list of held-out tasks is that of the protocol; runs are paired by seed, and not repeated."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from examples.benchmarks import __main__ as bench
from examples.benchmarks.compare import heldout
from lightning_lopt import Controller
from lightning_lopt.functional.blended import BLEND, LR, MOMENTUM


@pytest.mark.parametrize("name", heldout.HELD_OUT)
def test_a_list_covers_what_users_differ_in(name):
    tasks = heldout.HELD_OUT[name]
    others = {each.task for other in heldout.HELD_OUT.keys() - {name} for each in heldout.HELD_OUT[other]}
    assert len({each.task for each in tasks} - others) == len(tasks) == 10
    kinds = Counter(each.optimizer for each in tasks)
    assert kinds.keys() == {"sgd", "momentum", "adamw", "muon"}
    assert min(kinds.values()) >= 2
    assert {min(each.local_steps for each in tasks), max(each.local_steps for each in tasks)} == {4, 64}
    assert {min(each.num_workers for each in tasks), max(each.num_workers for each in tasks)} == {2, 16}


def test_constants_are_the_settings_at_mean_inputs():
    controller = Controller()
    controller.low.fill_(1.0)
    controller.high.fill_(3.0)
    with torch.no_grad():
        controller.weight[:, 0] = 0.1
        controller.bias.fill_(-0.2)
    found = heldout.constants(controller)
    assert found["lr"] == pytest.approx(LR)
    assert found["momentum"] == pytest.approx(MOMENTUM)
    assert found["blend"] == pytest.approx(BLEND)


def test_ratios_are_paired_by_seed():
    common = {"task": "friedman", "schedule": "decaying", "max_loss": 3.0}
    finals = {"base_step": {0: 1.0, 1: 2.0, 2: 9.0, 3: 1.0}, "learned": {0: math.e, 1: 2.0, 2: math.nan}}
    rows = [
        {**common, "name": name, "seed": seed, "losses": [loss] * 6}
        for name, own in finals.items()
        for seed, loss in own.items()
    ]
    of_task, of_all = heldout.summary(rows, "base_step")
    assert of_task["decaying"] == "+0.333 ± 1.434"  # 1, 0 and, both at the loss of a diverged run, 0
    assert (of_task["decaying, seeds"], of_task["constant"]) == (3, None)
    assert of_all["task"] == "mean of 1 tasks"
    with pytest.raises(ValueError, match="no run of diloco"):
        heldout.summary(rows, "diloco")


def test_runs_are_not_repeated(tmp_path, monkeypatch, capsys):
    tasks = [replace(each, num_rounds=2, local_steps=2) for each in heldout.HELD_OUT["first"]]
    monkeypatch.setattr(heldout, "HELD_OUT", {"second": [each for each in tasks if each.task == "breast_cancer"]})
    out = tmp_path / "rows.jsonl"
    for seeds in (["0"], ["0", "1"]):
        bench.main(
            ["heldout", str(out), "--data", str(tmp_path), "--methods", "base_step", "its constants", "--seeds", *seeds]
        )
    assert len(out.read_text().splitlines()) == 2 * 2 * 2
    printed = capsys.readouterr().out
    assert "breast_cancer, decaying: its constants, 1 seeds" in printed
    assert "mean of 1 tasks" in printed


def test_searched_settings_are_run(tmp_path, monkeypatch):
    tasks = [replace(each, num_rounds=2, local_steps=2) for each in heldout.HELD_OUT["first"]]
    monkeypatch.setattr(heldout, "HELD_OUT", {"second": [each for each in tasks if each.task == "breast_cancer"]})
    out = tmp_path / "rows.jsonl"
    command = ["heldout", str(out), "--data", str(tmp_path), "--seeds", "0", "--methods", "base_step", "searched"]
    with pytest.raises(ValueError, match="needs its --settings LR MOMENTUM"):
        bench.main(command)
    for settings, equal in (([LR, MOMENTUM, *BLEND], True), ([0.5, 0.6, 1, 0, 0], False)):
        out.unlink(missing_ok=True)
        bench.main([*command, "--settings", *map(str, settings)])
        losses = {
            (row["schedule"], row["name"]): row["losses"] for row in map(json.loads, out.read_text().splitlines())
        }
        assert (losses["decaying", "searched"] == losses["decaying", "base_step"]) is equal
