"""The parts of a meta-iteration add up, and the measurement restores what it replaced."""

from __future__ import annotations

import json

import pytest

from examples.benchmarks import __main__ as bench
from examples.benchmarks.speed.meta_speed import Work
from lightning_lopt.functional import learned
from lightning_lopt.meta import outer, simulation


@pytest.mark.parametrize(("work", "update"), [("8x8", "published"), ("small", "masked_blended_nesterov")])
def test_parts_add_up(tmp_path, capsys, work, update):
    before = simulation.local_round, outer.outer_step, learned.apply
    path = tmp_path / "speed.json"
    options = ["--work", work, "--update", update, "--repeats", "1", "--rounds", "3", "--json", str(path)]
    bench.main(["meta-speed", *options])
    assert (simulation.local_round, outer.outer_step, learned.apply) == before
    rows = {row["part"]: row for row in json.loads(path.read_text())[work]}
    assert list(rows) == ["local steps", "features", "network", "bookkeeping", "whole"]
    for key in ("seconds", "CPU seconds"):
        times = [row[key] for row in rows.values()]
        assert sum(times[:-1]) == pytest.approx(times[-1])
        assert times[0] > 0
    assert 0 < rows["whole"]["share"] < 1
    assert "GFLOP" in capsys.readouterr().out


def test_flop_of_a_linear_model():
    """One round, worker, step and pair: 2 replicas · 5 examples · 2·(forward + weights) · 12, and the outer step."""
    work = Work((4, 3), batch_size=5, num_workers=1, local_steps=1, num_pairs=1, num_rounds=1)
    assert work.flop == 2 * 5 * 2 * 2 * 12 + 2 * 15 * 3200
