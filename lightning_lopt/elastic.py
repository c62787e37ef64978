"""Workers that come and go between rounds: torchft's lighthouse says who is there, gloo carries the values."""

from __future__ import annotations

import atexit
import json
import queue
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from lightning_lopt.comm import DisagreementError, GroupBrokenError, Members, check_timeout

CONNECT_SECONDS = 10.0  # for a new group, of which a machine may vanish meanwhile
HEARTBEAT_SECONDS = 0.1  # between two signs of life, as torchft's own
PAUSE_SECONDS = 0.25  # before the lighthouse is asked again


class Elastic:
    """Workers that come and go between rounds, whom torchft's lighthouse brings together.

    Each worker is one process that is started, killed and started again by itself; none needs to know the others. The
    only common address is that of the lighthouse, a small server that anybody may run:

    ``torchft_lighthouse --bind 10.0.0.1:29510 --min_replicas 1 --heartbeat_timeout_ms 5000 --join_timeout_ms 600000``

    Its heartbeat timeout is the time after which a silent worker counts as dead; its join timeout, for which the others
    wait for a living one that is late, must be longer than a round.

    | event                            | kept                                  | lost                             |
    |----------------------------------|---------------------------------------|----------------------------------|
    | a worker dies between two syncs  | the steps of all others in this round | its steps since the last sync ¹  |
    | ... within a sync                | the same: the others repeat the sync  | the same ¹                       |
    | ... when others have the mean    | its last round, too                   | nothing more ¹                   |
    | a worker starts, or starts again | the others' round under way; it takes | nothing                          |
    |                                  | part in the next, with all H steps    |                                  |
    | a worker calls `Rounds.leave`    | its round                             | nothing more ¹                   |
    | ... `Rounds.finish_round`        | the same as if it died, without delay | its steps since the last sync ¹  |
    | the lighthouse dies              | everything; syncs wait until it is    | nothing                          |
    |                                  | back at the same address              |                                  |
    | all workers die                  | the last checkpoint of any of them    | the steps since                  |

    ¹ With the state of its local optimizer, its error feedback, and its buffers with the rule `"local"`.

    The others go on after the lighthouse's heartbeat timeout and less than a second, also if a worker dies while they
    connect. Where a machine vanishes without closing its connections, it takes them `timeout` in a sync, and 10 s while
    they connect. With another history of workers the numbers are others: `RoundReport.workers` has that of a run, round
    by round, and a replay in one process proves it.

    A worker that joins takes over from the first of those who are furthest: global weights and buffers, outer state,
    counters, what a schedule remembers, and the state of the local optimizer, its learning rates included. Buffers with
    the rule `"local"` and random states are its own. Its first round takes its pseudo-gradient however large it is, if
    it is finite: its data may be new to weights that have long fitted the others'.

    In a Trainer it is an argument of the strategies, which do all this (see `LocalSGD`). In a plain loop:

    * Shard the data by `worker_id`, not by rank: the shard of a lost worker rests until it is back.
    * Let a learning rate schedule follow `Rounds.step_idx`.
    * Between syncs call nothing that all workers must call: evaluate the anchor (`Rounds.swap_in("anchor")`). With
      `total_steps` the run ends synced; call `Rounds.leave` before its last step, or `Rounds.finish_round` after it.
    * To go on after all have died, load a checkpoint of any worker (`Rounds.state_dict(alone=True)`,
      `Rounds.local_state()`, the local optimizer's) before `Rounds.meet`: those who have an older one, or none, take
      over from the furthest. A worker that comes before the others' last meeting ends with them; one that comes later,
      without a checkpoint, begins a new run. After a resume the first round waits for nobody.

    **Network.** A worker listens at `host` alone, with gloo and a `torch.distributed.TCPStore`; the lighthouse where
    its `--bind` says. Nothing is encrypted and nobody is asked for a password: whoever reaches these ports can join,
    and read and change the weights. Use a private network. States of other workers are read as tensors and plain
    values (`weights_only=True`), never unpickled; torchft's `Manager`, which listens at all interfaces, and its HTTP
    transport, which unpickles, are not used.

    Args:
        lighthouse: Address of the lighthouse, like `"http://10.0.0.1:29510"`.
        worker_id: Number of this worker, 0 <= `worker_id` < `max_workers`, the same whenever it is started.
        max_workers: Number of workers >= 1 that there can be. The first round waits for all of them, up to
            `start_seconds`; after a resume it does not.
        min_workers: Number of workers >= 1 without which a round does not begin: with fewer, they wait.
        host: Name or address of this machine by which the other workers reach it, on whose interface it listens.
        start_seconds: Seconds for which the first round waits for the last workers.
        timeout: Time for which a worker waits for the others, in a sync or for their next round, before it gives up;
            longer than a round and than `start_seconds`.

    Raises:
        ModuleNotFoundError: torchft is not installed.
        ValueError: A number is out of its range, `timeout` is not a positive `timedelta` longer than `start_seconds`,
            or `lighthouse` does not begin with "http".

    Source: torchft (github.com/meta-pytorch/torchft); pseudo-gradients of those who are there: arXiv 2311.08105.

    Example:
        >>> elastic = Elastic("http://10.0.0.1:29510", worker_id=0, max_workers=3)  # doctest: +SKIP
        >>> rounds = Rounds(model, optimizer, 16, elastic=elastic)  # doctest: +SKIP
        >>> rounds.meet()  # doctest: +SKIP

        With a Trainer:

        >>> trainer = Trainer(devices=1, strategy=DiLoCo(16, elastic=elastic), max_steps=10_000)  # doctest: +SKIP
    """

    def __init__(
        self,
        lighthouse: str,
        worker_id: int,
        max_workers: int,
        min_workers: int = 1,
        host: str = "127.0.0.1",
        start_seconds: float = 60.0,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        check_timeout(timeout)
        if not 0 <= worker_id < max_workers or not 1 <= min_workers <= max_workers:
            raise ValueError(
                "There must be 0 <= worker_id < max_workers and 1 <= min_workers <= max_workers, not worker_id="
                f"{worker_id!r}, max_workers={max_workers!r}, min_workers={min_workers!r}."
            )
        if not lighthouse.startswith("http"):
            raise ValueError(f'The address of the lighthouse is like "http://10.0.0.1:29510", not {lighthouse!r}.')
        if start_seconds >= timeout.total_seconds():
            raise ValueError(f"timeout={timeout} must be longer than start_seconds={start_seconds!r}.")
        self._make_client = _client_class()
        self.lighthouse, self.worker_id, self.host = lighthouse, worker_id, host
        self.max_workers, self.min_workers = max_workers, min_workers
        self._start_seconds, self._timeout = start_seconds, timeout
        self._name = f"worker{worker_id}:{uuid.uuid4().hex}"  # of this life
        self._group: tuple[str, ...] = ()  # names of the present members
        self._collectives: GlooCollectives | None = None
        self._store: TCPStore | None = None
        self._ended = threading.Event()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.lighthouse!r}, {self.worker_id}, {self.max_workers}, {self.min_workers})"

    def meet(self, round_idx: int, *, settings: Mapping[str, str], repeats: bool, leaves: bool) -> Members:
        """Wait for all workers that are there: see `Membership`.

        Raises:
            DisagreementError: The others train another model or have other settings, or one has this `worker_id`.
            TimeoutError: There are too few workers, or no lighthouse, for as long as `timeout`.
            ValueError: `host` is no address of this machine.
        """
        if self._ended.is_set():
            raise RuntimeError("This worker has left. To come back, make a new Elastic and new Rounds.")
        store = self._store = self._store or self._open()
        start, again, warned = time.monotonic(), False, False
        while True:
            waited = time.monotonic() - start
            own = Candidate(
                name=self._name,
                worker=self.worker_id,
                round_idx=round_idx,
                run={**settings, "min_workers": str(self.min_workers), "max_workers": str(self.max_workers)},
                leaves=leaves,
                store=f"{self.host}:{store.port}",
                group=self._group,
                connected=self._collectives is not None and self._collectives.connected,
                waited=waited >= self._start_seconds,
                again=again,
            )
            candidates, key = self._ask(own, repeats=repeats)
            admitted = admit(candidates)
            if leaves and own.name not in [c.name for c in admitted]:
                self.close()
                return Members((), (), None)
            if (
                self._is_let_in(own, candidates, admitted)
                and is_complete(candidates, admitted, self.min_workers, self.max_workers)
                and self._connect(admitted, key)
            ):
                break
            if waited > CONNECT_SECONDS and not warned:
                warned = True
                warnings.warn(self._explain_waiting(admitted), stacklevel=2)
            if waited > self._timeout.total_seconds():
                raise TimeoutError(f"No round began for {self._timeout}. {self._explain_waiting(admitted)}")
            again = True
            time.sleep(PAUSE_SECONDS)
        return Members([c.worker for c in admitted], [c.round_idx for c in admitted], self._collectives)

    def close(self) -> None:
        """End the signs of life, and the connections to other workers."""
        self._ended.set()
        self.disconnect()

    def disconnect(self) -> None:
        """Close the connections to other workers, so that they do not wait for this one in vain."""
        if self._collectives is not None:
            self._collectives.close()
        self._group, self._collectives = (), None

    # -- the lighthouse -------------------------------------------------------------------------------------------

    def _open(self) -> TCPStore:
        """Listen, and give signs of life from now on."""
        try:
            listener = socket.create_server((self.host, 0))  # torch's own would listen at all interfaces
        except OSError as error:
            raise ValueError(
                f"host must be the name or address of this machine by which the others reach it, not {self.host!r}: "
                f"{error}"
            ) from error
        port = listener.getsockname()[1]
        store = TCPStore(self.host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        atexit.register(lambda: (self.close(), thread.join(2 * CONNECT_SECONDS)))  # not within a call of torchft's
        return store

    def _beat(self) -> None:
        client = None
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with suppress(Exception):  # it is away, and may come back
                client = client or self._make_client(self.lighthouse, timedelta(seconds=1))
                client.heartbeat(self._name, timeout=timedelta(seconds=1))

    def _ask(self, own: Candidate, *, repeats: bool) -> tuple[list[Candidate], str]:
        """Wait for a quorum, as long as it takes the lighthouse to be there.

        Returns:
            Its workers, in the order of their numbers, and a text that no other quorum has.
        """
        start, warned = time.monotonic(), False

        def ask() -> Any:
            client = self._make_client(self.lighthouse, timedelta(seconds=1))
            return client.quorum(
                own.name,
                self._timeout,
                address="",
                store_address=own.store,
                step=0,
                world_size=1,
                shrink_only=repeats,
                data=own._asdict(),
            )

        while True:
            try:
                quorum = _interruptible(ask)
                break
            except Exception as error:
                waited = time.monotonic() - start
                if waited > self._timeout.total_seconds():
                    raise TimeoutError(
                        f"No quorum by the lighthouse {self.lighthouse} within {self._timeout}: {error}"
                    ) from error
                if waited > CONNECT_SECONDS and not warned:
                    warned = True
                    warnings.warn(
                        f"The lighthouse {self.lighthouse} does not answer; this worker asks again, for up to "
                        f"{self._timeout}: {error}",
                        stacklevel=2,
                    )
                time.sleep(PAUSE_SECONDS)
        members = [Candidate(**{**m.data, "group": tuple(m.data["group"])}) for m in quorum.participants]
        key = f"{quorum.quorum_id}.{quorum.created.seconds}.{quorum.created.nanos}"
        return sorted(members, key=lambda c: (c.worker, -c.round_idx, c.name)), key

    def _explain_waiting(self, there: Sequence[Candidate]) -> str:
        present = ", ".join(f"worker {c.worker} at {c.store}" for c in there)
        return (
            f"Worker {self.worker_id} waits for a round to begin. There are {present}; min_workers={self.min_workers} "
            f"are needed, for the first round max_workers={self.max_workers} or start_seconds={self._start_seconds}, "
            "and all must reach one another at these addresses (host=...)."
        )

    def _is_let_in(self, own: Candidate, candidates: Sequence[Candidate], admitted: Sequence[Candidate]) -> bool:
        """Whether this worker takes part, and need not wait until an earlier life of it has left."""
        if own.name in [c.name for c in admitted]:
            return True
        if any(c.worker == own.worker and c.run == own.run and c.leaves for c in candidates):
            return False
        self.close()
        run, names = admitted[0].run, dict.fromkeys([*admitted[0].run, *own.run])
        unlike = [f"{k}: {run.get(k)}, here {own.run.get(k)}" for k in names if run.get(k) != own.run.get(k)]
        if unlike:
            raise DisagreementError(
                f"The other workers, {[c.worker for c in admitted]}, have other settings than this one ("
                f"{'; '.join(unlike)}): give all the same model and optimizers, Rounds (or strategy), total_steps (or "
                "max_steps, max_epochs and batches), min_workers and max_workers."
            )
        raise DisagreementError(
            f"There is a worker {own.worker} already: give each its own worker_id. If it is an earlier life of this "
            "one, end it: a process outlives a torchrun that is killed."
        )

    # -- the group ------------------------------------------------------------------------------------------------

    def _connect(self, admitted: Sequence[Candidate], key: str) -> bool:
        """Connect the members, if they are not; return whether it worked."""
        names = tuple(c.name for c in admitted)
        if all(c.connected and c.group == names for c in admitted):
            return True
        self.disconnect()
        self._group = names
        if len(names) == 1:
            return True
        rank, stores = names.index(self._name), [c.store for c in admitted]
        connect = partial(GlooCollectives, stores[0], key, rank, len(names), self.host, self._timeout)
        try:
            self._collectives = _interruptible(connect, while_true=partial(_all_listen, stores))
        except RuntimeError:  # one of them is gone already
            return False
        return True


class Candidate(NamedTuple):
    """A worker's message to all others at a meeting.

    Attributes:
        name: Name of this life of the worker.
        worker: Number of the worker.
        round_idx: Number of finished rounds, -1 for a worker that has just begun.
        run: Settings that are the same on all workers of a run.
        leaves: Whether it leaves.
        store: Address of its store.
        group: Names of its present group.
        connected: Whether that still works.
        waited: Whether it has waited long enough for the first round.
        again: Whether it has come again to this meeting.
    """

    name: str
    worker: int
    round_idx: int = -1
    run: Mapping[str, str] = MappingProxyType({})
    leaves: bool = False
    store: str = ""
    group: tuple[str, ...] = ()
    connected: bool = False
    waited: bool = False
    again: bool = False


def admit(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Choose the workers that take part, the same on all of them.

    Those of another run than the first of the furthest do not, nor a second one of a number, nor those who leave; but
    the last ones that have the weights stay another round for those who have not.

    Args:
        candidates: Workers that are there, by number.

    Example:
        >>> run, other = {"total_steps": "100"}, {"total_steps": "200"}
        >>> there = [Candidate("a", 0, 5, run), Candidate("b", 1, -1, other), Candidate("c", 2, -1, run)]
        >>> [c.name for c in admit(there)]
        ['a', 'c']
    """
    furthest = max(c.round_idx for c in candidates)
    run = next(c.run for c in candidates if c.round_idx == furthest)
    first: dict[int, Candidate] = {}
    for c in candidates:
        if c.run == run:
            first.setdefault(c.worker, c)
    stay = [c for c in first.values() if not c.leaves]
    return [*first.values()] if stay and max(c.round_idx for c in stay) < furthest else stay


def is_complete(
    candidates: Sequence[Candidate], admitted: Sequence[Candidate], min_workers: int, max_workers: int
) -> bool:
    """Decide whether a round can begin, the same on all workers.

    At the very beginning it waits for all. If a member of the present group is missing, all come again: a lighthouse
    that was restarted may not have heard of it yet.

    Example:
        >>> here = [Candidate("a", 0, 3, group=("a", "b"))]
        >>> is_complete(here, here, 1, 3), is_complete(here, [here[0]._replace(again=True)], 1, 3)
        (False, True)
    """
    begins = all(c.round_idx < 0 for c in admitted)
    if len(admitted) < (max_workers if begins and not any(c.waited for c in admitted) else min_workers):
        return False
    missing = {name for c in admitted for name in c.group} - {c.name for c in candidates}
    return not missing or all(c.again for c in admitted if c.group)


class GlooCollectives:
    """The names of `torch.distributed` that a `Communicator` calls, in a gloo group that may break.

    Args:
        store: Address of the first member's store.
        key: Text that belongs to this group alone.
        rank: Rank of this worker.
        size: Number of workers.
        host: Name or address of the interface at which to listen.
        timeout: Time after which a collective fails.

    Raises:
        RuntimeError: The workers could not connect.
    """

    def __init__(self, store: str, key: str, rank: int, size: int, host: str, timeout: timedelta) -> None:
        name, port = store.rsplit(":", 1)
        limit = min(timeout, timedelta(seconds=CONNECT_SECONDS))
        client = TCPStore(name, int(port), is_master=False, wait_for_workers=False, timeout=limit)
        options: Any = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = limit
        self._rank, self._size = rank, size
        self._group: Any = dist.ProcessGroupGloo(PrefixStore(key, client), rank, size, options)
        self._group._set_default_timeout(timeout)

    @property
    def connected(self) -> bool:
        """Whether no collective has failed."""
        return self._group is not None

    def close(self) -> None:
        """Close the connections."""
        self._group = None

    def _run(self, start: Callable[[Any], Any]) -> None:
        problem = "the group is broken"
        try:
            if self._group is not None:
                start(self._group).wait()
                return
        except RuntimeError as error:
            problem = str(error)
        self.close()  # so that others do not wait for this worker in vain
        raise GroupBrokenError(f"Another worker is gone: {problem}")

    def new_group(self, ranks: Sequence[int], timeout: timedelta | None = None) -> GlooCollectives:
        return self

    def get_rank(self, group: Any = None) -> int:
        return self._rank

    def get_world_size(self, group: Any = None) -> int:
        return self._size

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = op
        self._run(lambda gloo: gloo.allreduce([tensor], options))

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor, group: Any = None) -> None:
        self._run(lambda gloo: gloo.allgather([list(outputs)], [tensor]))

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, receive: Sequence[int], send: Sequence[int], group: Any = None
    ) -> None:
        self._run(lambda gloo: gloo.alltoall_base(output, tensor, list(receive), list(send)))

    def send(self, tensor: Tensor, group: Any = None, group_dst: int = 0) -> None:
        self._run(lambda gloo: gloo.send([tensor], group_dst, 0))

    def recv(self, tensor: Tensor, group: Any = None, group_src: int = 0) -> None:
        self._run(lambda gloo: gloo.recv([tensor], group_src, 0))

    def all_gather_object(self, items: list[Any], item: Any, group: Any = None) -> None:
        """Gather values as JSON, since what another machine has pickled is not to be trusted."""
        text = torch.frombuffer(bytearray(json.dumps(item).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self._size)]
        self.all_gather(lengths, torch.tensor([len(text)]))
        padded = torch.zeros(max(int(n) for n in lengths), dtype=torch.uint8)
        padded[: len(text)] = text
        texts = [torch.zeros_like(padded) for _ in range(self._size)]
        self.all_gather(texts, padded)
        items[:] = [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, lengths, strict=True)]


def _interruptible(function: Callable[[], Any], while_true: Callable[[], bool] | None = None) -> Any:
    """Call a function in a thread, so that signals are handled meanwhile.

    Args:
        function: Function to call.
        while_true: Function that is called from time to time; the call is given up when it returns False.

    Raises:
        RuntimeError: The call was given up.
    """
    answer: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def call() -> None:
        try:
            answer.put((function(), None))
        except Exception as error:
            answer.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    while True:
        try:
            result, error = answer.get(timeout=None if while_true is None else PAUSE_SECONDS)
            break
        except queue.Empty:
            if while_true is not None and not while_true():
                raise RuntimeError("The call was given up.") from None
    if error is not None:
        raise error
    return result


def _all_listen(addresses: Sequence[str]) -> bool:
    """Whether the processes that listen at these addresses live, as far as their machines say."""
    for address in addresses:
        name, port = address.rsplit(":", 1)
        try:
            socket.create_connection((name, int(port)), timeout=PAUSE_SECONDS).close()
        except ConnectionRefusedError:
            return False
        except OSError:  # its machine does not answer: it may be slow
            continue
    return True


def _client_class() -> Any:
    try:
        from torchft.coordination import LighthouseClient  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Workers that come and go need torchft, which exists for Linux on x86_64 and Python up to 3.13: "
            "pip install 'lightning-lopt[elastic]'."
        ) from error
    return LighthouseClient
