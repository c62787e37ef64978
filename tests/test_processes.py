"""The helpers of the tests: what starts processes is marked, and a failing worker is named at once."""

from __future__ import annotations

import sys
import time

import pytest

from tests.processes import run_cases, run_workers


def test_a_test_without_the_mark_cannot_start_a_process():
    run = vars(sys.modules["sub" + "process"])["run"]
    with pytest.raises(pytest.fail.Exception, match=r"needs the mark: pytest\.mark\.processes"):
        run([sys.executable, "--version"])


def _fail(rank, who):
    if rank == who:
        raise ValueError("it fails")
    time.sleep(60 if who is not None else 0)
    return rank


def test_the_first_error_ends_all_and_names_worker_and_case(request):
    assert request.node.get_closest_marker("processes")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)worker 1 failed:.*it fails.*in the case 'second'"):
        run_cases(_fail, 2, {"first": (None,), "second": (1,)})
    assert time.monotonic() - start < 20


def test_a_worker_that_does_not_end_is_an_error_and_says_where_it_stands(capfd):
    with pytest.raises(TimeoutError, match=r"did not finish within 0\.5 s"):
        run_workers(_fail, 1, 7, limit=0.5)
    assert "in _fail\n" in capfd.readouterr().err
