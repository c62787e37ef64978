"""Files of rows and a description of the machine, for all benchmarks."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import lightning_lopt

Row = Mapping[str, Any]


class UsageError(ValueError):
    """An argument or a file that a benchmark cannot take; the message gives the fault and the remedy."""


def machine() -> dict[str, Any]:
    """Versions, threads and processor, on which a measurement depends besides the code."""
    return {
        "lightning_lopt": lightning_lopt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def append_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Append a line of JSON per row; an incomplete last line, left by a killed run, is removed first."""
    path = Path(path)
    if path.is_file():
        _finish_last_line(path)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: str | Path, needed: Collection[str] = ()) -> list[dict[str, Any]]:
    """Read rows that `append_rows` wrote; an incomplete last line, left by a killed run, is skipped with a note.

    Args:
        path: File of rows.
        needed: Names that each row must have.

    Raises:
        ValueError: Another line is not such a row, or there are no rows.
    """
    rows = []
    with Path(path).open(errors="replace") as file:
        for number, line in enumerate(file, 1):
            row = _row(line)
            if row is None and not line.endswith("\n"):
                _note(path, "and is not read")
            elif row is None or not row.keys() >= set(needed):
                raise UsageError(
                    f"{path}, line {number}, is not a row of this benchmark: {line.strip()[:60]!r}. Remove it, or give "
                    "the file that the benchmark wrote."
                )
            else:
                rows.append(row)
    if not rows:
        raise UsageError(f"{path} holds no rows. Give a file to which a benchmark has written some.")
    return rows


def _row(line: str | bytes) -> dict[str, Any] | None:
    """Parse the JSON object in a line; None if there is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _note(path: str | Path, consequence: str) -> None:
    print(f"{path}: the last line is incomplete, as a killed run leaves it, {consequence}.", file=sys.stderr)


def _finish_last_line(path: Path) -> None:
    with path.open("r+b") as file:
        *_, last = b"\n", *file
        if last.endswith(b"\n"):
            return
        if _row(last) is not None:
            file.write(b"\n")
        else:
            _note(path, "and is removed")
            file.truncate(file.tell() - len(last))


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a result as JSON, and create the folder if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
