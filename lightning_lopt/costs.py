r"""Costs of methods on a link: bytes and seconds of their rounds, and the numbers of local steps that pay.

.. math:: T = (H - Q)\, t + \max(Q\, t, s) + e + w

T is the time of a round of H local steps of t seconds each, with a transfer of s seconds that overlaps with Q of these
steps, an exposed transfer of e seconds, and an outer step of w seconds. With w = 0, T is a lower bound for any
implementation.

`python -m lightning_lopt.costs --params 5e6 --mbit 100 --step-seconds 0.5 --workers 8` prints a table of all methods.

Source: gloo's collectives as torch calls them (`gloo/allreduce.cc`, `gloo/allgather.cc`, `gloo/transport/tcp/pair.cc`),
checked against measurements (examples/records/2026-11-30_costs).
"""

from __future__ import annotations

import argparse
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.compression import Codec, LinearCodec, TopK
from lightning_lopt.sync.options import SyncOptions
from lightning_lopt.sync.status import COMMON, NUM_ROWS

FRAME, SEGMENT = 1514, 1448  # bytes of an Ethernet frame, and those of them that TCP carries
PIECE = 2**20  # bytes that gloo's all-reduce sends in one message
FIRST_WINDOW = 10 * SEGMENT  # bytes that TCP sends at once after a pause (RFC 6928)
BACKWARD = 2 / 3  # fraction of a training step in its backward pass, which has twice the products of the forward pass
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes of gradients that torch's DDP reduces together
SAMPLE = 2**16  # coordinates of which a codec's bytes are counted


@dataclass(frozen=True)
class Collective:
    """Traffic of a collective, as one worker sees it.

    A message is sent when the receiver's notice that it is ready has arrived, so that the first one of a phase takes
    two latencies. Two messages are in flight at a time.

    Attributes:
        bytes_sent: Bytes of the payload, >= 0.
        phases: Number of phases, each of which begins when the one before it is over.
        messages: Number of messages in all phases.
        behind: Whether notices wait for data that is sent on the same connection, as between two workers.
    """

    bytes_sent: float = 0.0
    phases: int = 0
    messages: int = 0
    behind: bool = False


Transfer = Sequence[Collective]
Parameters = float | Sequence[Sequence[int]]  # their number, or the shapes of the tensors


def all_reduce(payload: float, num_workers: int) -> Collective:
    """Traffic of a ring all-reduce: a worker's part in pieces of 1 MiB, or two that are smaller, in 2(K-1) turns.

    Args:
        payload: Bytes that each worker holds.
        num_workers: Number of workers, K >= 1.

    Example:
        >>> all_reduce(100, num_workers=4)
        Collective(bytes_sent=150.0, phases=2, messages=12, behind=False)
    """
    turns = 2 * (num_workers - 1)
    pieces = max(2, math.ceil(payload / PIECE / num_workers))
    return Collective(turns / num_workers * payload, min(turns, 2), turns * pieces, behind=num_workers == 2)


def all_gather(payload: float, num_workers: int) -> Collective:
    """Traffic of a ring all-gather: each worker's payload for all others, in two pieces."""
    others = num_workers - 1
    return Collective(others * payload, min(others, 1), 2 * others, behind=num_workers == 2)


def all_to_all(payload: float, num_workers: int) -> Collective:
    """Traffic of an all-to-all: a slice of the payload for each worker, one after another."""
    others = num_workers - 1
    return Collective(others / num_workers * payload, others, others)


@dataclass(frozen=True)
class Link:
    """Link between each worker and the others, used in both directions at once.

    Attributes:
        mbit: Rate in each direction, in 1e6 bits per second, > 0.
        latency: Seconds from sending to receiving, besides those that the bytes take, >= 0.

    Example:
        >>> transfer = [all_reduce(20e6, num_workers=2)]
        >>> [round(Link(100, latency).seconds(transfer), 2) for latency in (0, 0.02)]
        [1.67, 2.07]
    """

    mbit: float
    latency: float = 0.0

    def seconds(self, transfer: Transfer) -> float:
        """Time of collectives that follow one another, with the headers of their frames."""
        return sum(map(self._seconds, transfer))

    def _seconds(self, collective: Collective) -> float:
        carried = self._carry(collective.bytes_sent)
        streamed = carried + 2 * collective.phases * self.latency
        in_turns = (carried if collective.behind else carried / 2) + collective.messages * self.latency
        return max(streamed, in_turns)

    def seconds_after_pause(self, transfer: Transfer) -> float:
        """Time of collectives after local steps, when TCP begins slowly: its window doubles until it fills the link."""
        largest = max((c.bytes_sent for c in transfer), default=0.0)
        filling = 2 * self.latency * 1e6 * self.mbit / 8
        doublings = math.log2(max(1.0, min(largest, PIECE, filling) / FIRST_WINDOW))
        return self.seconds(transfer) + max(0.0, doublings - 1) * 2 * self.latency

    def _carry(self, num_bytes: float) -> float:
        return 8 * num_bytes * FRAME / SEGMENT / (1e6 * self.mbit)


@dataclass(frozen=True)
class Round:
    """Steps, transfers and work of a round, independent of the link.

    Attributes:
        local_steps: Number of local steps, H >= 1.
        overlap_steps: Number of local steps during the transfer, Q < H; less than one step where gradients are sent
            during the backward pass.
        transfer: Collectives that overlap with these steps.
        exposed: Collectives that overlap with nothing.
        work_seconds: Seconds of the outer step, packing and coding, w.
    """

    local_steps: int
    overlap_steps: float
    transfer: Transfer
    exposed: Transfer = ()
    work_seconds: float = 0.0

    @property
    def bytes_sent(self) -> float:
        """Bytes that a worker sends."""
        return sum(collective.bytes_sent for collective in (*self.transfer, *self.exposed))


def data_parallel(payload: float, num_workers: int) -> Round:
    """Data-parallel training: all-reduces of buckets of gradients, during the backward pass but for the last bucket.

    Args:
        payload: Bytes of all gradients.
        num_workers: Number of workers, K >= 1.

    Example:
        >>> ddp = data_parallel(20 * 2**20, num_workers=2)
        >>> [c.bytes_sent / 2**20 for c in (*ddp.transfer, *ddp.exposed)]
        [1.0, 19.0]
    """
    last = min(max(payload - FIRST_BUCKET, 0.0), BUCKET)
    first = [all_reduce(payload - last, num_workers)]
    return Round(1, BACKWARD, first, [all_reduce(last, num_workers)] if last else [])


def sync_round(
    options: SyncOptions,
    local_steps: int,
    parameters: Parameters,
    num_workers: int,
    *,
    worker_grads: bool = False,
    work_seconds: float = 0.0,
) -> Round:
    """Round of local steps and a sync of float32 parameters; tensors that no optimizer steps are left out.

    Args:
        options: Options of the sync; where groups of tensors take turns, the round is that of one group.
        local_steps: Number of local steps, H >= 1.
        parameters: Number of parameters in training, or the shapes of their tensors, which a `LinearCodec` needs.
        num_workers: Number of workers, K >= 1.
        worker_grads: Whether the outer optimizer needs every worker's pseudo-gradient, as LAgg-A does.
        work_seconds: Seconds of the outer step.

    Raises:
        ValueError: The codec is linear, and no shapes are given.

    Example:
        >>> [round(sync_round(o, 16, 1e6, 4).bytes_sent / 1e6, 1) for o in (SyncOptions(), SyncOptions(density=0.1))]
        [6.0, 0.6]
        >>> from lightning_lopt import PowerSGD
        >>> round(sync_round(SyncOptions(compression=PowerSGD(4)), 16, [(1000, 1000)], 4).bytes_sent / 1e6, 2)
        0.05
    """
    selection = options.effective_selection
    sent = number_of(parameters) * getattr(selection, "density", 1.0) / selection.num_turns
    whole, extra = 4 * sent, 4  # the norm travels with the payload
    exposed: Transfer = ()
    if isinstance(options.codec, LinearCodec):
        if not isinstance(parameters, Sequence):
            raise ValueError(f"The bytes of {options.codec!r} depend on the shapes of the tensors: give these.")
        numels = [numel / selection.num_turns for numel in _summed(options.codec, parameters)]
        body = [all_reduce(4 * numel, num_workers) for numel in [*numels, 1]]
    elif options.codec is not None:
        code = sent * _code_bytes(options.codec)
        if worker_grads or options.codec.sparse:
            body = [all_gather(code, num_workers)]
        else:
            body = [all_to_all(code, num_workers), all_gather(code / num_workers, num_workers)]
        body.append(all_reduce(extra, num_workers))
    elif options.sharded:
        half = all_to_all(whole, num_workers)
        sums = 2 if worker_grads else 1  # over the shards: the norm, and that of a learned step
        body, exposed = [half, all_reduce(extra, num_workers)], [*[all_reduce(8, num_workers)] * sums, half]
    elif worker_grads:
        body = [all_gather(whole + extra, num_workers)]
    else:
        body = [all_reduce(whole + extra, num_workers)]
    return Round(local_steps, options.overlap_steps, [_status(num_workers), *body], exposed, work_seconds)


def _status(num_workers: int) -> Collective:
    """The small message before each sync."""
    size = 8 * (2 * len(COMMON) + NUM_ROWS * num_workers)
    return replace(all_reduce(size, num_workers), bytes_sent=2.0 * size if num_workers > 1 else 0.0)


def number_of(parameters: Parameters) -> float:
    """Number of parameters."""
    return sum(map(math.prod, parameters)) if isinstance(parameters, Sequence) else parameters


def _summed(codec: LinearCodec, shapes: Sequence[Sequence[int]]) -> list[int]:
    """Number of elements of each all-reduce of a codec."""
    numels: list[int] = []

    def mean(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        numels.append(sum(t.numel() for t in tensors))
        return tensors

    codec.reduce([torch.zeros(*shape) for shape in shapes], [None] * len(shapes), mean)
    return numels


def _code_bytes(codec: Codec) -> float:
    """Bytes per coordinate."""
    return len(codec.encode(torch.zeros(SAMPLE), [SAMPLE])) / SAMPLE


def waited_seconds(a_round: Round, step_seconds: float, link: Link) -> float:
    """Time of a round in which no local step runs, the work of the outer step included."""
    beside = a_round.overlap_steps * step_seconds
    waited = max(0.0, link.seconds_after_pause(a_round.transfer) - beside)
    return waited + link.seconds(a_round.exposed) + a_round.work_seconds


def round_seconds(a_round: Round, step_seconds: float, link: Link) -> float:
    """Time of a round.

    Args:
        a_round: Steps, transfers and work of the round.
        step_seconds: Seconds of a local step without any transfer, t > 0.
        link: Link between the workers.

    Example:
        >>> a_round = Round(16, overlap_steps=4, transfer=[Collective(14.48e6)], work_seconds=0.5)
        >>> [round(round_seconds(a_round, 0.1, Link(mbit)), 2) for mbit in (100, 1000)]  # 1.2 + max(0.4, 1.21) + 0.5
        [2.91, 2.1]
    """
    return a_round.local_steps * step_seconds + waited_seconds(a_round, step_seconds, link)


def hidden_share(a_round: Round, step_seconds: float, link: Link) -> float:
    """Fraction of the transfer time that local steps can hide, in [0, 1]."""
    transfer = link.seconds_after_pause(a_round.transfer)
    total = transfer + link.seconds(a_round.exposed)
    return min(transfer, a_round.overlap_steps * step_seconds) / total if total else 1.0


def least_local_steps(fits: Callable[[int], bool], most: int = 2**24) -> int | None:
    """Smallest number H of local steps with a property that all larger numbers have, too; None above `most`.

    Example:
        >>> least_local_steps(lambda local_steps: local_steps**2 >= 50)
        8
    """
    if not fits(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def local_steps_that_pay(
    round_of: Callable[[int], Round], step_seconds: float, link: Link, share: float = 0.1
) -> int | None:
    """Smallest H for which at most a given fraction of the round passes without local steps.

    Args:
        round_of: Function from H to the round.
        step_seconds: Seconds of a local step, t > 0.
        link: Link between the workers.
        share: Largest fraction of the round without local steps, in (0, 1).

    Example:
        >>> transfer = [Collective(14.48e6)]
        >>> plain, overlapped = (lambda h: Round(h, 0, transfer)), (lambda h: Round(h, h // 2, transfer))
        >>> [local_steps_that_pay(round_of, 0.1, Link(100)) for round_of in (plain, overlapped)]
        [110, 20]
    """

    def fits(local_steps: int) -> bool:
        a_round = round_of(local_steps)
        waited = waited_seconds(a_round, step_seconds, link)
        return waited <= share * (a_round.local_steps * step_seconds + waited) + 1e-12

    return least_local_steps(fits)


def local_steps_that_beat(
    other: Round, round_of: Callable[[int], Round], step_seconds: float, link: Link, progress: float = 1.0
) -> int | None:
    """Smallest H for which a method is faster than another one, usually data-parallel training; None if there is none.

    Args:
        other: Round of the other method.
        round_of: Function from H to the round.
        step_seconds: Seconds of a local step, t > 0.
        link: Link between the workers.
        progress: Number of steps of the other method that lower the loss as much as one local step.

    Example:
        >>> transfer = [Collective(14.48e6)]  # 1.21 s
        >>> local_steps_that_beat(Round(1, 0, transfer), lambda h: Round(h, 0, transfer), 0.1, Link(100), progress=0.25)
        6
    """
    limit = progress * round_seconds(other, step_seconds, link) / other.local_steps
    return least_local_steps(lambda h: round_seconds(round_of(h), step_seconds, link) < limit * h)


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
        >>> transfer = [Collective(20e6)]
        >>> local, ddp = Round(16, 0, transfer, work_seconds=0.4), Round(1, 0, transfer)
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


@dataclass(frozen=True)
class Method:
    """Options of a method of synchronisation.

    Attributes:
        options: Arguments of `SyncOptions`, except for the overlap.
        overlap: Fraction of the H local steps that run during the transfer, in [0, 1).
        worker_grads: Whether the outer optimizer needs every worker's pseudo-gradient.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    overlap: float = 0.0
    worker_grads: bool = False

    def sync_options(self, local_steps: int) -> SyncOptions:
        """Options of the syncs of rounds with H steps."""
        return SyncOptions(overlap_steps=int(self.overlap * local_steps), **self.options)

    def round(self, local_steps: int, parameters: Parameters, num_workers: int, work_seconds: float = 0.0) -> Round:
        """Model of a round with H steps."""
        options = self.sync_options(local_steps)
        return sync_round(
            options, local_steps, parameters, num_workers, worker_grads=self.worker_grads, work_seconds=work_seconds
        )


DDP = "DDP"
METHODS = {
    "Local SGD, SlowMo, DiLoCo, learned": Method(),
    "… a quarter of H in flight": Method(overlap=1 / 4),
    'compression="bf16"': Method({"compression": "bf16"}),
    'compression="int8"': Method({"compression": "int8"}),
    "compression=TopK(0.02)": Method({"compression": TopK(0.02)}),
    "density=0.1": Method({"density": 0.1}),
    "LOSCAR: … a quarter of H in flight": Method({"density": 0.1}, overlap=1 / 4),
    "LAgg-A, gathered": Method(worker_grads=True),
    "LAgg-A, sharded=True": Method({"sharded": True}, worker_grads=True),
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows of equal keys as text, with a column per key; None is left blank.

    Example:
        >>> print(table([{"name": "a", "seconds": 1.23456}, {"name": "bb", "seconds": None}]))
        name  seconds
        a       1.235
        bb
    """

    def show(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    columns = [[key, *(show(row[key]) for row in rows)] for key in (rows[0] if rows else ())]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for cells in zip(*columns, strict=True):  # none without rows
        first, *rest = zip(cells, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip())
    return "\n".join(lines)


class Costs:
    """Costs of all methods for one model, link and number of workers.

    Args:
        args: Arguments of the command line.

    Attributes:
        ddp: A step of data-parallel training.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._link = args, Link(args.mbit, args.latency)
        self.ddp = data_parallel(args.gradient_bytes * args.params, args.workers)

    def round(self, name: str, local_steps: int) -> Round:
        """Model of a round of a method."""
        args = self._args
        return METHODS[name].round(local_steps, args.params, args.workers, args.outer_seconds)

    def seconds_per_step(self, a_round: Round) -> float:
        """Time of a round, divided by the number of its local steps."""
        return round_seconds(a_round, self._args.step_seconds, self._link) / a_round.local_steps

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the table; those of data-parallel training are per step."""
        rows = [{**self._row(DDP, self.ddp), "H for 10 %": None, "H against DDP": None}]
        step_seconds, link = self._args.step_seconds, self._link
        for name in METHODS:

            def round_of(local_steps: int, name: str = name) -> Round:
                return self.round(name, local_steps)

            pays = local_steps_that_pay(round_of, step_seconds, link)
            beats = local_steps_that_beat(self.ddp, round_of, step_seconds, link, self._args.progress)
            least = {"H for 10 %": pays or "never", "H against DDP": beats or "never"}
            rows += [{**self._row(name, round_of(h)), **least} for h in self._args.local_steps]
        return rows

    def _row(self, name: str, a_round: Round) -> dict[str, Any]:
        link, t = self._link, self._args.step_seconds
        waited = waited_seconds(a_round, t, link)
        return {
            "method": name,
            "H": a_round.local_steps,
            "MB sent": a_round.bytes_sent / 1e6,
            "s on the wire": link.seconds_after_pause(a_round.transfer) + link.seconds(a_round.exposed),
            "s waited": waited,
            "% waited": round(100 * waited / (a_round.local_steps * t + waited), 1),
            "s per step": self.seconds_per_step(a_round),
        }

    def draw(self, path: Path) -> None:
        """Draw the seconds per local step over H."""
        from matplotlib.figure import Figure  # an extra

        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.subplots()
        last = math.ceil(4 * math.log2(max(1024, *self._args.local_steps)))
        steps = sorted({round(2 ** (i / 4)) for i in range(last + 1)})
        for name in METHODS:
            dashed = "--" if METHODS[name].worker_grads else "-"  # some have the costs of others
            axes.plot(steps, [self.seconds_per_step(self.round(name, h)) for h in steps], dashed, label=name)
        axes.axhline(self.seconds_per_step(self.ddp), color="black", linestyle=":", label=DDP)
        title = f"{self._args.params:g} parameters, {self._args.workers} workers, {self._link.mbit:g} Mbit/s"
        axes.set(xlabel="H", ylabel="seconds per local step", xscale="log", yscale="log", title=title)
        axes.legend(fontsize="small")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


ASSUMPTIONS = """\
Per worker and sync, of DDP per step. Every worker has a link of this rate of its own, used in both directions at once.
"s on the wire" is the time of gloo's collectives over TCP, with frames, notices and latencies; it was checked for 2 and
4 workers, up to 20 ms. "H against DDP" is for equal progress per step; local methods often need more steps to the same
loss: --progress. DDP's last bucket of gradients, of up to 25 MiB, is sent after the backward pass. Packing, coding and
unequal workers are not modelled, nor are the buffers of the model; outer steps are what --outer-seconds says.
PowerSGD, whose bytes depend on the shapes of the tensors, is not here: see `sync_round`.
RoundMonitor measures all of it: rounds/transfer_seconds, rounds/outer_seconds, rounds/sync_share."""


def positive(text: str) -> float:
    """Positive number of a command line, for `argparse`."""
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a positive number, such as 16, 0.5 or 5.4e6")


def not_negative(text: str) -> float:
    """Number of a command line that may be 0, for `argparse`."""
    return 0.0 if text.strip("0.") == "" else positive(text)


def count(text: str) -> int:
    """Positive integer of a command line, for `argparse`.

    Example:
        >>> count("5.4e6")
        5400000
    """
    number = positive(text)
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text} is not an integer")
    return int(number)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and draw the plot.

    Args:
        argv: Arguments of the command line; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lightning_lopt.costs",
        description="Bytes and seconds of each method on a link, and which H pays.",
    )
    parser.add_argument("--params", type=count, required=True, help="number of parameters in training")
    parser.add_argument("--mbit", type=positive, required=True, help="rate of each worker's link, in Mbit/s")
    parser.add_argument("--step-seconds", type=positive, required=True, help="seconds of a local step")
    parser.add_argument("--workers", type=count, required=True, help="number of workers, K")
    parser.add_argument("--latency", type=not_negative, default=0.0, help="seconds from one worker to another; 0")
    parser.add_argument("--local-steps", type=count, nargs="+", default=[16], help="numbers H of local steps; 16")
    parser.add_argument("--outer-seconds", type=not_negative, default=0.0, help="seconds of an outer step; 0")
    parser.add_argument("--gradient-bytes", type=count, default=4, help="bytes per gradient that DDP sends; 4")
    parser.add_argument(
        "--progress", type=positive, default=1.0, help="steps of DDP that lower the loss as much as a local step; 1"
    )
    parser.add_argument("--png", type=Path, help="file for a plot of the seconds per local step over H")
    args = parser.parse_args(argv)
    costs = Costs(args)
    print(table(costs.rows()), ASSUMPTIONS, sep="\n\n")
    if args.png:
        costs.draw(args.png)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as `head` expects
    main()
