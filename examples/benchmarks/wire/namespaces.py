"""Worker processes on links of a chosen rate and latency: a network namespace each, joined by a switch like machines.

The commands `unshare` and `nsenter` (util-linux) and `ip` and `tc` (iproute2) are needed, and the right to use them.
"""

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
    burst = max(16_000, round(mbit * 1e6 / 8 * 0.004))  # bytes that a timer of the kernel may let through at once
    return f"tc qdisc add dev {interface} root tbf rate {round(mbit * 1e6)}bit burst {burst} latency 400ms"


def why_not(commands: Sequence[str] | None = None) -> str | None:
    """Explain why commands cannot run in a new network namespace; None if they can.

    Args:
        commands: Commands that are tried; by default those that a link of limited rate needs.
    """
    if commands is None:
        links = ("ip link add bridge type bridge", "ip link add port type veth peer name other", _limit("port", 1))
        commands = ("nsenter --version", *links)
    tools = dict.fromkeys(["unshare", "sh", *(command.split()[0] for command in commands)])
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        return f"not on the PATH: {', '.join(missing)} (some systems keep ip and tc in /usr/sbin)"
    done = subprocess.run(["unshare", "--net", "sh", "-c", " && ".join(commands)], capture_output=True, text=True)
    if done.returncode:
        return f"CAP_NET_ADMIN and the kernel's bridge, veth and tbf are needed ({done.stderr.strip()})"
    return None


@contextmanager
def _namespace(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """A process in a network namespace of its own that runs the command once it receives a line."""
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
    """Join a worker to the switch by a link whose rate is limited in both directions."""
    _run(switch, f"ip link add port{rank} type veth peer name {INTERFACE} netns {worker.pid}")
    _run(switch, f"ip link set port{rank} up")
    _run(switch, _limit(f"port{rank}", mbit))
    _run(worker, "ip link set lo up")
    _run(worker, f"ip addr add 10.77.0.{rank + 1}/24 dev {INTERFACE}")
    _run(worker, f"ip link set {INTERFACE} gso_max_segs 1")  # packets of the MTU with their headers, as on a wire
    _run(worker, f"ip link set {INTERFACE} up")
    _run(worker, _limit(INTERFACE, mbit))


def _environment(rank: int, num_workers: int, address: str, port: int, interface: str) -> dict[str, str]:
    """Environment that torchrun gives a worker on a node of its own; one thread, since workers share the cores."""
    return {
        **os.environ,
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "GROUP_RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(num_workers),
        "LOCAL_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "benchmarks",
        "GLOO_SOCKET_IFNAME": interface,
        "OMP_NUM_THREADS": "1",
    }


def run_linked(command: Sequence[str], num_workers: int, mbit: float, latency: float = 0.0) -> None:
    """Run a Python command once per worker, each on a link of its own, as torchrun would on as many machines.

    Args:
        command: Arguments of the interpreter.
        num_workers: Number of workers, K >= 2.
        mbit: Rate of each link in each direction, in 1e6 bits per second.
        latency: Seconds from one worker to another, besides those that the bytes take.

    Raises:
        RuntimeError: No link can be limited on this machine, or a worker failed; the other workers are ended.
    """
    if reason := why_not():
        raise RuntimeError(f"No link can be limited here: {reason}.")
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
    """Run a Python command once per worker over the loopback interface, whose rate is not limited.

    Args:
        command: Arguments of the interpreter.
        num_workers: Number of workers, K >= 1.

    Raises:
        RuntimeError: A worker failed; the others are ended.
    """
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
