"""The relay between two processes on limited links: it adds its latency, and bytes arrive unchanged."""

from __future__ import annotations

import json
import textwrap

import pytest

from examples.benchmarks.wire import namespaces

LATENCY = 0.05
WORKER = """
    import hashlib, json, os, socket, sys, time
    data = os.urandom(1000) * 2000
    if os.environ["RANK"] == "0":
        connection, _ = socket.create_server(("10.77.0.1", 5000)).accept()
        connection.sendall(connection.recv(1))
        connection.sendall(data)
        connection.sendall(hashlib.sha256(data).digest())
        connection.recv(1)
    else:
        for _ in range(100):
            try:
                connection = socket.create_connection(("10.77.0.1", 5000))
                break
            except OSError:
                time.sleep(0.1)
        start = time.perf_counter()
        connection.sendall(b".")
        connection.recv(1)
        there_and_back = time.perf_counter() - start
        received = b""
        while len(received) < len(data) + 32:
            received += connection.recv(2**20)
        seconds = time.perf_counter() - start - there_and_back
        whole = hashlib.sha256(received[:-32]).digest() == received[-32:]
        with open(sys.argv[1], "w") as out:
            json.dump([there_and_back, seconds, whole], out)
        connection.sendall(b".")
"""


@pytest.mark.parametrize("latency", [0.0, LATENCY])
def test_bytes_arrive_late_and_whole(tmp_path, latency):
    if reason := namespaces.why_not():
        pytest.skip(reason)
    out = tmp_path / "seconds.json"
    namespaces.run_linked(["-c", textwrap.dedent(WORKER), str(out)], 2, 40, latency)
    there_and_back, seconds, whole = json.loads(out.read_text())
    assert whole
    assert 2 * latency <= there_and_back < 2 * latency + 0.08
    assert 0.3 < seconds < 2  # 0.4 by the rate, and what TCP takes to learn it
