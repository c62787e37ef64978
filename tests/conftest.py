"""Fixtures and helpers shared by all tests."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _leave_nothing():
    """A Trainer in this process leaves a process group and torchrun's variables, which forked workers would inherit.

    A test that ran out of its time leaves workers that hold ports.
    """
    environment = dict(os.environ)
    yield
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def vectors():
    """Loads a file of golden numbers made by other people's code."""

    def load(name: str):
        path = SHARED / "vectors" / name
        if not path.exists():
            pytest.skip(f"golden numbers are not here: {path}")
        return np.load(path)

    return load
