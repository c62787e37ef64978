"""The collectives of a round, counted in bytes. Without a process group they are the identity."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_ANY = -(2**62)  # below every integer that workers compare


class DisagreementError(RuntimeError):
    """The workers differ in what must be the same: model, options, round, steps, weights, or the point of waiting."""


class GroupBrokenError(RuntimeError):
    """A collective failed since a worker of the group is gone; those who are left may meet and repeat it."""


class Members(NamedTuple):
    """Workers that take part from here on.

    Attributes:
        workers: Identifiers of the workers, in the order of their ranks; empty for a worker that has left.
        rounds: Finished rounds of each, as it said when they met.
        backend: Object with the collectives of `torch.distributed` among them by their names, which raise a
            `GroupBrokenError` when a worker is gone.
    """

    workers: Sequence[int]
    rounds: Sequence[int]
    backend: Any


class Membership(Protocol):
    """Workers that come and go between rounds."""

    @property
    def worker_id(self) -> int:
        """Number of this worker, the same whenever it is started."""
        ...

    @property
    def max_workers(self) -> int:
        """Number of workers that there can be."""
        ...

    def meet(self, round_idx: int, *, settings: Mapping[str, str], repeats: bool, leaves: bool) -> Members:
        """Wait for all workers that are there, and return those that take part from here on.

        Args:
            round_idx: Number of finished rounds of this worker; -1 for one that has just begun.
            settings: Texts by their names that are the same on all workers of a run.
            repeats: Whether a sync broke and is to be repeated, so that nobody may join.
            leaves: Whether this worker leaves.
        """
        ...

    def disconnect(self) -> None:
        """Break the group, in which others may wait for this worker."""
        ...

    def close(self) -> None:
        """Be gone, at once."""
        ...


def check_timeout(timeout: timedelta | None) -> None:
    """Refuse a time limit that is not one.

    Raises:
        ValueError: The argument is neither a positive `timedelta` nor None.
    """
    if timeout is not None and not (isinstance(timeout, timedelta) and timeout > timedelta(0)):
        raise ValueError(f"timeout must be a positive datetime.timedelta, as timedelta(minutes=5) is, not {timeout!r}.")


def count_workers(num_processes: int, ranks_per_worker: int) -> int:
    """The number of workers K.

    Raises:
        ValueError: `ranks_per_worker` does not divide the number of processes.
    """
    if ranks_per_worker < 1 or num_processes % ranks_per_worker:
        raise ValueError(
            f"{num_processes} processes cannot be workers of {ranks_per_worker} ranks each: ranks_per_worker must "
            "divide their number."
        )
    return num_processes // ranks_per_worker


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


class Difference(NamedTuple):
    """An integer on which the workers do not agree.

    Attributes:
        integer: The integer.
        own: Its value on this worker, or the lines that it stands for; None if any would do.
        least: Its smallest value.
        most: Its largest value.
    """

    integer: CommonInteger
    own: int | Sequence[str] | None
    least: int
    most: int


class Communicator:
    """Collectives among the workers, in a process group of their own.

    Creating one is itself a collective: all workers must do it, in the same order. Metrics and other collectives of
    the default group do not queue behind a transfer of this one.

    Args:
        timeout: Time after which a collective fails that some worker does not join; None for torch's default.
        ranks_per_worker: Number of consecutive ranks that are one worker, with the same parameters at all times. Each
            of them sends its share of the values, and tells the others what it receives; in small messages the first
            talks for all.
        by_column: Whether the ranks of a worker hold different parts of one model instead, so that each talks to the
            same rank of the other workers, and they add up inside what belongs to the whole.
        backend: Object with the collectives of `torch.distributed` by their names; a `VirtualGroup` for workers in
            one process. None for a worker that is alone until `regroup`.

    Attributes:
        num_workers: K, which `regroup` changes: ask for it in each round.
        rank: Rank of this worker among the workers, which changes likewise.
        fixed: Whether K never changes.
        workers: Identifiers of the workers, in the order of their ranks.
        bytes_sent: Bytes that this rank has sent to other workers, by the ring algorithms' count: 2(K-1)/K of the
            payload for an all-reduce, (K-1)/K for an all-to-all, K-1 payloads for an all-gather, one payload on rank 0
            for a broadcast.
        num_collectives: Number of collectives so far.

    Raises:
        ValueError: `ranks_per_worker` does not divide the number of processes, or `timeout` is not a positive
            `timedelta`.

    Example:
        >>> comm = Communicator()  # no process group: one worker, nothing to send
        >>> flat = torch.ones(3)
        >>> comm.mean_(flat)
        >>> comm.num_workers, comm.bytes_sent, flat.tolist()
        (1, 0, [1.0, 1.0, 1.0])
    """

    def __init__(
        self,
        timeout: timedelta | None = None,
        ranks_per_worker: int = 1,
        backend: Any = dist,
        *,
        by_column: bool = False,
    ) -> None:
        check_timeout(timeout)
        self._dist = backend
        world, rank = 1, 0
        if backend is not None and dist.is_available() and backend.is_initialized():
            world, rank = backend.get_world_size(), backend.get_rank()
        self.num_workers = count_workers(world, ranks_per_worker)
        self.rank = rank // ranks_per_worker
        self.workers = tuple(range(self.num_workers))
        self.fixed = backend is not None
        self._timeout, self._ranks_per_worker = timeout, ranks_per_worker
        self._world: dist.ProcessGroup | None = None
        if world > 1:
            self._world = self._new_group([list(range(world))])
        self._group = self._column = self._world  # of those that talk to other workers; of the same rank of each worker
        self._inside: dist.ProcessGroup | None = None  # the ranks of this worker, if they hold the same
        self._island: dist.ProcessGroup | None = None  # the ranks of this worker, if they hold different parts
        if ranks_per_worker > 1:
            # Groups of their own: a sync in flight must not queue among the collectives of the training step.
            self._column = self._new_group([list(range(r, world, ranks_per_worker)) for r in range(ranks_per_worker)])
            inside = self.new_group_inside()
            if by_column:
                self._group, self._island = self._column, inside
            else:
                self._group, self._inside = self._column if rank % ranks_per_worker == 0 else None, inside
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

    def regroup(self, members: Members) -> None:
        """Go on with other workers, each of one rank, when no collective is under way."""
        self._dist, self.workers = members.backend, tuple(members.workers)
        self.num_workers = max(1, len(self.workers))
        several = self.num_workers > 1
        self.rank = self._dist.get_rank() if several else 0
        self._world = self._new_group([list(range(self.num_workers))]) if several else None
        self._group = self._column = self._world

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of the first worker."""
        return self._world is None or self._dist.get_rank(self._world) == 0

    @property
    def _equals(self) -> dist.ProcessGroup | None:
        """All ranks that hold the same: those of this column, or every rank."""
        return self._world if self._island is None else self._group

    # -- inside a worker whose ranks hold different parts ----------------------------------------------------------

    @property
    def ranks_inside(self) -> list[int]:
        """Ranks of this worker, if each holds a part of its own; otherwise this one alone."""
        rank = self._dist.get_rank(self._world) if self._world is not None else 0
        first = rank - rank % self.inside_size
        return list(range(first, first + self.inside_size))

    @property
    def inside_size(self) -> int:
        """Number of ranks of a worker that hold different parts."""
        return 1 if self._island is None else self._ranks_per_worker

    @property
    def ranks_sharing(self) -> int:
        """Number of ranks of a worker that hold the same values, of each mean of which they send a share."""
        return 1 if self._inside is None else self._ranks_per_worker

    @property
    def inside_rank(self) -> int:
        """Number of this rank among them."""
        return 0 if self._island is None else self._dist.get_rank(self._island)

    def inside_total(self, values: Tensor) -> Tensor:
        """Sum over the parts of a worker."""
        if self._island is not None:
            values = values.clone()
            self._dist.all_reduce(values, group=self._island)
        return values

    def any_inside(self, flag: bool, device: torch.device) -> bool:
        """Whether a flag is set on any rank of a worker whose ranks hold different parts.

        Args:
            flag: Flag of this rank.
            device: Device on which the process group communicates.
        """
        return flag if self._island is None else bool(self.inside_total(torch.tensor(float(flag), device=device)))

    def averages_inside(self, device: torch.device) -> bool:
        """Whether the backend's mean over the ranks of this worker is one.

        gloo refuses it in some releases of torch, and in others its reduce-scatter returns the sum (pytorch#162338).

        Args:
            device: Device on which the process group communicates.
        """
        if self._island is None:
            return True
        size = self.inside_size
        share, values = torch.empty(1, device=device), torch.full((size,), float(self.inside_rank), device=device)
        reduce_scatter = getattr(self._dist, "reduce_scatter_single", None) or self._dist.reduce_scatter_tensor
        try:
            reduce_scatter(share, values, op=dist.ReduceOp.AVG, group=self._island)
        except RuntimeError:
            return False
        return share.item() == (size - 1) / 2

    def gather_inside(self, item: Any) -> list[Any]:
        """Gather picklable objects of the ranks of this worker, in their order, on each of them."""
        if self._island is None:
            return [item]
        items = [None] * self.inside_size
        self._dist.all_gather_object(items, item, group=self._island)
        return items

    def all_to_all_inside(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send consecutive slices to the ranks of this worker, and return the slices that they send here.

        Args:
            flat: Contiguous tensor, [n].
            send: Length of the slice for each rank.
            receive: Length of the slice from each rank.
        """
        if self._island is None:
            return flat.clone()
        received = flat.new_empty(sum(receive))
        self._dist.all_to_all_single(received, flat, list(receive), list(send), group=self._island)
        return received

    # -- between workers ------------------------------------------------------------------------------------------

    def _count(self, tensor: Tensor, factor: float) -> None:
        self.num_collectives += 1
        self.bytes_sent += round(tensor.numel() * tensor.element_size() * factor)

    def _share_inside(self, results: Sequence[Tensor]) -> None:
        """Give what each rank of this worker has received, in their order, to its other ranks."""
        for rank, result in enumerate(results):
            if result.numel():
                self._dist.broadcast(result, group=self._inside, group_src=rank)

    def mean_(self, flat: Tensor) -> None:
        """Replace a contiguous tensor by its mean over the workers, bitwise the same on all of them."""
        if self._inside is None:
            self._mean_(flat)
            return
        shares = flat.tensor_split(self._ranks_per_worker)
        self._mean_(shares[self._dist.get_rank(self._inside)])
        self._share_inside(shares)

    def _mean_(self, flat: Tensor) -> None:
        if self._column is not None and len(flat):
            self._count(flat, 2 * (self.num_workers - 1) / self.num_workers)
            self._dist.all_reduce(flat, group=self._column)
            flat.div_(self.num_workers)

    def means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Average each of several tensors of one device over the workers, in one all-reduce of their common type."""
        return jointly(tensors, self.mean_) if tensors else []

    def sum_(self, values: Tensor, *, inside: bool = True) -> None:
        """Replace a contiguous tensor by its sum over the workers, and over the parts of each unless told otherwise."""
        self._reduce(values, dist.ReduceOp.SUM, inside)

    def max_(self, values: Tensor, *, inside: bool = True) -> None:
        """Replace a contiguous tensor by its maximum over the workers, and over their parts unless told otherwise."""
        self._reduce(values, dist.ReduceOp.MAX, inside)

    def _reduce(self, values: Tensor, op: Any, inside: bool) -> None:
        if self._group is not None:
            self._count(values, 2 * (self.num_workers - 1) / self.num_workers)
            self._dist.all_reduce(values, op=op, group=self._group)
            if self._island is not None and inside:
                self._dist.all_reduce(values, op=op, group=self._island)
        if self._inside is not None:
            self._share_inside([values])

    def gather(self, flat: Tensor) -> Tensor:
        """Stack the tensors of all workers in the order of their ranks, [n] -> [K, n]."""
        if self._inside is None:
            return self._gather(flat)
        shares = flat.tensor_split(self._ranks_per_worker)
        stacked = [flat.new_empty(self.num_workers, len(share)) for share in shares]
        own = self._dist.get_rank(self._inside)
        stacked[own] = self._gather(shares[own])
        self._share_inside(stacked)
        return torch.cat(stacked, 1)

    def _gather(self, flat: Tensor) -> Tensor:
        if self._column is None:
            return flat.unsqueeze(0).clone()
        stacked = flat.new_empty(self.num_workers, *flat.shape)
        if len(flat):
            self._count(flat, self.num_workers - 1)
            self._dist.all_gather(list(stacked.unbind(0)), flat, group=self._column)
        return stacked

    def all_to_all(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send consecutive slices to worker 0, 1, ..., and return the slices that they send here, in the same order.

        Args:
            flat: Contiguous tensor, [n].
            send: Length of the slice for each worker.
            receive: Length of the slice from each worker.
        """
        if self._inside is None:
            return self._all_to_all(flat, send, receive)
        received = flat.new_empty(sum(receive))
        outgoing, incoming = (
            [part.tensor_split(self._ranks_per_worker) for part in tensor.split(list(lengths))]
            for tensor, lengths in ((flat, send), (received, receive))
        )
        slots = [*zip(*incoming, strict=True)]  # of each rank of this worker, one for each worker that sends
        lengths = [[len(slot) for slot in own] for own in slots]
        arrived = [flat.new_empty(sum(own)) for own in lengths]
        rank = self._dist.get_rank(self._inside)
        shares = [part[rank] for part in outgoing]
        arrived[rank] = self._all_to_all(torch.cat(shares), [len(share) for share in shares], lengths[rank])
        self._share_inside(arrived)
        for own, values, sizes in zip(slots, arrived, lengths, strict=True):
            for slot, part in zip(own, values.split(sizes), strict=True):
                slot.copy_(part)
        return received

    def _all_to_all(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        if self._column is None:
            return flat.clone()  # what arrives is the caller's, as from others
        received = flat.new_empty(sum(receive))
        self._count(flat, 1 - send[self.rank] / max(1, len(flat)))
        if self._dist is dist and flat.device.type == "cpu":
            self._swap_slices(flat.split(list(send)), received.split(list(receive)))
        else:
            self._dist.all_to_all_single(received, flat, list(receive), list(send), group=self._column)
        return received

    def _swap_slices(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        """An all-to-all in K-1 turns; in each, every worker sends to one and receives from one, both at once.

        gloo's own says that it is ready to receive behind what it sends, so that the two directions take turns.
        """
        incoming[self.rank].copy_(outgoing[self.rank])
        for turn in range(1, self.num_workers):
            to, source = (self.rank + turn) % self.num_workers, (self.rank - turn) % self.num_workers
            arrival = dist.irecv(incoming[source], group=self._column, group_src=source)
            assert arrival is not None  # this worker is in the group
            dist.send(outgoing[to], group=self._column, group_dst=to)
            arrival.wait()

    def send(self, flat: Tensor, to: int) -> None:
        """Send a contiguous tensor of bytes, [n], to a worker that calls `receive`.

        Args:
            flat: Tensor of the type uint8 on the CPU.
            to: Rank of the worker.
        """
        self._count(flat, 1)
        self._dist.send(torch.tensor([len(flat)]), group=self._group, group_dst=to)
        self._dist.send(flat, group=self._group, group_dst=to)

    def receive(self, source: int) -> Tensor:
        """Return the bytes that a worker sends here.

        Args:
            source: Rank of the worker.
        """
        length = torch.zeros(1, dtype=torch.int64)
        self._dist.recv(length, group=self._group, group_src=source)
        flat = torch.empty(int(length), dtype=torch.uint8)
        self._dist.recv(flat, group=self._group, group_src=source)
        return flat

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
        """Overwrite the tensors with those of rank 0, on all processes; with those of worker 0 where it has parts."""
        if self._world is None:
            return
        group = self._equals
        for tensor in tensors:
            self._count(tensor, 1 if self._dist.get_rank(group) == 0 else 0)
            values = tensor.detach().contiguous()
            self._dist.broadcast(values.flatten().view(torch.uint8), group=group, group_src=0)  # carries any type
            tensor.detach().copy_(values)

    def agree(
        self,
        device: torch.device,
        equal: Mapping[CommonInteger, int | Sequence[str] | None],
        largest: Sequence[int] = (),
        num_own: int = 0,
    ) -> list[int]:
        """Check that all workers pass the same integers; return the largest of others, of each over the workers.

        One small integer all-reduce, before the payload: a mean cannot notice a disagreement.

        Args:
            device: Device on which the process group communicates.
            equal: Integers that must be the same on all workers, or lines of text, of which the digest must be; None is
                equal to any.
            largest: Integers of which the maximum is wanted, as many on all workers; flags among them are combined by
                "or".
            num_own: Number of these, the last ones, that belong to what only this rank of a worker holds: the maximum
                is over the same rank of the other workers.

        Raises:
            DisagreementError: One of the integers differs; on every worker.
        """
        differences, values = self.compare(device, equal, largest, num_own)
        if differences:
            raise DisagreementError(self.explain(differences))
        return values

    def compare(
        self,
        device: torch.device,
        equal: Mapping[CommonInteger, int | Sequence[str] | None],
        largest: Sequence[int] = (),
        num_own: int = 0,
    ) -> tuple[list[Difference], list[int]]:
        """Find the integers that differ between the workers; see `agree`.

        Returns:
            The integers that differ, the same ones on every worker, and the largest values.
        """
        if self._world is None:
            return [], [*largest]
        own = [v if isinstance(v, int | None) else digest("\n".join(v)) for v in equal.values()]
        high = [_ANY if v is None else v for v in own]
        low = [_ANY if v is None else -v for v in own]
        vector = torch.tensor([*high, *low, *largest], dtype=torch.int64, device=device)
        self._count(vector, 2)
        self._dist.all_reduce(vector, op=dist.ReduceOp.MAX, group=self._equals)
        values = vector.tolist()
        high, low = values[: len(own)], values[len(own) : 2 * len(own)]
        differ = [a not in (_ANY, -b) for a, b in zip(high, low, strict=True)]
        rest = values[2 * len(own) :]
        if self._island is not None:  # parts are compared with the same parts; all ranks find the same
            common = len(rest) - num_own
            verdict = torch.tensor([*differ, *rest[:common]], dtype=torch.int64, device=device)
            self._dist.all_reduce(verdict, op=dist.ReduceOp.MAX, group=self._island)
            differ, rest = verdict[: len(own)].tolist(), [*verdict[len(own) :].tolist(), *rest[common:]]
        rows = zip(equal.items(), high, low, differ, strict=True)
        return [Difference(integer, value, -b, a) for (integer, value), a, b, found in rows if found], rest

    def explain(self, differences: Sequence[Difference]) -> str:
        """Say on what the workers disagree, and what may help; all workers must call it, with the same differences."""
        advice = dict.fromkeys(difference.integer.advice for difference in differences)
        said = [difference.integer.name + self._values(difference) for difference in differences]
        return " ".join(
            [f"The workers disagree on {', '.join(said)}; this is worker {self.rank}.", *filter(None, advice)]
        )

    def _values(self, difference: Difference) -> str:
        """Say in what the workers' values of an integer differ; collective if it is listed."""
        integer, value = difference.integer, difference.own
        if integer.shown:
            own = "any" if value is None else value
            return f" (between {difference.least} and {difference.most}, here {own})"
        if not integer.listed:
            return ""
        group = self._equals
        all_lines: list[list[str] | None] = [None] * self._dist.get_world_size(group)
        self._dist.all_gather_object(all_lines, None if isinstance(value, int | None) else [*value], group=group)
        given = [(rank, lines) for rank, lines in enumerate(all_lines) if lines is not None]
        unlike = [pair for pair in given if pair[1] != given[0][1]]
        if not unlike:
            return " (on other ranks of the workers)"
        (first, lines), (other, others) = given[0], unlike[0]
        at = next((i for i, pair in enumerate(zip(lines, others, strict=False)) if pair[0] != pair[1]), None)
        if at is None:
            shorter = min(len(lines), len(others))
            who, more = (first, lines) if len(lines) > shorter else (other, others)
            return f" (rank {who} alone has {more[shorter]!r})"
        return f" (rank {first} has {lines[at]!r}, rank {other} has {others[at]!r})"


def jointly(tensors: Sequence[Tensor], reduce: Callable[[Tensor], object]) -> list[Tensor]:
    """Apply a collective that overwrites a flat tensor to several tensors of one device at once, in their common type.

    Example:
        >>> jointly([torch.ones(2), torch.ones(1, 1)], lambda flat: flat.mul_(3))
        [tensor([3., 3.]), tensor([[3.]])]
    """
    flat = torch.cat([t.flatten() for t in tensors])
    reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def digest(text: str) -> int:
    """Hash a text to an integer for `Communicator.agree`; other texts give, almost surely, other integers."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
