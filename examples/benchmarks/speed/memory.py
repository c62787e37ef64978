"""The peak of the resident set, where the system tells (Linux)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def extra_bytes(work: Callable[[], Any]) -> int | None:
    """Peak bytes of the process during a call beyond those before it; None where the system does not tell.

    Args:
        work: called once; what allocators keep from earlier calls hides its needs, so use a fresh process.
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
