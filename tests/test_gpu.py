"""The same code on GPUs, over NCCL: `pytest -m gpu` on a machine that has them."""

from __future__ import annotations

import sys

import pytest
import torch

from lightning_lopt import LearnedOptimizer
from tests.processes import run_command
from tests.strategies.support import check_script, write_script

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
