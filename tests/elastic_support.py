"""Workers that come and go: as threads, with a plan of their deaths and a replay that proves it; and as processes."""

from __future__ import annotations

import copy
import json
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lopt import Rounds
from lightning_lopt.comm import GroupBrokenError, Members
from lightning_lopt.elastic import Candidate, Elastic, admit
from lightning_lopt.virtual.thread_group import ThreadGroup, VirtualGroup
from tests.processes import free_port

H = 3
OUTER = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
Place = tuple[int, int, int | str]  # worker, round, and a local step or the name of a collective


class Killed(BaseException):
    """The end of a worker."""


class FakeGroup:
    """Threads that communicate until one of them is gone."""

    def __init__(self, workers: Sequence[int]) -> None:
        self.workers = tuple(workers)
        self.threads = ThreadGroup(len(workers)) if len(workers) > 1 else None
        self.broken = threading.Event()
        self.mail: dict[tuple[int, int], queue.Queue[Tensor]] = {}

    def break_up(self) -> None:
        self.broken.set()
        if self.threads is not None:
            self.threads._barrier.abort()


class FakeCollectives(VirtualGroup):
    """Collectives of one worker, at which it may die, or lose what arrived."""

    def __init__(self, group: FakeGroup, worker: int, at: Callable[[str], None]) -> None:
        assert group.threads is not None
        super().__init__(group.workers.index(worker), len(group.workers), group.threads)
        self._fake, self._at, self._name = group, at, ""
        self._wait, self._join = self._join, self._join_or_fail

    def _join_or_fail(self, item: Any, combine: Callable[[list[Any]], Any]) -> Any:
        self._at(self._name)
        try:
            result = self._wait(item, combine)
        except threading.BrokenBarrierError:
            raise GroupBrokenError(self._name) from None
        self._at(f"after the {self._name}")
        return result

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM, group=None):
        self._name = "mean" if op == dist.ReduceOp.SUM else "status" if len(tensor) > 1 else "barrier"
        super().all_reduce(tensor, op)

    def send(self, tensor, group=None, group_dst=0):
        self._at("send")
        if self._fake.broken.is_set():
            raise GroupBrokenError("send")
        self._box(self._rank, group_dst).put(tensor.clone())

    def recv(self, tensor, group=None, group_src=0):
        self._at("receive")
        box = self._box(group_src, self._rank)
        while box.empty():
            if self._fake.broken.wait(0.001):
                raise GroupBrokenError("receive")
        tensor.copy_(box.get())

    def _box(self, source: int, to: int) -> queue.Queue[Tensor]:
        return self._fake.mail.setdefault((source, to), queue.Queue())


@dataclass
class Call:
    """What a worker says when it comes to a meeting."""

    round_idx: int
    repeats: bool
    leaves: bool


class FakeLighthouse:
    """Meetings of threads: complete when all living members of the last one are here, who let the newcomers in.

    Args:
        starters: Workers that begin together.
    """

    def __init__(self, starters: Sequence[int]) -> None:
        self._changed = threading.Condition()
        self._members, self._dead = set(starters), set[int]()
        self._here: dict[int, Call] = {}
        self._found: dict[int, tuple[FakeGroup | None, list[int]]] = {}
        self._group = FakeGroup(())

    def meet(self, worker: int, call: Call) -> tuple[FakeGroup | None, list[int]]:
        """The group of the next round and the rounds of its workers; no group for a worker that leaves."""
        with self._changed:
            self._dead.discard(worker)
            self._here[worker] = call
            self._changed.notify_all()
            self._look()
            assert self._changed.wait_for(lambda: worker in self._found, timeout=20), self._here
            return self._found.pop(worker)

    def _look(self) -> None:
        """Hold the meeting, if all are here."""
        if not self._here or not self._members - self._dead <= self._here.keys():
            return
        repeats = any(call.repeats for call in self._here.values())
        came = {w: c for w, c in self._here.items() if w in self._members or not repeats}
        candidates = [Candidate(str(w), w, c.round_idx, leaves=c.leaves) for w, c in sorted(came.items())]
        stay = [c.worker for c in admit(candidates)] if candidates else []
        self._group.break_up()
        self._group = FakeGroup(stay)
        rounds = [came[w].round_idx for w in stay]
        self._found.update({w: (self._group if w in stay else None, rounds) for w in came})
        self._members = set(stay)
        for w in came:
            del self._here[w]
        self._changed.notify_all()

    def bury(self, worker: int) -> None:
        """Take note of a death, which breaks the worker's group."""
        with self._changed:
            self._dead.add(worker)
            self._here.pop(worker, None)
            if worker in self._group.workers:
                self._group.break_up()
            self._look()

    def wait_for(self, worker: int) -> None:
        """Return when a worker waits to be let in."""
        with self._changed:
            assert self._changed.wait_for(lambda: worker in self._here, timeout=20)


@dataclass
class FakeMembership:
    """One worker's end of a `FakeLighthouse`."""

    worker_id: int
    max_workers: int
    lighthouse: FakeLighthouse
    at: Callable[[int, str], None]

    def disconnect(self) -> None:
        self.lighthouse._group.break_up()

    def close(self) -> None:
        self.lighthouse.bury(self.worker_id)

    def meet(self, round_idx: int, *, settings: Mapping[str, str], repeats: bool, leaves: bool) -> Members:
        group, rounds = self.lighthouse.meet(self.worker_id, Call(round_idx, repeats, leaves))
        if group is None:
            return Members((), (), None)
        at = partial(self._at, max(rounds))
        backend = None if group.threads is None else FakeCollectives(group, self.worker_id, at)
        return Members(group.workers, rounds, backend)

    def _at(self, round_idx: int, name: str) -> None:
        try:
            self.at(round_idx, name)
        except GroupBrokenError:
            self.lighthouse._group.break_up()
            raise


_generator_is_mine = threading.Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generator that all threads share, and keep it for a while."""
    with _generator_is_mine:
        torch.manual_seed(seed)
        yield


def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with weights of its own on each worker, until they have met."""
    with seeded(seed):
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8)


def local_step(model: nn.Module, optimizer: torch.optim.Optimizer, worker: int, round_idx: int, step: int) -> None:
    """A step on data that a worker, a round and a step determine."""
    generator = torch.Generator().manual_seed(10_000 * worker + 100 * round_idx + step)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    optimizer.zero_grad()
    (model(x) - x.roll(1, 1)).square().mean().backward()
    optimizer.step()


@dataclass
class Log:
    """What a worker saw: where it began, and the anchors and workers of each round that it ended."""

    begins: list[int] = field(default_factory=list)
    anchors: dict[int, list[Tensor]] = field(default_factory=dict)
    workers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    start: list[Tensor] = field(default_factory=list)
    left: bool = False


class Trial:
    """A run of threads that follow a plan.

    Args:
        num_rounds: Number of rounds.
        starters: Workers that begin together.
        plan: Functions that are called once at a place, with the trial.
        make_rounds: Function of a model, an optimizer and the keyword `elastic`.
    """

    def __init__(
        self,
        num_rounds: int,
        starters: Sequence[int],
        plan: dict[Place, Callable[[Trial], None]],
        make_rounds: Callable[..., Rounds] | None = None,
        make_model: Callable[[int], tuple[nn.Module, torch.optim.Optimizer]] = make,
    ) -> None:
        self._num_rounds, self._starters, self.plan = num_rounds, starters, dict(plan)
        self._make_rounds = make_rounds or partial(Rounds, local_steps=H, outer_optimizer=OUTER)
        self._make_model = make_model
        self.lighthouse = FakeLighthouse(starters)
        self.logs: dict[int, Log] = {}
        self.rounds: dict[int, Rounds] = {}
        self.models: dict[int, nn.Module] = {}
        self.errors: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self._lives = 0
        for worker in starters:
            self.start(worker)

    def start(self, worker: int) -> None:
        """Start a worker, or start it again."""
        self._lives += 1
        self._threads.append(threading.Thread(target=self._live, args=(worker, self._lives), daemon=True))
        self._threads[-1].start()

    def let_in(self, worker: int) -> None:
        """Start a worker, and wait until it is at the door."""
        self.start(worker)
        self.lighthouse.wait_for(worker)

    def run(self) -> dict[int, Log]:
        """Wait for all workers, and return what the living saw."""
        for thread in self._threads:  # others may be added meanwhile
            thread.join(30)
            assert not thread.is_alive()
        if self.errors:
            raise self.errors[0]
        return self.logs

    def _at(self, worker: int, round_idx: int, place: int | str) -> None:
        action = self.plan.pop((worker, round_idx, place), None)
        if action is not None:
            time.sleep(0.05 * str(place).startswith("after"))  # until the others have it, too
            action(self)

    def membership(self, worker: int) -> FakeMembership:
        """A worker's end of the lighthouse."""
        return FakeMembership(worker, len(self._starters), self.lighthouse, partial(self._at, worker))

    def _live(self, worker: int, life: int) -> None:
        try:
            self._train(worker, life)
        except Killed:
            self.logs.pop(worker, None)
            self.lighthouse.bury(worker)
        except BaseException as error:
            self.errors.append(error)
            self.lighthouse.bury(worker)

    def _train(self, worker: int, life: int) -> None:
        model, optimizer = self._make_model(100 * life + worker)
        membership = self.membership(worker)
        rounds = self.rounds[worker] = self._make_rounds(model, optimizer, elastic=membership)
        self.models[worker] = model
        log = self.logs[worker] = Log()
        rounds.meet()
        log.begins.append(rounds.round_idx)
        log.start = [p.detach().clone() for p in model.parameters()]
        while rounds.round_idx < self._num_rounds and not rounds.left:
            index = rounds.round_idx
            for step in range(H):
                self._at(worker, index, step)
                if rounds.left:  # within the round
                    break
                local_step(model, optimizer, worker, index, step)
                assert rounds.step() == (step == H - 1)
            else:
                report = rounds.last_report
                if report is not None and report.round_idx == index:
                    log.workers[index] = report.workers
                log.anchors[index] = [p.detach().clone() for p in model.parameters()]
        log.left = rounds.left
        self.lighthouse.bury(worker)


def die(trial: Trial) -> None:
    raise Killed


def lose(trial: Trial) -> None:
    """What arrived is lost on this worker, as when the connection breaks after the others have got it."""
    raise GroupBrokenError("lost")


def parts_of(logs: dict[int, Log]) -> list[tuple[int, ...]]:
    """The workers of each round, on which all agree; anchors are bitwise the same on all who ended it."""
    parts = []
    for index in range(1 + max(max(log.anchors, default=-1) for log in logs.values())):
        (workers,) = {log.workers[index] for log in logs.values() if index in log.workers}
        first, *others = [log.anchors[index] for log in logs.values() if index in log.anchors]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), index
        parts.append(workers)
    return parts


def replay(start: Sequence[Tensor], parts: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """The anchors after rounds with these workers, in plain PyTorch; who joins has the first one's optimizer state."""
    anchors = [p.clone().requires_grad_() for p in start]
    outer, results = OUTER(anchors), []
    states: dict[int, dict[str, Any]] = {}
    for index, workers in enumerate(parts):
        donor = next((w for w in workers if w in states), None)
        given = {w: copy.deepcopy(states[w if w in states else donor]) for w in workers if donor is not None}
        states, differences = {}, [torch.zeros_like(a) for a in anchors]
        for worker in workers:
            model, optimizer = make(0)
            with torch.no_grad():
                for p, a in zip(model.parameters(), anchors, strict=True):
                    p.copy_(a)
            if worker in given:
                optimizer.load_state_dict(given[worker])
            for step in range(H):
                local_step(model, optimizer, worker, index, step)
            states[worker] = optimizer.state_dict()
            with torch.no_grad():
                for d, p, a in zip(differences, model.parameters(), anchors, strict=True):
                    d += a - p
        for a, d in zip(anchors, differences, strict=True):
            a.grad = d / len(workers)
        outer.step()
        results.append([a.detach().clone() for a in anchors])
    return results


# -- real processes on torchft's lighthouse ---------------------------------------------------------------------------

HEARTBEAT = 1.0  # seconds after which a silent worker counts as dead


def _lighthouse(port: int) -> None:
    from torchft.coordination import LighthouseServer  # pyright: ignore[reportMissingImports]

    milliseconds = int(1000 * HEARTBEAT)
    server = LighthouseServer(
        bind=f"127.0.0.1:{port}", min_replicas=1, join_timeout_ms=20_000, heartbeat_timeout_ms=milliseconds
    )
    time.sleep(120)
    server.shutdown()


def torchft_member(worker: int, port: int, start_seconds: float = 19) -> Elastic:
    """One of three workers on the lighthouse at a port."""
    limit = timedelta(seconds=20)
    return Elastic(f"http://127.0.0.1:{port}", worker, 3, start_seconds=start_seconds, timeout=limit)


class Processes:
    """The processes of a run and its lighthouse, and what the workers wrote, one file of JSON lines each.

    Args:
        folder: Folder of these files.
        context: Context of `multiprocessing`.
    """

    def __init__(self, folder: Path, context: Any) -> None:
        self.folder, self.port, self.context = folder, free_port(), context
        self._processes: list[Any] = []
        self.lighthouse = self.launch(_lighthouse, self.port)

    def launch(self, function: Callable[..., None], *args: Any) -> Any:
        process = self.context.Process(target=function, args=args, daemon=True)
        self._processes.append(process)
        process.start()
        return process

    def restart_lighthouse(self) -> None:
        self.lighthouse = self.launch(_lighthouse, self.port)

    def events(self, worker: int, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{worker}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def wait_for(self, worker: int, index: int) -> None:
        """Return when a worker has ended a round."""
        self.wait_until(lambda: any(event["round"] == index for event in self.events(worker, "round")))

    def wait_until(self, there: Callable[[], bool]) -> None:
        """Return when something is there."""
        end = time.monotonic() + 60
        while not there():
            assert time.monotonic() < end, {w: self.events(w, "round")[-1:] for w in range(3)}
            time.sleep(0.01)

    def end(self) -> None:
        """Wait until all workers that live have ended."""
        for process in self._processes[1:]:
            if process is not self.lighthouse:
                process.join(60)
                assert process.exitcode in (0, -signal.SIGKILL)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
