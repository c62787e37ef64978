"""Files of checkpoints: written whole or not at all, read only if undamaged."""

from __future__ import annotations

import errno
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from lightning_lopt.strategies import host
from lightning_lopt.strategies.errors import CheckpointError

FOLDER = 0x10  # attribute of an entry of a zip file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Files of which a kill at any moment leaves the old one or the new one, whole.

    A file is written beside its target and renamed. Lightning's own writer uses the system's temporary folder, and
    copies the file if that is on another disk, which a kill can leave half done. Before a file is read, its checksums
    are compared, which torch does not do. Remote paths go Lightning's way.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(accelerator="cpu", plugins=[AtomicCheckpointIO()], logger=False)
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or not host.is_local_path(path):
            super().save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        target = Path(str(path).removeprefix("file://"))
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            Path(name).chmod(0o666 & ~umask)  # mkstemp lets only the owner read
            Path(name).replace(target)
        except BaseException as error:
            Path(name).unlink(missing_ok=True)
            if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
                raise error.__context__ from None  # torch.save's own error does not mention a full disk
            raise

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not host.is_local_path(path):
            return super().load_checkpoint(path, *args, **kwargs)
        file = Path(str(path).removeprefix("file://"))
        if file.is_file():
            _check(file)
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except (RuntimeError, OSError) as error:  # torch may be told to seek before the file's start
            seeks = isinstance(error, OSError) and error.errno == errno.EINVAL
            if not seeks and "PytorchStreamReader" not in str(error):
                raise
            raise _damaged(file, str(error).splitlines()[0]) from error


def _check(file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            folders = (info.filename for info in archive.infolist() if info.external_attr & FOLDER)
            wrong = archive.testzip() or next(folders, None)  # torch does not read the bytes of a folder
    except Exception as error:  # zipfile has many kinds for a file that is no zip file any more
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    if wrong is not None:
        raise _damaged(file, f"{wrong} is not as it was written")


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is no checkpoint, or was damaged or cut off: {reason}. Use the one before it, or copy it again from "
        "where it came from."
    )
