"""The format of weights files: safetensors with a configuration, a card and a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = "1"
Described = TypeVar("Described")


class WeightsError(ValueError):
    """A weights file cannot be used; the message gives the fault and the remedy."""


def write_file(
    path: str | Path,
    file_format: str,
    config: Mapping[str, Any],
    card: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    overwrite: bool,
) -> None:
    """Write tensors with their description to a file, atomically.

    Args:
        path: Path of the file.
        file_format: Name of the format, which `read_file` expects.
        config: Arguments of the module that the tensors belong to, as JSON can hold them.
        card: Provenance, as JSON can hold it.
        tensors: Tensors by name.
        overwrite: Whether to replace an existing file.

    Raises:
        FileExistsError: The file exists, and `overwrite` is False.
        FileNotFoundError: The folder does not exist.
        WeightsError: A tensor is not finite.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already, and is left as it is. Choose another name, or overwrite=True.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder {path.parent} for {path.name}. Make it first, or correct the path."
        )
    tensors = {name: t.detach().float().contiguous().cpu() for name, t in tensors.items()}
    _check_finite(tensors, f"This network cannot be saved to {path}")
    metadata = {
        "format": file_format,
        "version": VERSION,
        "config": json.dumps(config, sort_keys=True),
        "card": json.dumps(card, sort_keys=True),
    }
    metadata["sha256"] = _sha256(tensors, metadata)
    part = path.with_name(f"{path.name}.part")  # so that a kill leaves the old file or the new one
    save_file(tensors, str(part), metadata=metadata)
    part.replace(path)


def read_file(
    path: str | Path,
    file_format: str,
    make: Callable[..., Described],
    shapes: Callable[[Described], Mapping[str, tuple[int, ...]]],
) -> tuple[Described, dict[str, Tensor]]:
    """Read a file of `write_file`. Nothing in the file is executed.

    Args:
        path: Path of the file.
        file_format: Expected name of the format.
        make: Function that makes a module from the configuration and the card, as keywords.
        shapes: Function that returns the shapes of the tensors of such a module.

    Returns:
        The module, without memory for its tensors, and the tensors.

    Raises:
        FileNotFoundError: The file does not exist.
        WeightsError: The file is corrupt, truncated, of another format or version, or holds wrong shapes or values
            that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no weights file {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = _metadata(path, file, file_format)
            made = _make(path, metadata, make)
            _check_shapes(path, file, shapes(made))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except WeightsError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path} is not a readable safetensors file ({error}). It may be truncated: copy it again."
        ) from error
    _check_finite(tensors, f"{path} cannot be used")
    if metadata.get("sha256") not in (None, _sha256(tensors, metadata)):
        raise WeightsError(f"{path} is damaged: its content does not fit its checksum. Copy it again.")
    return made, tensors


def _metadata(path: Path, file: Any, file_format: str) -> dict[str, str]:
    metadata = file.metadata() or {}
    found, version = metadata.get("format"), metadata.get("version")
    if found != file_format:
        raise WeightsError(
            f"{path} is not a file that fits here: it says format {found!r}, expected {file_format!r}. Give one that "
            f"{file_format.rpartition('.')[2]}.save has written."
        )
    if version != VERSION:
        raise WeightsError(
            f"{path} has version {version!r} of its format, expected {VERSION!r}: another release of lightning_lopt "
            "wrote it. Install that one."
        )
    if unknown := sorted(metadata.keys() - {"format", "version", "config", "card", "sha256"}):
        raise WeightsError(f"{path} has metadata that this version does not know: {unknown}.")
    return {"card": "{}", **metadata}


def _make(path: Path, metadata: Mapping[str, str], make: Callable[..., Described]) -> Described:
    try:
        with torch.device("meta"):  # the configuration may ask for any amount of memory
            return make(**json.loads(metadata["config"]), card=json.loads(metadata["card"]))
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise WeightsError(f"{path} has a configuration that cannot be used: {error}") from error


def _check_shapes(path: Path, file: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {name: ("F32", *shape) for name, shape in shapes.items()}
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    held = {name: (s.get_dtype(), *s.get_shape()) for name, s in slices.items()}
    if held != expected:
        wrong = sorted(k for k in {*held, *expected} if held.get(k) != expected.get(k))
        raise WeightsError(
            f"{path} does not hold the tensors of its configuration. "
            + "; ".join(f"{k}: {held.get(k, 'missing')}, expected {expected.get(k, 'none')}" for k in wrong)
        )


def _sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Checksum of the whole content of a weights file."""
    parts = [json.loads(metadata["config"]), json.loads(metadata["card"])]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise WeightsError(f"{what}: {', '.join(bad)} holds values that are not finite.")
