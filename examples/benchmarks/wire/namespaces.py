"""Worker processes on links of a chosen rate and latency: network namespaces, joined as machines by a switch."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from examples.benchmarks.wire import relay

INTERFACE = "eth0"
POLL_SECONDS = 0.1


def _limit(interface: str, mbit: float) -> str:
    burst = max(16_000, round(mbit * 1e6 / 8 * 0.004))  # what a timer of the kernel may let through at once
    return f"tc qdisc add dev {interface} root tbf rate {round(mbit * 1e6)}bit burst {burst} latency 400ms"


def why_not() -> str | None:
    """Why there can be no namespaces with limited links here; None if there can."""
    if missing := [tool for tool in ("unshare", "nsenter", "ip", "tc") if not shutil.which(tool)]:
        return f"there is no {' and no '.join(missing)} on this machine"
    probe = "ip link add bridge type bridge && ip link add port type veth peer name other && " + _limit("port", 1)
    done = subprocess.run(["unshare", "--net", "sh", "-c", probe], capture_output=True, text=True)
    if done.returncode:
        return f"it needs CAP_NET_ADMIN and the kernel's bridge, veth and tbf ({done.stderr.strip()})"
    return None


@contextmanager
def _namespace(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """A process in a network namespace of its own, which runs the command when it is written a line."""
    waiting = ["unshare", "--net", "sh", "-c", 'read _ && exec "$@" < /dev/null', "-", *command]
    process = subprocess.Popen(waiting, stdin=subprocess.PIPE, env=environment, text=True)
    try:
        here = os.readlink("/proc/self/ns/net")
        while process.poll() is None and os.readlink(f"/proc/{process.pid}/ns/net") == here:
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


def _run(namespace: subprocess.Popen, command: str) -> None:
    subprocess.run(["nsenter", "-t", str(namespace.pid), "-n", *command.split()], check=True)


def _connect(switch: subprocess.Popen, worker: subprocess.Popen, rank: int, mbit: float) -> None:
    """Join a worker to the switch, with the rate limited in both directions."""
    _run(switch, f"ip link add port{rank} type veth peer name {INTERFACE} netns {worker.pid}")
    _run(switch, f"ip link set port{rank} up")
    _run(switch, _limit(f"port{rank}", mbit))
    _run(worker, "ip link set lo up")
    _run(worker, f"ip addr add 10.77.0.{rank + 1}/24 dev {INTERFACE}")
    _run(worker, f"ip link set {INTERFACE} up")
    _run(worker, _limit(INTERFACE, mbit))


def _environment(rank: int, num_workers: int, address: str, port: int, interface: str) -> dict[str, str]:
    """torchrun's, on a node of its own; one thread, or the workers would share cores."""
    return {
        **os.environ,
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "GROUP_RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(num_workers),
        "LOCAL_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "bench",
        "GLOO_SOCKET_IFNAME": interface,
        "OMP_NUM_THREADS": "1",
    }


def run_linked(command: Sequence[str], num_workers: int, mbit: float, latency: float = 0.0) -> None:
    """Run a Python command as each of the workers, each on a link of its own, as torchrun would on many machines.

    Args:
        command: what follows the interpreter.
        num_workers: K >= 2.
        mbit: rate of each link in each direction, in 1e6 bits per second.
        latency: seconds from one worker to another, besides what the bytes take.

    Raises:
        RuntimeError: a worker failed; the others are ended.
    """
    ports = [f"port{rank}" for rank in range(num_workers)]
    with ExitStack() as stack:
        switch = stack.enter_context(_namespace([sys.executable, relay.__file__, str(latency), *ports]))
        workers = []
        for rank in range(num_workers):
            environment = _environment(rank, num_workers, "10.77.0.1", 29500, INTERFACE)
            workers.append(stack.enter_context(_namespace([sys.executable, *command], environment)))
            _connect(switch, workers[-1], rank, mbit)
        if not latency:
            _run(switch, "ip link add bridge type bridge")
            _run(switch, "ip link set bridge up")
            for port in ports:
                _run(switch, f"ip link set {port} master bridge")
        for process in [*([switch] if latency else []), *workers]:
            process.stdin.write("go\n")
            process.stdin.flush()
        _wait(workers)


def run_local(command: Sequence[str], num_workers: int) -> None:
    """The same on the loopback, whose rate nobody limits."""
    workers = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        for rank in range(num_workers):
            environment = _environment(rank, num_workers, "127.0.0.1", port, "lo")
            workers.append(subprocess.Popen([sys.executable, *command], env=environment))
        _wait(workers)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _wait(workers: Sequence[subprocess.Popen]) -> None:
    while None in (codes := [worker.poll() for worker in workers]) and not any(codes):
        time.sleep(POLL_SECONDS)
    if failed := [rank for rank, code in enumerate(codes) if code]:
        raise RuntimeError(f"Worker {failed[0]} of {len(workers)} failed; its message is above.")
