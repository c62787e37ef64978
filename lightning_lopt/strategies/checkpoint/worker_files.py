"""Files beside a checkpoint, one for the part of each worker."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_lopt.strategies.errors import CheckpointError


def part_file(checkpoint_path: Any, token: str, rank: int) -> str:
    """Return the path of a worker's part.

    Args:
        checkpoint_path: Path of the checkpoint.
        token: Name that all parts of a checkpoint share, and those of no other checkpoint.
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


def remove_parts(checkpoint_path: Any, rank: int, keep: int) -> None:
    """Delete a worker's files of a checkpoint.

    Args:
        checkpoint_path: Path of the checkpoint.
        rank: Number of the part.
        keep: Files to keep, the last ones; a checkpoint that was overwritten has one for each time.
    """
    fs = get_filesystem(checkpoint_path)
    files = [str(f) for f in fs.glob(part_file(glob.escape(str(checkpoint_path)), "*", rank))]
    files.sort(key=fs.modified)
    for file in files[: len(files) - keep]:
        fs.rm(file)
