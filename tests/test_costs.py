"""The model of costs, compared with rounds that were added up by hand, with real rounds, and with measured ones."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.benchmarks.wire.methods import round_of
from lightning_lopt import AdaMLP, LearnedOptimizer, PowerSGD, Rounds, SlowMomentum, SyncOptions, costs
from lightning_lopt.costs import (
    DDP,
    METHODS,
    PIECE,
    Collective,
    Link,
    Method,
    Round,
    all_gather,
    all_reduce,
    all_to_all,
    data_parallel,
    hidden_share,
    local_steps_that_beat,
    local_steps_that_pay,
    rate_where_equal,
    round_seconds,
    sync_round,
)
from tests.processes import run_command
from tests.threads import run_threads

SECOND = [Collective(1448 / 1514 * 1e6 / 8)]  # what a link of 1 Mbit/s carries in a second
RECORDS = Path(__file__).parents[1] / "examples" / "records"


def test_collectives():
    assert all_reduce(12, 3) == Collective(16, phases=2, messages=8)
    assert all_reduce(12 * PIECE, 3).messages == 16
    assert all_to_all(12, 3) == Collective(8, phases=2, messages=2)
    assert all_gather(4, 3) == Collective(8, phases=1, messages=4)
    assert [c(12, 1) for c in (all_reduce, all_to_all, all_gather)] == [Collective()] * 3


def test_messages_wait_for_notices():
    """Of four pieces of a second, with a latency of ten, and of a tenth of a second."""
    four = Collective(4 * SECOND[0].bytes_sent, phases=1, messages=4)
    between_two = Collective(4 * SECOND[0].bytes_sent, phases=1, messages=4, behind=True)
    assert Link(1, 10.0).seconds([four]) == pytest.approx(4 * 10 + 2)  # two in flight: while one waits, one is sent
    assert Link(1, 0.1).seconds([four]) == pytest.approx(4 + 2 * 0.1)  # the first notice and the last byte
    assert Link(1, 0.1).seconds([between_two]) == pytest.approx(4 * 1.1)  # each notice after the data before it


def test_tcp_starts_anew_after_a_pause():
    transfer = [Collective(1e9)]
    assert Link(100).seconds_after_pause(transfer) == Link(100).seconds(transfer)
    link = Link(mbit=8 * 0.1448 / 0.1, latency=0.05)  # carries 100 segments from a notice to the next
    assert link.seconds_after_pause(transfer) - link.seconds(transfer) == pytest.approx(0.1 * 2.3219, rel=1e-3)


@pytest.mark.parametrize(
    ("a_round", "seconds", "hidden"),
    [
        (Round(4, 0, SECOND), 4 * 0.5 + 1, 0),
        (Round(4, 1, SECOND), 3 * 0.5 + 1, 0.5),
        (Round(4, 3, SECOND), 4 * 0.5, 1),
        (Round(4, 3, SECOND, exposed=SECOND, work_seconds=0.2), 4 * 0.5 + 1.2, 0.5),
        (Round(4, 0, []), 2, 1),
    ],
)
def test_rounds(a_round, seconds, hidden):
    assert round_seconds(a_round, 0.5, Link(1)) == pytest.approx(seconds)
    assert hidden_share(a_round, 0.5, Link(1)) == pytest.approx(hidden)


def test_data_parallel_training_hides_all_buckets_but_the_last():
    link, mib = Link(10), 2**20 / 1448 * 1514 * 8 / 1e7
    assert round_seconds(data_parallel(20 * 2**20, 2), 3.0, link) == pytest.approx(3 + 19 * mib)
    assert round_seconds(data_parallel(100 * 2**20, 2), 3.0, link) == pytest.approx(1 + (75 + 25) * mib)
    assert round_seconds(data_parallel(2**19, 2), 3.0, link) == pytest.approx(3)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("overlap", [0, 0.5])
def test_the_least_h_that_pays(overlap, share):
    def round_of(local_steps: int) -> Round:
        return Round(local_steps, int(overlap * local_steps), SECOND, work_seconds=0.03)

    def idle(local_steps: int) -> float:
        return 1 - local_steps * 0.05 / round_seconds(round_of(local_steps), 0.05, Link(1))

    least = local_steps_that_pay(round_of, 0.05, Link(1), share)
    assert idle(least) <= share + 1e-9
    assert least == 1 or idle(least - 1) > share


def test_the_least_h_that_beats_another_method():
    local, ddp = (lambda h: Round(h, 0, SECOND)), Round(1, 0, SECOND)
    assert local_steps_that_beat(ddp, local, 0.5, Link(1)) == 2
    assert local_steps_that_beat(ddp, local, 0.5, Link(1), progress=0.5) == 5  # 0.7 s per step, and not 0.75
    assert local_steps_that_beat(ddp, local, 0.5, Link(1), progress=1 / 3) is None


def test_the_rate_at_which_two_methods_are_equal():
    local, ddp = Round(16, 0, SECOND, work_seconds=0.4), Round(1, 0, SECOND)
    rate = rate_where_equal(local, ddp, 0.1, progress=0.8, latency=0.0)
    per_step = [round_seconds(r, 0.1, Link(rate)) / r.local_steps for r in (local, ddp)]
    assert per_step[0] == pytest.approx(0.8 * per_step[1], rel=1e-4)
    assert rate_where_equal(local, ddp, 0.1, progress=0.0) is None
    assert rate_where_equal(local, ddp, 0.1, progress=2.0) == 1e6


K, WIDTH = 4, 128
METHODS_OF_SHAPES = {**METHODS, "PowerSGD": Method({"compression": PowerSGD(4)})}


def _one_sync(rank, make_comm, name):
    """Bytes and collectives of a round of four steps on equal tensors of 2^17 parameters in all."""
    method = METHODS_OF_SHAPES[name]
    outer = SlowMomentum
    if method.worker_grads:
        outer = partial(LearnedOptimizer, network=AdaMLP(K, hidden=(4, 4), seed=0))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rounds = Rounds(model, optimizer, 4, outer, comm=make_comm(), options=method.sync_options(4))
    before = rounds.comm.bytes_sent, rounds.comm.num_collectives
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        rounds.step()
    rounds.sync.wait()
    return rounds.comm.bytes_sent - before[0], rounds.comm.num_collectives - before[1]


@pytest.mark.parametrize("name", METHODS_OF_SHAPES)
def test_real_rounds_send_as_much(name):
    a_round = METHODS_OF_SHAPES[name].round(4, [(WIDTH, WIDTH)] * 8, K)
    for bytes_sent, collectives in run_threads(_one_sync, K, name):
        assert bytes_sent == pytest.approx(a_round.bytes_sent, rel=2e-3)
        assert collectives == len([*a_round.transfer, *a_round.exposed])


def test_a_linear_codec_needs_shapes():
    with pytest.raises(ValueError, match="shapes of the tensors"):
        sync_round(SyncOptions(compression=PowerSGD(4)), 16, 1e6, K)


WIRE, LATENCY = RECORDS / "2026-11-21_wire", RECORDS / "2026-11-30_costs"
RUNS = [WIRE / f"{name}.jsonl" for name in ("mbit100", "mbit1000", "k4_learned", "latency", "lagg2", "lopt_blended")]
RUNS += [LATENCY / f"{name}.jsonl" for name in ("latency_k2", "latency_k4_compressed")]


def _measured(path):
    """Setup of a run of the benchmark `wire`, its parameters, and its rows by method."""
    header, *rows = map(json.loads, path.read_text().splitlines())
    by_method = defaultdict(list)
    for row in rows:
        by_method[row["method"]].append({"rounds": row["steps"] if row["method"] == DDP else 1, **row})
    return header["setup"], header.get("shapes", header["parameters"]), by_method


def _median(rows, key):
    return statistics.median(row.get(key, 0.0) / row["rounds"] for row in rows)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_measured_rounds_are_within_a_tenth(path):
    """All methods at 100 and 1000 Mbit/s, of four workers, with 20 ms; the time of the outer step is as measured."""
    setup, parameters, by_method = _measured(path)
    link, step_seconds = Link(setup["mbit"], setup.get("latency", 0.0)), setup["step_seconds"][0]
    for method, rows in by_method.items():
        a_round = round_of(method, setup["local_steps"], parameters, [step_seconds] * setup["num_workers"])
        outer = max(0.0, _median(rows, "outer_seconds") - link.seconds(a_round.exposed))
        modelled = round_seconds(replace(a_round, work_seconds=outer), step_seconds, link)
        assert modelled == pytest.approx(_median(rows, "seconds"), rel=0.1), method


@pytest.mark.parametrize("num_workers", [2, 4])
def test_measured_collectives_are_within_a_tenth(num_workers):
    """At 100 Mbit/s with 20 ms, the least of three; of 1 MB in four workers' slices, the noise is more."""
    lines = (LATENCY / f"collectives_k{num_workers}.txt").read_text()
    for name, traffic, sizes in (("all_reduce", all_reduce, 3), ("Communicator.all_to_all", all_to_all, 2)):
        found = re.findall(rf"worker 0: {re.escape(name)} of (\d{{7,}}) bytes: ([\d.]+) s", lines)
        for size in sorted({int(size) for size, _ in found})[-sizes:]:
            measured = min(float(seconds) for other, seconds in found if int(other) == size)
            assert Link(100, 0.02).seconds([traffic(size, num_workers)]) == pytest.approx(measured, rel=0.1), size


def test_the_command_prints_every_method_and_draws_them(tmp_path, capsys):
    given = ["--params", "5e6", "--mbit", "100", "--step-seconds", "0.5", "--workers", "2"]
    costs.main([*given, "--local-steps", "16", "64", "--png", str(tmp_path / "costs.png")])
    lines = capsys.readouterr().out.splitlines()
    assert all(sum(line.startswith(f"{name}  ") for line in lines) == 2 for name in METHODS)
    assert (tmp_path / "costs.png").exists()
    for wrong in (["--workers", "0"], ["--params", "1.5"], ["--latency", "-1"]):
        with pytest.raises(SystemExit):
            costs.main([*given, *wrong])
    assert "0 is not a positive number" in capsys.readouterr().err


def test_a_reader_that_reads_no_more_ends_the_command_in_silence():
    given = "--params 5e6 --mbit 100 --step-seconds 0.5 --workers 2"
    command = f"{sys.executable} -u -m lightning_lopt.costs {given} | true"
    assert run_command(["sh", "-c", command], 60) == ("", "")


def test_a_table_without_rows_is_empty():
    assert costs.table([]) == ""
