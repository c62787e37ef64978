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
STARTERS = ("subprocess", "multiprocessing")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `processes` the tests whose code, or that of a fixture, leads to a function that starts processes."""
    for item in items:
        if isinstance(item, pytest.Function):
            fixtures = [found[-1].func for found in item._fixtureinfo.name2fixturedefs.values()]
            if any(_starts_processes(function, set()) for function in (item.function, *fixtures)):
                item.add_marker("processes")


def _starts_processes(function: Callable[..., Any], seen: set[types.CodeType]) -> bool:
    """Whether a function of this repository names `subprocess` or `multiprocessing`, or another one that does."""
    code = getattr(function, "__code__", None)
    if code is None or code in seen or not _is_ours(function):
        return False
    seen.add(code)
    things = _named(code, function.__globals__)
    return any(_root(thing) in STARTERS or _starts_processes(thing, seen) for thing in things)


def _named(code: types.CodeType, scope: dict[str, Any]) -> list[Any]:
    """The modules, classes and functions that code may mean by its names, those of modules of ours included."""
    names = set(code.co_names)
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    found = [scope[name] for name in names if name in scope]
    modules = [thing for thing in found if isinstance(thing, types.ModuleType) and _is_ours(thing)]
    found += [vars(module)[name] for module in modules for name in names if name in vars(module)]
    return [*found, *(thing for code in inner for thing in _named(code, scope))]


def _root(thing: Any) -> str:
    name = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None)
    return str(name).split(".")[0]


def _is_ours(thing: Any) -> bool:
    return _root(thing) in ("tests", "examples", "lightning_lopt") and getattr(thing, "__module__", "") != __name__


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
