"""The bytes that are counted are those that the kernel counts on an interface of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_lopt import AdaMLP, LearnedOptimizer, Rounds, SlowMomentum, TopK, Travel
from tests.processes import run_workers

K = 3
LAGG = partial(LearnedOptimizer, network=AdaMLP(K, seed=0))
CASES = {
    "everything": (Travel(), None),
    "random coordinates": (Travel(density=0.9), None),
    "bf16": (Travel(compression="bf16"), None),
    "int8": (Travel(compression="int8"), SlowMomentum),
    "top-k": (Travel(compression=TopK(0.3)), None),
    "all workers": (Travel(), LAGG),
    "sharded": (Travel(sharded=True), LAGG),
}


def _sent_by_kernel() -> int:
    """Bytes sent over the loopback so far."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def _syncs(rank):
    """For each case the bytes of one sync, as the kernel and as this worker count them."""
    measured = {}
    for name, (travel, outer) in CASES.items():
        model = nn.Sequential(*(nn.Linear(1300, 1300) for _ in range(3)))  # 20 MB
        rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, outer, travel=travel)
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


def test_counted_bytes_are_the_kernels():
    namespace = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "-"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no right to make a network namespace, and other traffic would be counted on a shared interface")
    command = [*namespace, sys.executable, "-m", "tests.test_wire_bytes"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for name, (kernel, counted) in json.loads(done.stdout).items():
        assert counted > 10e6, name
        assert kernel == pytest.approx(counted, rel=0.05), name


if __name__ == "__main__":
    results = run_workers(_syncs, K)
    print(json.dumps({name: (results[0][name][0], sum(r[name][1] for r in results)) for name in CASES}))
