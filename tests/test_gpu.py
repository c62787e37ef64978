"""The same code on GPUs, over NCCL: `pytest -m gpu` on a machine that has them."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from lightning_lopt import LearnedOptimizer, Rounds
from tests.processes import run_command
from tests.strategies import test_islands
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


def _connect():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))


def _train_sharded(name):
    _connect()
    return train_alone("cuda", name, True)


def _sharded_layer(**options):
    layer = torch.nn.Linear(1024, 1024, bias=False)
    fully_shard(layer, mesh=init_device_mesh("cuda", (1,)), **options)
    return layer, torch.optim.SGD(layer.parameters(), lr=0.1)


def _offloaded():
    _connect()
    with pytest.raises(ValueError, match="offloaded cannot be exchanged") as error:
        Rounds(*_sharded_layer(offload_policy=CPUOffloadPolicy()), 2)
    return str(error.value)


def _memory_of_anchors():
    _connect()
    layer, optimizer = _sharded_layer()
    before = torch.cuda.memory_allocated()
    rounds = Rounds(layer, optimizer, 2)
    return torch.cuda.memory_allocated() - before, rounds.sync.replica.device.type


def _resume_in_flight(accelerator, folder):
    """Weights and losses of a Trainer's run with a sharded model, and of its rest from a sync in flight on."""
    options = {"make": test_islands._Sharded, "strategy": {"ranks_per_worker": "node"}, "max_epochs": 1}
    fit = partial(test_islands._fit, 0, folder, "learned, in flight", 1, 1, accelerator=accelerator, **options)
    return fit("saved"), fit(None, "saved-11")


def _in_a_process(function, *arguments):
    """The result of a function in a new process: one that has used the GPU cannot be forked for other tests."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result(timeout=120)


@pytest.mark.parametrize("name", ALONE)
def test_a_sharded_worker_equals_one_on_the_cpu(name):
    """FSDP2 on one GPU, with syncs in flight beside it, and evaluation of the global weights in mid-round."""
    weights, losses = _in_a_process(_train_sharded, name)
    expected, expected_losses = _in_a_process(train_alone, "cpu", name, False)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-8)
    assert losses == pytest.approx(expected_losses, abs=1e-8)


def test_a_sharded_worker_goes_on_in_flight(tmp_path):
    (weights, losses, steps), (again, last_losses, _) = _in_a_process(_resume_in_flight, "gpu", str(tmp_path))
    ((expected, expected_losses, expected_steps), _) = _in_a_process(_resume_in_flight, "cpu", str(tmp_path / "cpu"))
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(again, weights, rtol=0, atol=1e-12)
    assert losses == pytest.approx(expected_losses, abs=1e-8)
    assert last_losses == pytest.approx(losses[-len(last_losses) :], abs=1e-12)
    assert steps == expected_steps


def test_offloaded_shards_are_refused():
    assert "ranks_per_worker" in _in_a_process(_offloaded)


def test_anchors_of_a_sharded_worker_take_the_memory_of_its_weights():
    assert _in_a_process(_memory_of_anchors) == (4 * 1024**2, "cuda")
