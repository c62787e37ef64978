"""A model of the network: how long a round takes on a link, and which numbers of local steps pay.

    round = (H - Q) t + max(Q t, s) + e + w

for H local steps of t seconds, a transfer s of which Q steps run beside, and what nothing runs beside: a transfer e and
the work w of the outer step. With w = 0 it is a bound: what no implementation can do without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FRAME, SEGMENT = 1514, 1448  # bytes of an Ethernet frame, and those of them that TCP carries
BACKWARD = 2 / 3  # share of the backward pass in a training step: twice the products of the forward pass


@dataclass(frozen=True)
class Traffic:
    """What a worker sends in a sync.

    Attributes:
        bytes_sent: payload.
        messages: that are sent one after the other.
    """

    bytes_sent: float = 0.0
    messages: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes_sent + other.bytes_sent, self.messages + other.messages)


def all_reduce(payload: float, num_workers: int) -> Traffic:
    """A ring all-reduce.

    Args:
        payload: bytes that each worker has.
        num_workers: K.

    Example:
        >>> all_reduce(100, num_workers=4)
        Traffic(bytes_sent=150.0, messages=6)
    """
    return Traffic(2 * (num_workers - 1) / num_workers * payload, 2 * (num_workers - 1))


def all_to_all(payload: float, num_workers: int) -> Traffic:
    """A slice of the payload for each worker, all at once."""
    return Traffic((num_workers - 1) / num_workers * payload, 1)


def all_gather(payload: float, num_workers: int) -> Traffic:
    """Each worker's payload for all, along a ring."""
    return Traffic((num_workers - 1) * payload, num_workers - 1)


@dataclass(frozen=True)
class Link:
    """What joins each worker with the others, in both directions at once.

    Attributes:
        mbit: rate in each direction, in 1e6 bits per second.
        latency: seconds from sending to receiving, besides what the bytes take.

    Example:
        >>> round(Link(mbit=100).seconds(all_reduce(20e6, num_workers=2)), 2)
        1.67
    """

    mbit: float
    latency: float = 0.0

    def seconds(self, traffic: Traffic) -> float:
        """The time of a transfer, with the headers of its frames."""
        bits = 8 * traffic.bytes_sent * FRAME / SEGMENT
        return bits / (1e6 * self.mbit) + traffic.messages * self.latency


@dataclass(frozen=True)
class Round:
    """What a round does, whatever the link.

    Attributes:
        local_steps: H.
        overlap_steps: Q; part of a step where gradients leave while the backward pass goes on.
        transfer: what is sent beside these.
        exposed: what is sent while nothing else happens.
        work_seconds: of the outer step, packing and coding.
    """

    local_steps: int
    overlap_steps: float
    transfer: Traffic
    exposed: Traffic = Traffic()
    work_seconds: float = 0.0


def data_parallel(payload: float, num_workers: int) -> Round:
    """A gradient all-reduce in every step that overlaps the whole backward pass."""
    return Round(1, BACKWARD, all_reduce(payload, num_workers))


def round_seconds(a_round: Round, step_seconds: float, link: Link) -> float:
    """The time of a round.

    Args:
        a_round: what it does.
        step_seconds: t, of a local step that sends nothing.
        link: between the workers.

    Example:
        >>> a_round = Round(local_steps=16, overlap_steps=4, transfer=Traffic(14.48e6), work_seconds=0.5)
        >>> [round(round_seconds(a_round, 0.1, Link(mbit)), 2) for mbit in (100, 1000)]  # 1.2 + max(0.4, 1.21) + 0.5
        [2.91, 2.1]
    """
    beside = a_round.overlap_steps * step_seconds
    sync = max(beside, link.seconds(a_round.transfer)) + link.seconds(a_round.exposed) + a_round.work_seconds
    return a_round.local_steps * step_seconds - beside + sync


def hidden_share(a_round: Round, step_seconds: float, link: Link) -> float:
    """The share of all transfers that local steps can hide, in [0, 1]."""
    transfer = link.seconds(a_round.transfer)
    total = transfer + link.seconds(a_round.exposed)
    return min(transfer, a_round.overlap_steps * step_seconds) / total if total else 1.0


def local_steps_that_pay(a_round: Round, step_seconds: float, link: Link, share: float = 0.1) -> int:
    """The smallest H at which the sync lengthens training by at most a share; the overlap stays as it is.

    Args:
        a_round: its own H does not count.
        step_seconds: t.
        link: between the workers.
        share: of the round in which no local step runs, in (0, 1).

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
    """The rate in Mbit/s up to which the first method is faster than the second.

    Args:
        first: gains where the link is slow.
        second: usually data-parallel training.
        step_seconds: t.
        progress: local steps of the second that do as much for the loss as one of the first.
        latency: of the link.
        rates: where to look.

    Returns:
        None if it is slower at the lowest rate; the highest rate if it is faster there, too.

    Example:
        >>> local, ddp = Round(16, 0, Traffic(20e6), work_seconds=0.4), Round(1, 0, Traffic(20e6))
        >>> round(rate_where_equal(local, ddp, 0.1, progress=0.8))  # 0.125 s more of local steps for each 1 of DDP's
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
