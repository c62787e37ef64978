"""The model of the network, compared with rounds that were added up by hand."""

from __future__ import annotations

import pytest
from examples.benchmarks.wire.link import (
    Link,
    Round,
    Traffic,
    all_gather,
    all_reduce,
    all_to_all,
    data_parallel,
    hidden_share,
    local_steps_that_pay,
    rate_where_equal,
    round_seconds,
)

SECOND = Traffic(1448 / 1514 * 1e6 / 8)  # what a link of 1 Mbit/s carries in a second


def test_a_transfer_takes_its_bytes_frames_and_messages():
    assert Link(1).seconds(SECOND) == pytest.approx(1)
    assert Link(4, latency=0.1).seconds(SECOND + Traffic(messages=3)) == pytest.approx(0.25 + 0.3)


def test_collectives():
    assert all_reduce(12, 3) == Traffic(16, 4)
    assert all_to_all(12, 3) + all_gather(4, 3) == all_to_all(12, 3) + Traffic(8, 2) == Traffic(16, 3)
    assert all_reduce(12, 1) == Traffic(0, 0)


@pytest.mark.parametrize(
    ("a_round", "seconds", "hidden"),
    [
        (Round(4, 0, SECOND), 4 * 0.5 + 1, 0),
        (Round(4, 1, SECOND), 3 * 0.5 + 1, 0.5),
        (Round(4, 3, SECOND), 4 * 0.5, 1),
        (Round(4, 3, SECOND, exposed=SECOND, work_seconds=0.2), 4 * 0.5 + 1.2, 0.5),
        (Round(4, 0, Traffic()), 2, 1),
    ],
)
def test_rounds(a_round, seconds, hidden):
    assert round_seconds(a_round, 0.5, Link(1)) == pytest.approx(seconds)
    assert hidden_share(a_round, 0.5, Link(1)) == pytest.approx(hidden)


def test_data_parallel_training_hides_two_thirds_of_a_step():
    gradients = SECOND.bytes_sent
    assert round_seconds(data_parallel(gradients, 2), 3.0, Link(1)) == pytest.approx(3)
    assert round_seconds(data_parallel(gradients, 2), 0.3, Link(1)) == pytest.approx(0.1 + 1)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("overlap_steps", [0, 2, 30])
def test_the_least_h_that_pays(overlap_steps, share):
    def idle(local_steps: int) -> float:
        a_round = Round(local_steps, overlap_steps, SECOND, work_seconds=0.03)
        return 1 - local_steps * 0.05 / round_seconds(a_round, 0.05, Link(1))

    least = local_steps_that_pay(Round(31, overlap_steps, SECOND, work_seconds=0.03), 0.05, Link(1), share)
    assert idle(least) <= share + 1e-9
    assert least == overlap_steps + 1 or idle(least - 1) > share


def test_the_rate_at_which_two_methods_are_equal():
    local, ddp = Round(16, 0, SECOND, work_seconds=0.4), Round(1, 0, SECOND)
    rate = rate_where_equal(local, ddp, 0.1, progress=0.8, latency=0.0)
    per_step = [round_seconds(r, 0.1, Link(rate)) / r.local_steps for r in (local, ddp)]
    assert per_step[0] == pytest.approx(0.8 * per_step[1], rel=1e-4)
    assert rate_where_equal(local, ddp, 0.1, progress=0.0) is None
    assert rate_where_equal(local, ddp, 0.1, progress=2.0) == 1e6
