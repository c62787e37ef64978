"""Fixtures of all tests, and the marker `processes`."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import types
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

VECTORS = Path(__file__).parent / "vectors"
ENVIRONMENT = dict(os.environ)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `processes` the tests that use, themselves or through a fixture or a helper, what starts processes."""
    for item in items:
        if isinstance(item, pytest.Function):
            fixtures = [found[-1].func for found in item._fixtureinfo.name2fixturedefs.values()]
            if any(_starts_processes(function, set()) for function in (item.function, *fixtures)):
                item.add_marker("processes")


def _starts_processes(function: Callable[..., Any], seen: set[Any]) -> bool:
    """Whether a function of the tests names `subprocess`, `multiprocessing`, or a function of the tests that does."""
    code = getattr(function, "__code__", None)
    if code is None or code in seen or not function.__module__.startswith("tests.") or function.__module__ == __name__:
        return False
    seen.add(code)
    names, codes = set(), [code]
    while codes:
        current = codes.pop()
        names |= {*current.co_names, *current.co_freevars}
        codes += [constant for constant in current.co_consts if isinstance(constant, types.CodeType)]
    named = [function.__globals__[name] for name in names if name in function.__globals__]
    return any(
        thing in (subprocess, multiprocessing) or (callable(thing) and _starts_processes(thing, seen))
        for thing in named
        if isinstance(thing, types.ModuleType | types.FunctionType)
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let a test without the marker `processes` fail when it, or one of its fixtures, starts a process."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("processes") is None:
            patch.setattr(BaseProcess, "start", _refuse)
            patch.setattr(subprocess.Popen, "__init__", _refuse)
        return (yield)


def _refuse(*args: Any, **options: Any) -> None:
    pytest.fail("A test that starts processes needs the mark: pytest.mark.processes.")


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
