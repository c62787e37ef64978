"""Work beside local steps."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from lightning_lopt.sync.background import Background

CPU = torch.device("cpu")


def test_what_is_raised_in_the_background_is_raised_at_the_wait():
    def fail():
        raise ValueError("in the background")

    with pytest.raises(ValueError, match="in the background"):
        Background(fail, CPU).wait()


def test_it_runs_beside_its_caller_and_without_gradients():
    go, seen = threading.Event(), []

    def work():
        assert go.wait(10)
        seen.append(torch.is_grad_enabled())

    background = Background(work, CPU)
    assert not seen
    go.set()
    background.wait()
    assert seen == [False]


AT_EXIT = """
import time, torch
from lightning_lopt.sync.background import Background
def work():
    time.sleep(1)
    print("done", flush=True)
Background(work, torch.device("cpu"))
"""


def test_the_end_of_the_process_waits_for_it():
    """A thread that Python ends within a collective aborts the process."""
    ended = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "done\n"
