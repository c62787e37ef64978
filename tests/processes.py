"""Real processes for tests, with a time limit: workers joined by gloo over the loopback, and commands."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _main(
    connection, function: Callable[..., Any], rank: int, num_workers: int, port: int, connect: bool, args
) -> None:
    # the environment that torchrun makes, which Lightning recognises
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(num_workers),
        LOCAL_WORLD_SIZE=str(num_workers),
        TORCHELASTIC_RUN_ID="tests",
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",  # Lightning would raise it, and OpenMP hangs in a fork of a process that has used it
    )
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, file=2)  # stderr; see _write_stacks
    try:
        if connect:
            dist.init_process_group("gloo", rank=rank, world_size=num_workers)
        connection.send_bytes(pickle.dumps((function(rank, *args), None)))
    except BaseException:
        connection.send_bytes(pickle.dumps((None, traceback.format_exc())))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        connection.close()


def run_workers(
    function: Callable[..., Any], num_workers: int, *args: Any, connect: bool = True, limit: float = 90
) -> list:
    """Call `function(rank, *args)` in forked processes; their results by rank.

    Those that do not finish within the limit write to stderr where each of their threads stands.

    With `connect` the processes are in a process group; without, they have torchrun's environment for a Trainer.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(num_workers)]
    processes = [
        context.Process(target=_main, args=(send, function, rank, num_workers, port, connect, args), daemon=True)
        for rank, (_, send) in enumerate(pipes)
    ]
    started = []
    try:
        for process in processes:
            process.start()
            started.append(process)
        for _, send in pipes:
            send.close()
        return _results([receive for receive, _ in pipes], limit)
    except BaseException as error:
        if isinstance(error, TimeoutError):
            _write_stacks(started)
        for process in started:
            process.kill()
        raise
    finally:
        for process in started:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _write_stacks(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.2)  # one after the other


def _results(pipes: list[Connection], limit: float) -> list:
    """Results by rank; the error of whichever worker fails first is raised at once."""
    end = time.monotonic() + limit
    results: dict[int, Any] = {}
    dead: EOFError | None = None
    ranks = {pipe: rank for rank, pipe in enumerate(pipes)}
    while ranks:
        ready = wait([*ranks], max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(f"worker {min(ranks.values())} did not finish within {limit} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = ranks.pop(pipe)
            try:
                result, error = pickle.loads(pipe.recv_bytes())  # plain pickle: torch's shares memory of the dead
            except EOFError as error:  # the others may say why
                dead = error
                continue
            if error is not None:
                raise RuntimeError(f"worker {rank} failed:\n{error}")
            results[rank] = result
    if dead is not None:
        raise dead
    return [results[rank] for rank in range(len(pipes))]


def run_cases(
    function: Callable[..., Any],
    num_workers: int,
    cases: Mapping[str, tuple[Any, ...]],
    connect: bool = True,
    limit: float = 90,
) -> dict[str, list]:
    """Call `function(rank, *arguments)` for several cases in the same processes; by name, their results by rank.

    For the fixture of a module whose tests would otherwise start processes each. An error names its case, and is one of
    all tests that use the fixture.
    """
    by_rank = run_workers(_all_cases, num_workers, function, dict(cases), connect=connect, limit=limit)
    return {name: [results[name] for results in by_rank] for name in cases}


def _all_cases(rank: int, function: Callable[..., Any], cases: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    results = {}
    for name, arguments in cases.items():
        with _in_case(name):
            results[name] = function(rank, *arguments)
    return results


@contextmanager
def _in_case(name: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        raise RuntimeError(f"in the case {name!r}") from error


def run_command(
    command: list[str], limit: float, environment: dict[str, str] | None = None, folder: Path | None = None
) -> tuple[str, str]:
    """What a command printed, to the standard output and to the other one.

    It must succeed within `limit` seconds; soon after, its process group must be empty. None of it outlives this call.
    """
    process = subprocess.Popen(
        command,
        env={**os.environ, **(environment or {})},
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=limit)
        assert process.returncode == 0, printed + errors
        end = time.monotonic() + 10  # workers may take a moment to shut down
        while living(process.pid):
            assert time.monotonic() < end, f"a process is left\n{printed}{errors}"
            time.sleep(0.1)
        return printed, errors
    finally:
        if living(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def living(group: int) -> list[int]:
    """The processes of a process group that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, pgrp = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(pgrp) == group and state != "Z":
                found.append(int(entry.name))
    return found
