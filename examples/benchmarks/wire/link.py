r"""Model of the network: the time of a round on a link, and the numbers of local steps that pay.

.. math:: T = (H - Q)\, t + \max(Q\, t, s) + e + w

for H local steps of t seconds each, a transfer of s seconds that overlaps with Q of these steps, and two times that
overlap with nothing: e of an exposed transfer and w of the outer step. With w = 0, T bounds any implementation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FRAME, SEGMENT = 1514, 1448  # bytes of an Ethernet frame, and those of them that TCP carries
BACKWARD = 2 / 3  # fraction of a training step in its backward pass, which has twice the products of the forward pass


@dataclass(frozen=True)
class Traffic:
    """Payload and messages that a worker sends in a sync.

    Attributes:
        bytes_sent: Bytes of the payload, >= 0.
        messages: Number of messages that follow one another, >= 0.
    """

    bytes_sent: float = 0.0
    messages: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes_sent + other.bytes_sent, self.messages + other.messages)


def all_reduce(payload: float, num_workers: int) -> Traffic:
    """Traffic of a ring all-reduce.

    Args:
        payload: Bytes that each worker holds.
        num_workers: Number of workers, K >= 1.

    Example:
        >>> all_reduce(100, num_workers=4)
        Traffic(bytes_sent=150.0, messages=6)
    """
    return Traffic(2 * (num_workers - 1) / num_workers * payload, 2 * (num_workers - 1))


def all_to_all(payload: float, num_workers: int) -> Traffic:
    """Traffic of an all-to-all: a slice of the payload for each worker, all sent at once."""
    return Traffic((num_workers - 1) / num_workers * payload, 1)


def all_gather(payload: float, num_workers: int) -> Traffic:
    """Traffic of a ring all-gather: each worker's payload for all others."""
    return Traffic((num_workers - 1) * payload, num_workers - 1)


@dataclass(frozen=True)
class Link:
    """Link between each worker and the others, used in both directions at once.

    Attributes:
        mbit: Rate in each direction, in 1e6 bits per second, > 0.
        latency: Seconds from sending to receiving, besides those that the bytes take, >= 0.

    Example:
        >>> round(Link(mbit=100).seconds(all_reduce(20e6, num_workers=2)), 2)
        1.67
    """

    mbit: float
    latency: float = 0.0

    def seconds(self, traffic: Traffic) -> float:
        """Time of a transfer, with the headers of its frames."""
        bits = 8 * traffic.bytes_sent * FRAME / SEGMENT
        return bits / (1e6 * self.mbit) + traffic.messages * self.latency


@dataclass(frozen=True)
class Round:
    """Steps, transfers and work of a round, independent of the link.

    Attributes:
        local_steps: Number of local steps, H >= 1.
        overlap_steps: Number of local steps during the transfer, Q < H; less than one step where gradients are sent
            during the backward pass.
        transfer: Traffic that overlaps with these steps.
        exposed: Traffic that overlaps with nothing.
        work_seconds: Seconds of the outer step, packing and coding, w.
    """

    local_steps: int
    overlap_steps: float
    transfer: Traffic
    exposed: Traffic = Traffic()
    work_seconds: float = 0.0


def data_parallel(payload: float, num_workers: int) -> Round:
    """Data-parallel training: an all-reduce of the gradients in every step, during the whole backward pass."""
    return Round(1, BACKWARD, all_reduce(payload, num_workers))


def round_seconds(a_round: Round, step_seconds: float, link: Link) -> float:
    """Time of a round.

    Args:
        a_round: Steps, transfers and work of the round.
        step_seconds: Seconds of a local step without any transfer, t > 0.
        link: Link between the workers.

    Example:
        >>> a_round = Round(local_steps=16, overlap_steps=4, transfer=Traffic(14.48e6), work_seconds=0.5)
        >>> [round(round_seconds(a_round, 0.1, Link(mbit)), 2) for mbit in (100, 1000)]  # 1.2 + max(0.4, 1.21) + 0.5
        [2.91, 2.1]
    """
    beside = a_round.overlap_steps * step_seconds
    sync = max(beside, link.seconds(a_round.transfer)) + link.seconds(a_round.exposed) + a_round.work_seconds
    return a_round.local_steps * step_seconds - beside + sync


def hidden_share(a_round: Round, step_seconds: float, link: Link) -> float:
    """Fraction of the transfer time that local steps can hide, in [0, 1]."""
    transfer = link.seconds(a_round.transfer)
    total = transfer + link.seconds(a_round.exposed)
    return min(transfer, a_round.overlap_steps * step_seconds) / total if total else 1.0


def local_steps_that_pay(a_round: Round, step_seconds: float, link: Link, share: float = 0.1) -> int:
    """Smallest H for which at most a given fraction of the round passes without local steps; the overlap is unchanged.

    Args:
        a_round: Round whose own H is ignored.
        step_seconds: Seconds of a local step, t > 0.
        link: Link between the workers.
        share: Largest fraction of the round without local steps, in (0, 1).

    Example:
        >>> plain, overlapped = Round(1, 0, Traffic(14.48e6)), Round(16, 12, Traffic(14.48e6))
        >>> [local_steps_that_pay(r, 0.1, Link(100)) for r in (plain, overlapped)]
        [110, 13]
    """
    idle = round_seconds(a_round, step_seconds, link) - a_round.local_steps * step_seconds
    least = math.ceil(round(idle * (1 - share) / (share * step_seconds), 9))
    return max(1, math.floor(a_round.overlap_steps) + 1, least)


def rate_where_equal(
    first: Round,
    second: Round,
    step_seconds: float,
    progress: float = 1.0,
    latency: float = 0.0,
    rates: tuple[float, float] = (0.1, 1e6),
) -> float | None:
    """Rate in Mbit/s up to which the first method is faster than the second.

    Args:
        first: Round of the method that gains on slow links.
        second: Round of the other method, usually data-parallel training.
        step_seconds: Seconds of a local step, t > 0.
        progress: Number of local steps of the second method that lower the loss as much as one of the first.
        latency: Latency of the link, in seconds.
        rates: Lowest and highest rate of the search.

    Returns:
        None if the first is slower at the lowest rate; the highest rate if it is still faster there.

    Example:
        >>> local, ddp = Round(16, 0, Traffic(20e6), work_seconds=0.4), Round(1, 0, Traffic(20e6))
        >>> round(rate_where_equal(local, ddp, 0.1, progress=0.8))  # 1.25 local steps for each step of DDP
        2742
    """

    def gain(mbit: float) -> float:
        link = Link(mbit, latency)
        ours, theirs = (round_seconds(r, step_seconds, link) / r.local_steps for r in (first, second))
        return theirs * progress - ours

    low, high = rates
    if gain(low) <= 0:
        return None
    if gain(high) > 0:
        return high
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    return low
