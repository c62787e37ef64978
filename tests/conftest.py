"""Fixtures and helpers shared by all tests."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

VECTORS = Path(__file__).parent / "vectors"
ENVIRONMENT = dict(os.environ)


@pytest.fixture(autouse=True)
def _start_nothing(monkeypatch):
    """A Trainer for several devices would start this process's command again: all tests, once more."""

    launch = _SubprocessScriptLauncher._call_children_scripts

    def refuse(self):
        assert self.num_processes == 1, "A Trainer in the process of the tests is about to start others."
        launch(self)

    monkeypatch.setattr(_SubprocessScriptLauncher, "_call_children_scripts", refuse)


@pytest.fixture(autouse=True)
def _leave_nothing():
    """A Trainer in this process leaves a process group and torchrun's variables, which the next would take for theirs.

    One in a module's fixture has left them before the test begins. A test that ran out of time leaves workers that hold
    ports.
    """
    _restore_environment()
    yield
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    if dist.is_initialized():
        dist.destroy_process_group()
    _restore_environment()


def _restore_environment():
    for name in os.environ.keys() - ENVIRONMENT.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(ENVIRONMENT)


@pytest.fixture
def vectors():
    """Loads a file of golden numbers made by other people's code; see `tests/vectors/README.md`."""
    return lambda name: np.load(VECTORS / name)
