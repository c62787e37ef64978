"""Peak of the resident set, where the system reports it (Linux)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def extra_bytes(work: Callable[[], Any]) -> int | None:
    """Measure how far a call raises the resident set of this process, in bytes; None where the system has no figure.

    Args:
        work: Function that is called once. Use a fresh process: memory that allocators kept from earlier calls hides
            part of its needs.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
