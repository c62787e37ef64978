"""The summary of a fit, and its advice."""

from __future__ import annotations

import re
import warnings

import pytest

from lightning_lopt.callbacks.summary import advise, draw, growth, summarize


def _history(num_rounds: int = 16, **changes):
    """Rounds of 1 s with 16 steps that fit the link, with some metrics replaced by values or functions of the round."""
    row = {
        "round": 0.0,
        "local_steps": 16.0,
        "bytes_sent": 4e6,
        "seconds": 1.0,
        "sync_seconds": 0.1,
        "transfer_seconds": 0.08,
        "waited_seconds": 0.08,
        "outer_seconds": 0.01,
        "pseudo_grad_norm": 1.0,
        "drift": 0.1,
        "fell_back": 0.0,
        "left_out": 0.0,
    }
    rows = []
    for i in range(num_rounds):
        values = {**row, **{name: value(i) if callable(value) else value for name, value in changes.items()}}
        rows.append({f"rounds/{name}": value for name, value in values.items()})
    return rows


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, "None: syncs take about a tenth"),
        ({"sync_seconds": 0.5, "waited_seconds": 0.45}, "H could be larger: with H = 144 .* compression"),
        ({"sync_seconds": 0.5, "outer_seconds": 0.4}, "H could be larger: with H = 144 .* outer step"),
        ({"sync_seconds": 0.01, "waited_seconds": 0.0}, "H could be smaller: with H = 2 "),
        ({"drift": lambda i: 2.0**i}, "The drift grows .* rate or H"),
        ({"pseudo_grad_norm": lambda i: 1.5**i, "drift": lambda i: 2.0**i}, r"The pseudo-gradient grows .* rate\."),
        ({"fell_back": lambda i: i // 8, "drift": lambda i: 2.0**i}, "1 outer steps refused"),
        ({"left_out": lambda i: i // 8}, "1 workers were left out"),
        ({"drift": lambda i: 0.1 if i < 15 else float("inf")}, "The drift is not finite"),
        ({"drift": lambda i: 2.0**i, "local_steps": lambda i: 8.0 + i}, "None"),  # longer rounds drift farther
        ({"drift": lambda i: 10.0 / (i + 1)}, "None"),
    ],
)
def test_advice(changes, advice):
    assert re.search(advice, advise(_history(**changes)))


def test_what_happens_once_in_a_long_run_is_not_urgent():
    assert advise(_history(100, left_out=1.0)).startswith("None")


def test_few_rounds_are_no_trend():
    grows = _history(8, drift=lambda i: 2.0**i)
    assert growth(grows, "rounds/drift") is None
    assert growth(_history(12, drift=lambda i: 2.0**i), "rounds/drift") > 2


def test_what_was_sent():
    """Two workers would send all gradients in each of 256 steps, 256 times 1 MB; ours sent 4 MB."""
    assert "4 MB by each process, 1/64 of what DDP sends" in summarize(_history(), 1e6, num_workers=2)
    assert "4 MB by each process, 2 times what DDP sends in as many steps\n" in summarize(_history(), 2e6 / 256, 2)
    assert "what DDP sends in as many steps: the model is smaller than the mess" in summarize(_history(), 264.0, 2)
    assert "sent     0 MB by each process\n" in summarize(_history(bytes_sent=0.0), 1e6, num_workers=1)


def test_a_worker_without_data():
    assert "sent     4 MB by each process\n" in summarize(_history(local_steps=0.0), 1e6, num_workers=2)


def test_overlapped_transfers_take_no_time():
    assert "10 % of the time: waiting 0 %" in summarize(_history(waited_seconds=0.0), 1e6, 2)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_plot_of_one_worker_that_sends_nothing(tmp_path, num_workers):
    history = _history(8, round=lambda i: i + 1.0, bytes_sent=4e6 * (num_workers - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an empty logarithmic axis warns
        draw(history, 1e6, num_workers, tmp_path / "rounds.png")
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")
