"""The same code on GPUs, over NCCL: `pytest -m gpu` on a machine that has them."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from lightning_lopt import LearnedOptimizer, Rounds
from tests.processes import run_command
from tests.strategies.support import check_script, write_script
from tests.test_islands import ALONE, train_alone

NUM_WORKERS = min(2, torch.cuda.device_count())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_WORKERS == 0, reason="there is no CUDA device")]
SHAPES = [(), (7,), (33, 65), (8, 3, 3, 3), (600, 1025)]


def _anchors(device: str) -> list[torch.Tensor]:
    """Parameters after three outer steps with the bundled weights."""
    generator = torch.Generator().manual_seed(0)
    anchors = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
    outer = LearnedOptimizer(anchors)
    for _ in range(3):
        for p in anchors:
            p.grad = (0.1 * torch.randn(p.shape, generator=generator)).to(device)
        outer.step()
    return [p.detach().cpu() for p in anchors]


def test_the_learned_step_equals_that_of_the_cpu():
    torch.testing.assert_close(_anchors("cuda"), _anchors("cpu"), rtol=1e-5, atol=1e-5)


def test_workers_train_over_nccl(tmp_path):
    options = {"accelerator": "gpu", "max_epochs": 1}
    path, environment = write_script(tmp_path, "LearnedLocalSGD(4)", NUM_WORKERS, **options)
    printed, _ = run_command([sys.executable, str(path)], 200, environment)
    check_script(printed, NUM_WORKERS)


@pytest.fixture
def nccl():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))


@pytest.mark.parametrize("name", ALONE)
def test_a_sharded_worker_equals_one_on_the_cpu(nccl, name):
    """FSDP2 on one GPU, with syncs in flight beside it, and evaluation of the global weights in mid-round."""
    seen, expected_seen = [], []
    weights = train_alone("cuda", name, True, seen)
    for value, expected in zip(weights, train_alone("cpu", name, False, expected_seen), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-8)
    assert seen == pytest.approx(expected_seen, abs=1e-8)


def test_offloaded_shards_are_refused(nccl):
    model = torch.nn.Linear(4, 3)
    fully_shard(model, mesh=init_device_mesh("cuda", (1,)), offload_policy=CPUOffloadPolicy())
    with pytest.raises(ValueError, match="offloaded cannot be exchanged"):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)


def test_anchors_of_a_sharded_worker_take_the_memory_of_its_weights(nccl):
    model = torch.nn.Linear(1024, 1024, bias=False)
    fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = torch.cuda.memory_allocated()
    rounds = Rounds(model, optimizer, 2)
    assert torch.cuda.memory_allocated() - before == 4 * 1024**2
    assert rounds.sync.replica.device.type == "cuda"
