"""The error of a lost worker: raised once, with the time limit."""

from __future__ import annotations

from datetime import timedelta

import pytest

from lightning_lopt import WorkerLostError
from lightning_lopt.comm import DisagreementError
from lightning_lopt.strategies.errors import explain_lost_worker


@pytest.mark.parametrize(
    ("timeout", "limit"), [(None, "the default time limit"), (timedelta(minutes=5), "0:05:00")], ids=str
)
def test_a_lost_worker_is_explained_once(timeout, limit):
    lost = RuntimeError("[gloo] Connection closed by peer\nmore")
    with pytest.raises(WorkerLostError) as raised, explain_lost_worker(None), explain_lost_worker(timeout):
        raise lost
    assert raised.value.__cause__ is lost
    assert str(raised.value).count("Another worker died") == 1
    assert f"within {limit}: [gloo] Connection closed by peer. Look" in str(raised.value)


@pytest.mark.parametrize("error", [DisagreementError("gloo"), RuntimeError("a bug"), ValueError("gloo")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as raised, explain_lost_worker(None):
        raise error
    assert raised.value is error
