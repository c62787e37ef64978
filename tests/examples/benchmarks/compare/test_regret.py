"""Cells are compared with a baseline that is tuned in each; runs are not repeated."""

from __future__ import annotations

import json

import pytest

from examples.benchmarks import __main__ as bench
from examples.benchmarks.compare import regret
from examples.benchmarks.compare.regret import Cell, Result

SMALL = ["--task", "digits", "--num-workers", "2", "--local-steps", "2", "--rounds", "3", "--optimizers", "sgd"]


def lines(finals, cell):
    """Lines of the file: final losses by method, of two seeds that start at 4."""
    return [
        {**cell._asdict(), "name": name, "seed": seed, "start": 4.0, "final": loss}
        for name, own in finals.items()
        for seed, loss in enumerate(own)
    ]


def test_regret_is_paired_by_seed_and_a_cell_is_lost_where_averaging_trains():
    cells = [Cell("sgd", 4, 2, "constant", 0.5), Cell("muon", 4, 2, "decaying", 0.5)]
    rows = [
        *lines({"diloco": [1.0, 2.0], "local_sgd": [1.0, 2.0], "learned": [0.5, 1.0]}, cells[0]),
        *lines({"diloco": [1.0, 2.0], "local_sgd": [1.0, 2.0], "learned": [3.0, 3.0]}, cells[1]),
        *lines({"diloco": [1.0, 2.0]}, cells[1]._replace(share=0.8)),  # still running
    ]
    found = regret.cells(rows)
    assert list(found) == cells
    summary = {(line["method"], line["cells"]): line for line in regret.summary(found)}
    assert summary["learned", "1, sgd"]["median"] == "-0.693"
    assert summary["learned", "1, sgd"]["lost"] == 0
    assert summary["learned", "1, decaying"]["median"] == "+0.752"  # (log 3 + log 1.5) / 2
    assert summary["learned", "2, all"]["lower"] == summary["learned", "2, all"]["lost"] == 1
    assert summary["local_sgd", "2, all"]["worst"] == "+0.000"


def test_the_best_rates_are_those_of_averaging():
    cells = [Cell("sgd", 4, 2, "constant", share) for share in (0.25, 0.5, 0.8)]
    losses = dict(zip(cells, (2.0, 1.0, 3.0), strict=True))
    rows = [row for cell in cells for row in lines({"diloco": [1.0], "local_sgd": [losses[cell]]}, cell)]
    assert list(regret.at_best_rates(regret.cells(rows))) == [cells[1]]


def test_training_takes_half_as_much_off():
    best, half, less = (Result({0: 4.0}, {0: loss}) for loss in (1.0, 2.5, 2.6))
    assert half.trains(best)
    assert not less.trains(best)


def test_runs_are_not_repeated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(regret, "RATES", [0.1, 1.0, 1000.0])
    out, png = tmp_path / "cells.jsonl", tmp_path / "map.png"
    for _ in range(2):
        bench.main(["regret", str(out), *SMALL, "--shares", "0.5", "--png", str(png)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    methods = ("diloco", "local_sgd", "learned", "controlled")
    assert len(rows) == 3 + 2 * 30 + 2 * len(methods) * 2  # the edge, two schedules of DiLoCo's grid, two seeds
    assert {row["local_lr"] for row in rows if row["name"] == "learned"} == {0.5}
    assert "2, all" in capsys.readouterr().out
    assert png.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "3", "4"], "one number for each H"),
        (["--rounds", "3", "--seeds", "1000"], r"\[1000\] are among --tuning-seeds"),
    ],
)
def test_arguments_that_do_not_fit_together(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        bench.main(["regret", str(tmp_path / "cells.jsonl"), "--local-steps", "2", *arguments])
