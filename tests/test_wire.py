"""In a network namespace: the kernel counts the same bytes, and local steps hide a slow link."""

from __future__ import annotations

import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from examples.benchmarks.wire.namespaces import run_linked, why_not
from lightning_lopt import AdaMLP, LearnedOptimizer, Rounds, SlowMomentum, SyncOptions, TopK
from lightning_lopt.comm import Communicator
from tests.processes import run_command, run_workers

K = 3
LOOPBACK = "ip link set lo up"
LIMIT = "tc qdisc add dev lo root tbf rate 200mbit burst 256kb latency 1s"
LAGG = partial(LearnedOptimizer, network=AdaMLP(K, seed=0))
CASES = {
    "everything": (SyncOptions(), None),
    "random coordinates": (SyncOptions(density=0.9), None),
    "bf16": (SyncOptions(compression="bf16"), None),
    "int8": (SyncOptions(compression="int8"), SlowMomentum),
    "top-k": (SyncOptions(compression=TopK(0.3)), None),
    "all workers": (SyncOptions(), LAGG),
    "sharded": (SyncOptions(sharded=True), LAGG),
}


def _sent_by_kernel() -> int:
    """Bytes sent over the loopback interface so far."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def _syncs(rank):
    """Bytes of one sync in each case, as counted by the kernel and by this worker."""
    measured = {}
    for name, (sync_options, outer) in CASES.items():
        model = nn.Sequential(*(nn.Linear(1300, 1300) for _ in range(3)))  # 20 MB
        rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, outer, options=sync_options)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))
        dist.barrier()
        before = _sent_by_kernel()
        dist.barrier()
        rounds.step()
        dist.barrier()
        measured[name] = (_sent_by_kernel() - before, rounds.last_report.bytes_sent)
        dist.barrier()
    return measured


def _rounds_on_a_slow_link(rank, overlap_steps):
    """Seconds of the transfer of a second round and of waiting for it; a local step sleeps for 50 ms."""
    model = nn.Sequential(*(nn.Linear(1100, 1100) for _ in range(2)))  # 9.7 MB
    sync_options = SyncOptions(overlap_steps=overlap_steps)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 32, options=sync_options)
    for _ in range(64):
        time.sleep(0.05)
        rounds.step()
    return rounds.last_report.transfer_seconds, rounds.last_report.waited_seconds


def _in_a_namespace(measurement: str, *setup: str) -> Any:
    """Run a measurement of this module in a network namespace that commands set up, and parse its JSON."""
    if reason := why_not(setup):
        pytest.skip(reason)
    namespace = ["unshare", "--net", "sh", "-c", " && ".join([*setup, 'exec "$@"']), "-"]
    command = [*namespace, sys.executable, "-m", "tests.test_wire", measurement]
    printed, _ = run_command(command, 250, folder=Path(__file__).parents[1])
    return json.loads(printed)


def test_counted_bytes_are_the_kernels():
    results = _in_a_namespace("bytes", LOOPBACK)
    for name in CASES:
        counted = sum(worker[name][1] for worker in results)
        assert counted > 10e6, name
        assert results[0][name][0] == pytest.approx(counted, rel=0.05), name


def _swaps():
    """Print the seconds of all-to-alls of 3 MB each way, as one of two workers."""
    dist.init_process_group("gloo")
    comm, half, seconds = Communicator(), 750_000, []
    for _ in range(7):
        comm.max_(torch.zeros(1))
        start = time.perf_counter()
        comm.all_to_all(torch.zeros(2 * half), [half] * 2, [half] * 2)
        seconds.append(time.perf_counter() - start)
    print(statistics.median(seconds), flush=True)
    dist.destroy_process_group()


def test_an_all_to_all_uses_both_directions_at_once(capfd):
    """0.25 s each way, at 100 Mbit/s."""
    if reason := why_not():
        pytest.skip(reason)
    run_linked(["-m", "tests.test_wire", "swaps"], num_workers=2, mbit=100)
    assert max(map(float, capfd.readouterr().out.split())) < 0.4


def test_local_steps_hide_the_transfer():
    """0.8 s of transfer, beside 24 steps that take 1.2 s."""
    for transfer, waited in _in_a_namespace("slow", LOOPBACK, LIMIT):
        assert transfer > 0.5
        assert waited < 0.1 * transfer


if __name__ == "__main__":
    if sys.argv[1] == "swaps":
        _swaps()
    elif sys.argv[1] == "bytes":
        print(json.dumps(run_workers(_syncs, K)))
    else:
        print(json.dumps(run_workers(_rounds_on_a_slow_link, 2, 24)))
