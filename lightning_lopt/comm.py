"""The collectives of a round, counted in bytes. Without a process group they are the identity."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_ANY = -(2**62)  # below every integer that workers compare


class DisagreementError(RuntimeError):
    """The workers differ in what must be the same: model, options, round, steps, weights, or the point of waiting."""


class CommonInteger(NamedTuple):
    """An integer on which all workers must agree.

    Attributes:
        name: Noun phrase for an error message.
        advice: Sentences about causes and remedies of a disagreement.
        shown: Whether an error message shows its values, which say something if it is a count, not a checksum.
        listed: Whether it stands for a list of lines, of which an error message shows the first that differs.
    """

    name: str
    advice: str = ""
    shown: bool = False
    listed: bool = False


MODEL = CommonInteger(
    "the model", "Build the same model on every worker (the same arguments, no branch on the rank).", listed=True
)


class Communicator:
    """Collectives among the workers, in a process group of their own.

    Creating one is itself a collective: all workers must do it, in the same order. Metrics and other collectives of
    the default group do not queue behind a transfer of this one.

    Args:
        timeout: Time after which a collective fails that some worker does not join; None for torch's default.
        ranks_per_worker: Number of consecutive ranks that are one worker, with the same parameters at all times. The
            first of them talks to the other workers, and tells the rest.
        backend: Object with the collectives of `torch.distributed` by their names; a `VirtualGroup` for workers in
            one process.

    Attributes:
        num_workers: K.
        rank: Rank of this worker among the workers.
        bytes_sent: Bytes that this worker has sent, by the ring algorithms' count: 2(K-1)/K of the payload for an
            all-reduce, (K-1)/K for an all-to-all, K-1 payloads for an all-gather, one payload on rank 0 for a
            broadcast.
        num_collectives: Number of collectives so far.

    Raises:
        ValueError: `ranks_per_worker` does not divide the number of processes.

    Example:
        >>> comm = Communicator()  # no process group: one worker, nothing to send
        >>> flat = torch.ones(3)
        >>> comm.mean_(flat)
        >>> comm.num_workers, comm.bytes_sent, flat.tolist()
        (1, 0, [1.0, 1.0, 1.0])
    """

    def __init__(self, timeout: timedelta | None = None, ranks_per_worker: int = 1, backend: Any = dist) -> None:
        self._dist = backend
        connected = dist.is_available() and backend.is_initialized()
        world, rank = (backend.get_world_size(), backend.get_rank()) if connected else (1, 0)
        if ranks_per_worker < 1 or world % ranks_per_worker:
            raise ValueError(
                f"{world} processes cannot be workers of {ranks_per_worker} ranks each: ranks_per_worker must divide "
                "their number."
            )
        self.num_workers = world // ranks_per_worker
        self.rank = rank // ranks_per_worker
        self._timeout, self._ranks_per_worker = timeout, ranks_per_worker
        self._world: dist.ProcessGroup | None = None
        if world > 1:
            self._world = self._new_group([list(range(world))])
        self._group, self._inside = self._world, None
        if ranks_per_worker > 1:
            self._group = self._new_group([list(range(0, world, ranks_per_worker))])
            self._inside = self.new_group_inside()
        self.bytes_sent = 0
        self.num_collectives = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Communicator:
        return self  # there is one process group, and copies of callbacks and strategies use it too

    def _new_group(self, all_ranks: list[list[int]]) -> dist.ProcessGroup | None:
        """Make all of these groups, on all ranks, and return the one that this rank is in, if any."""
        groups = [self._dist.new_group(ranks, timeout=self._timeout) for ranks in all_ranks]
        return next((g for g in groups if g is not dist.GroupMember.NON_GROUP_MEMBER), None)

    def new_group_inside(self) -> dist.ProcessGroup | None:
        """Make a process group of the ranks of this worker; all ranks must call it."""
        size = self._ranks_per_worker
        return self._new_group([list(range(i * size, (i + 1) * size)) for i in range(self.num_workers)])

    @property
    def _connected(self) -> bool:
        return self._world is not None

    def _count(self, tensor: Tensor, factor: float) -> None:
        self.num_collectives += 1
        self.bytes_sent += round(tensor.numel() * tensor.element_size() * factor)

    def _share(self, result: Tensor) -> Tensor:
        """Give the result of the first rank of this worker to its other ranks."""
        if self._inside is not None:
            self._dist.broadcast(result, group=self._inside, group_src=0)
        return result

    def mean_(self, flat: Tensor) -> None:
        """Replace a contiguous tensor by its mean over the workers, bitwise the same on all of them."""
        if self._group is not None:
            self._count(flat, 2 * (self.num_workers - 1) / self.num_workers)
            self._dist.all_reduce(flat, group=self._group)
            flat.div_(self.num_workers)
        self._share(flat)

    def sum_(self, values: Tensor) -> None:
        """Replace a contiguous tensor by its sum over the workers."""
        self._reduce(values, dist.ReduceOp.SUM)

    def max_(self, values: Tensor) -> None:
        """Replace a contiguous tensor by its maximum over the workers."""
        self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, op: Any) -> None:
        if self._group is not None:
            self._count(values, 2 * (self.num_workers - 1) / self.num_workers)
            self._dist.all_reduce(values, op=op, group=self._group)
        self._share(values)

    def gather(self, flat: Tensor) -> Tensor:
        """Stack the tensors of all workers in the order of their ranks, [n] -> [K, n]."""
        if not self._connected:
            return flat.unsqueeze(0)
        stacked = flat.new_empty(self.num_workers, *flat.shape)
        if self._group is not None:
            self._count(flat, self.num_workers - 1)
            self._dist.all_gather(list(stacked.unbind(0)), flat, group=self._group)
        return self._share(stacked)

    def all_to_all(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send consecutive slices to worker 0, 1, ..., and return the slices that they send here, in the same order.

        Args:
            flat: Contiguous tensor, [n].
            send: Length of the slice for each worker.
            receive: Length of the slice from each worker.
        """
        if not self._connected:
            return flat
        received = flat.new_empty(sum(receive))
        if self._group is not None:
            self._count(flat, 1 - send[self.rank] / max(1, len(flat)))
            if self._dist is dist and flat.device.type == "cpu":
                self._swap_slices(flat.split(list(send)), received.split(list(receive)))
            else:
                self._dist.all_to_all_single(received, flat, list(receive), list(send), group=self._group)
        return self._share(received)

    def _swap_slices(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        """An all-to-all in K-1 turns; in each, every worker sends to one and receives from one, both at once.

        gloo's own says that it is ready to receive behind what it sends, so that the two directions take turns.
        """
        incoming[self.rank].copy_(outgoing[self.rank])
        for turn in range(1, self.num_workers):
            to, source = (self.rank + turn) % self.num_workers, (self.rank - turn) % self.num_workers
            arrival = dist.irecv(incoming[source], group=self._group, group_src=source)
            assert arrival is not None  # this worker is in the group
            dist.send(outgoing[to], group=self._group, group_dst=to)
            arrival.wait()

    def total(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Sum each number over the workers."""
        flat = torch.tensor(values, dtype=torch.float64, device=device)
        self.mean_(flat)
        return flat.mul_(self.num_workers).tolist()

    def gather_objects(self, item: Any) -> list[Any] | None:
        """Gather picklable objects of all processes on rank 0, in the order of their ranks; None on the others."""
        if self._world is None:
            return [item]
        self.num_collectives += 1
        first = self._dist.get_rank(self._world) == 0
        items = [None] * self._dist.get_world_size(self._world) if first else None
        self._dist.gather_object(item, items, group=self._world, group_dst=0)
        return items

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with those of rank 0, on all processes."""
        if self._world is None:
            return
        for tensor in tensors:
            self._count(tensor, 1 if self._dist.get_rank(self._world) == 0 else 0)
            values = tensor.detach().contiguous()
            self._dist.broadcast(values.flatten().view(torch.uint8), group=self._world, group_src=0)  # carries any type
            tensor.detach().copy_(values)

    def agree(
        self,
        device: torch.device,
        equal: Mapping[CommonInteger, int | Sequence[str] | None],
        largest: Sequence[int] = (),
    ) -> list[int]:
        """Check that all workers pass the same integers; return the largest of others, of each over the workers.

        One small integer all-reduce, before the payload: a mean cannot notice a disagreement.

        Args:
            device: Device on which the process group communicates.
            equal: Integers that must be the same on all workers, or lines of text, of which the digest must be; None is
                equal to any.
            largest: Integers of which the maximum is wanted, as many on all workers; flags among them are combined by
                "or".

        Raises:
            DisagreementError: One of the integers differs; on every worker.
        """
        if self._world is None:
            return [*largest]
        own = [v if isinstance(v, int | None) else digest("\n".join(v)) for v in equal.values()]
        high = [_ANY if v is None else v for v in own]
        low = [_ANY if v is None else -v for v in own]
        vector = torch.tensor([*high, *low, *largest], dtype=torch.int64, device=device)
        self._count(vector, 2)
        self._dist.all_reduce(vector, op=dist.ReduceOp.MAX, group=self._world)
        values = vector.tolist()
        high, low = values[: len(own)], values[len(own) : 2 * len(own)]
        triples = zip(equal.items(), high, low, strict=True)
        if wrong := [(common, value, -b, a) for (common, value), a, b in triples if a not in (_ANY, -b)]:
            said = [f"{common.name}{self._difference(value, b, a, common)}" for common, value, b, a in wrong]
            advice = dict.fromkeys(common.advice for common, *_ in wrong)
            raise DisagreementError(
                " ".join(
                    [f"The workers disagree on {', '.join(said)}; this is worker {self.rank}.", *filter(None, advice)]
                )
            )
        return values[2 * len(own) :]

    def _difference(self, value: int | Sequence[str] | None, least: int, most: int, common: CommonInteger) -> str:
        """Say in what the workers' values of an integer differ, which all of them have found; collective if listed."""
        if common.shown:
            return f" (between {least} and {most}, here {'any' if value is None else value})"
        if not common.listed:
            return ""
        all_lines: list[list[str] | None] = [None] * self._dist.get_world_size(self._world)
        self._dist.all_gather_object(all_lines, None if isinstance(value, int | None) else [*value], group=self._world)
        given = [(rank, lines) for rank, lines in enumerate(all_lines) if lines is not None]
        (first, lines), (other, others) = given[0], next(pair for pair in given if pair[1] != given[0][1])
        at = next((i for i, pair in enumerate(zip(lines, others, strict=False)) if pair[0] != pair[1]), None)
        if at is None:
            shorter = min(len(lines), len(others))
            who, more = (first, lines) if len(lines) > shorter else (other, others)
            return f" (rank {who} alone has {more[shorter]!r})"
        return f" (rank {first} has {lines[at]!r}, rank {other} has {others[at]!r})"


def digest(text: str) -> int:
    """Hash a text to an integer for `Communicator.agree`; other texts give, almost surely, other integers."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
