"""Successive halving keeps the best settings, and its file can be drawn."""

from __future__ import annotations

import json

import pytest

from examples.benchmarks import __main__ as bench

SIZES = ["--num-workers", "2", "--local-steps", "1", "--threads", "1"]


def test_the_best_settings_go_on(tmp_path, capsys):
    out = tmp_path / "tune.jsonl"
    methods = ["--methods", "local_sgd", "diloco", "parallel_adam"]
    options = ["--rounds", "10", "--local-lr", "1e30", "0.5", "--seeds", "0", "1", "--keep", "4", "--best", "2"]
    bench.main(["tune", str(out), *SIZES, *methods, *options])
    stages = {}
    for line in out.read_text().splitlines():
        row = json.loads(line)
        stages.setdefault((row["stage"], row["method"]), []).append(row)
        assert row["group_seconds"] > 0
    counts = {key: len(rows) for key, rows in stages.items()}
    assert counts["first", "diloco"] == 60
    assert ("first", "local_sgd") not in counts  # so few that all take all rounds
    assert counts["second", "local_sgd"] == 2
    assert counts["second", "diloco"] == counts["second", "parallel_adam"] == 4
    assert {len(row["losses"]) for row in stages["first", "diloco"]} == {1 + 3}
    assert {len(row["losses"]) for row in stages["second", "diloco"]} == {1 + 10}
    assert all(row["local_lr"] == 0.5 for row in stages["second", "diloco"])  # the others diverged
    assert counts["final", "local_sgd"] == counts["final", "learned"] == 2
    assert stages["final", "learned"][0]["local_lr"] == 0.5
    assert sum(n for (stage, method), n in counts.items() if stage == "final" and method != "learned") <= 2 * (2 + 3)
    bench.main(["plot", str(out), "--png", str(tmp_path / "loss.svg")])
    assert "digits, K = 2, H = 1, 10 rounds" in capsys.readouterr().out
    assert "MB sent" in (tmp_path / "loss_digits_k2_h1_10_rounds.svg").read_text()


def test_clients_decay_and_adamw_have_a_table_of_their_own(tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    common = [*SIZES, "--rounds", "3", "--local-lr", "0.01", "--seeds", "0"]
    bench.main(["run", str(out), *common])
    more = ["--local-optimizer", "adamw", "--decay", "--clients", "4", "--alpha", "1"]
    bench.main(["run", str(out), *common, *more])
    bench.main(["plot", str(out)])
    printed = capsys.readouterr().out
    assert "digits, K = 2, H = 1, 3 rounds\n" in printed
    assert "digits, K = 2, H = 1, adamw, decay, 4 clients, alpha = 1.0, 3 rounds\n" in printed


def test_tuning_needs_local_sgd(tmp_path):
    with pytest.raises(ValueError, match="must include local_sgd"):
        bench.main(["tune", str(tmp_path / "x"), "--methods", "diloco"])
