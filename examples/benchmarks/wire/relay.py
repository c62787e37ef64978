"""A switch that delays every frame by a fixed time: latency without the kernel's netem. It needs no torch."""

from __future__ import annotations

import select
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

EVERYTHING, OUTGOING = 3, 4  # ETH_P_ALL, PACKET_OUTGOING
SOL_PACKET, PACKET_VNET_HDR = 263, 15
HEADER = 10  # bytes that describe what the kernel has yet to do: checksums, segments
LARGEST = 2**16 + 100
BUFFER = 2**26


def relay(interfaces: Sequence[str], latency: float) -> None:
    """Forward each frame to the interface of its receiver, or to all others while that is unknown, until one is down.

    Args:
        interfaces: Interfaces of this network namespace.
        latency: Seconds by which each frame is delayed.
    """
    ports = [_open(interface) for interface in interfaces]
    known: dict[bytes, socket.socket] = {}
    kept: deque[tuple[float, list[socket.socket], bytes]] = deque()
    while True:
        ready, _, _ = select.select(ports, [], [], max(0.0, kept[0][0] - time.monotonic()) if kept else None)
        for port in ready:
            frame, address = port.recvfrom(LARGEST)
            if address[2] == OUTGOING:
                continue
            receiver, sender = frame[HEADER : HEADER + 6], frame[HEADER + 6 : HEADER + 12]
            known[sender] = port
            others = [known[receiver]] if receiver in known else [other for other in ports if other is not port]
            kept.append((time.monotonic() + latency, others, frame))
        while kept and kept[0][0] <= time.monotonic():
            _, others, frame = kept.popleft()
            for port in others:
                with suppress(OSError):  # a full queue drops it, as in any switch
                    port.send(frame)


def _open(interface: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERYTHING))
    port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    for option in (33, 32):  # SO_RCVBUFFORCE, SO_SNDBUFFORCE
        port.setsockopt(socket.SOL_SOCKET, option, BUFFER)
    port.bind((interface, EVERYTHING))
    return port


if __name__ == "__main__":
    with suppress(OSError):  # an interface is gone: its worker has ended
        relay(sys.argv[2:], float(sys.argv[1]))
