"""The benchmark beside torchft: its report, and a short run."""

from __future__ import annotations

import json

import pytest

from examples.benchmarks.__main__ import main

HEADER = {"setup": {"mbit": 100.0, "tensors": 2, "parameters": 8.0, "out": "peers.jsonl"}, "parameters": 8}


def test_report(tmp_path, capsys):
    def row(ours: float, theirs: float, equal: bool) -> dict[str, object]:
        seconds = {"lightning_lopt seconds": ours, "torchft seconds": theirs}
        return {**seconds, "lightning_lopt bytes": 3e6, "torchft bytes": 4e6, "equal": equal}

    rows = [HEADER, row(1.0, 2.0, True), row(3.0, 4.0, True), row(1.0, 1.0, False)]
    rows.append({"extra": {"lightning_lopt": 64, "torchft": 96}})
    path = tmp_path / "peers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["peers", "--report", "--out", str(path)])
    printed = capsys.readouterr().out
    assert "bitwise equal after 2 of 3 rounds" in printed
    assert "lightning_lopt           1       1        3        3                          8" in printed
    assert "median 0.750, 0.500 to 1.000" in printed


@pytest.mark.processes
@pytest.mark.practice
def test_both_end_at_the_same_weights(tmp_path, capsys):
    pytest.importorskip("torchft")
    path = tmp_path / "peers.jsonl"
    main(["peers", "--mbit", "0", "--parameters", "1e4", "--rounds", "2", "--out", str(path)])
    assert "bitwise equal after 2 of 2 rounds" in capsys.readouterr().out
