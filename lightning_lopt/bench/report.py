"""What all benchmarks share: the machine, tables and files."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import lightning_lopt

Row = Mapping[str, Any]


def machine() -> dict[str, Any]:
    """What a number depends on besides the code: versions, threads, processor."""
    return {
        "lightning_lopt": lightning_lopt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def table(rows: Sequence[Row]) -> str:
    """Rows of equal keys as text, one column per key; None is left blank.

    Example:
        >>> print(table([{"name": "a", "seconds": 1.23456}, {"name": "bb", "seconds": None}]))
        name  seconds
        a       1.235
        bb
    """

    def show(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    columns = [[key, *(show(row[key]) for row in rows)] for key in rows[0]]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for cells in zip(*columns, strict=True):
        first, *rest = zip(cells, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip())
    return "\n".join(lines)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a result; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
