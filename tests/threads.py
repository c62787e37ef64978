"""Workers as threads of this process: for tests of one synchronisation that need no real processes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from lightning_lopt.comm import Communicator
from lightning_lopt.virtual.thread_group import ThreadGroup, VirtualGroup


def run_threads(function: Callable[..., Any], num_workers: int, *args: Any, limit: float = 60) -> list:
    """Call `function(rank, make_comm, *args)` in a thread per worker; their results by rank.

    `make_comm()` makes the collectives between them. That these equal those of processes is proved by
    `tests/virtual/test_thread_group.py`.
    """
    group = ThreadGroup(num_workers, timedelta(seconds=limit))
    backends = [VirtualGroup(rank, num_workers, group) for rank in range(num_workers)]
    comms = [partial(Communicator, backend=backend) for backend in backends]
    return group.run([partial(function, rank, make_comm, *args) for rank, make_comm in enumerate(comms)])
