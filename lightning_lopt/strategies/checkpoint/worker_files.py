"""Files beside a checkpoint, one for the part of each process: their names, and how they are read and deleted.

`writing.CheckpointWriter.write` writes them.
"""

from __future__ import annotations

import glob
import re
from itertools import chain
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_lopt.strategies.errors import CheckpointError


def part_file(checkpoint_path: Any, token: str, rank: int) -> str:
    """Return the path of a part: ``a.ckpt.<token>.worker00003`` is that of process 3.

    Args:
        checkpoint_path: Path of the checkpoint.
        token: Name that all parts share that were written together, and no others.
        rank: Number of the part.
    """
    return f"{checkpoint_path}.{token}.worker{rank:05d}"


def load_part(
    checkpoint_io: CheckpointIO, checkpoint_path: Any, token: str, rank: int, weights_only: bool | None
) -> dict[str, Any]:
    """Read a worker's part.

    Args:
        checkpoint_io: Reader of the files.
        checkpoint_path: Path of the checkpoint, without links.
        token: Name that all parts of the checkpoint share.
        rank: Number of the part.
        weights_only: Argument of `torch.load`.

    Raises:
        CheckpointError: The file is missing, damaged, or that of another worker or checkpoint.
    """
    name = part_file(checkpoint_path, token, rank)
    if not get_filesystem(name).exists(name):
        raise CheckpointError(
            f"{checkpoint_path} belongs with one file per worker beside it, and {Path(name).name} is missing: move and "
            "copy them together. To begin anew from its weights alone use load_from_checkpoint."
        )
    part = checkpoint_io.load_checkpoint(name, weights_only=weights_only)
    if not isinstance(part, dict) or (part.get("token"), part.get("rank")) != (token, rank):
        raise CheckpointError(
            f"{name} is another worker's file, or of another checkpoint, under this name: copy it again from where it "
            "came from. To begin anew from the weights alone use load_from_checkpoint."
        )
    return part


def remove_parts(
    checkpoint_io: CheckpointIO, checkpoint_path: Any, keep: int = 0, share: tuple[int, int] = (0, 1)
) -> None:
    """Delete the parts of a checkpoint, however many processes wrote them.

    Args:
        checkpoint_io: Writer of the files.
        checkpoint_path: Path of the checkpoint.
        keep: Number of times that the checkpoint was written whose parts stay, the last ones; each time has its token.
        share: Pair of r and n, where only the parts r, r + n, r + 2n, ... are looked at.
    """
    fs, (remainder, divisor) = get_filesystem(checkpoint_path), share
    name = re.compile(re.escape(Path(str(checkpoint_path)).name) + r"\.([^.]+)\.worker(\d{5,})")
    files: dict[str, list[str]] = {}  # by token
    for file in fs.glob(f"{glob.escape(str(checkpoint_path))}.*.worker*"):
        match = name.fullmatch(Path(str(file)).name)
        if match is not None and int(match[2]) % divisor == remainder:
            files.setdefault(match[1], []).append(str(file))
    if keep:
        for token in sorted(files, key=lambda t: max(fs.modified(file) for file in files[t]))[-keep:]:
            del files[token]
    for file in chain.from_iterable(files.values()):
        checkpoint_io.remove_checkpoint(fs.unstrip_protocol(file) if "://" in str(checkpoint_path) else file)
