"""What belongs to single workers in a checkpoint: files beside it, and one part made of several."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import Tensor

from lightning_lopt.strategies.checkpoint.atomic import CheckpointError


def part_file(checkpoint_path: Any, token: str, rank: int) -> str:
    """Where a worker's part lies; the token is the same for all parts of a checkpoint, and no other's."""
    return f"{checkpoint_path}.{token}.worker{rank:05d}"


def load_part(
    checkpoint_io: CheckpointIO, checkpoint_path: Any, token: str, rank: int, weights_only: bool | None
) -> dict[str, Any]:
    """A worker's part.

    Raises:
        CheckpointError: it is missing, damaged, or that of another worker or checkpoint.
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
    """Delete a worker's files of a checkpoint, but for the last `keep`."""
    fs = get_filesystem(checkpoint_path)
    files = [str(f) for f in fs.glob(part_file(glob.escape(str(checkpoint_path)), "*", rank))]
    files.sort(key=fs.modified)
    for file in files[: len(files) - keep]:
        fs.rm(file)


def merged(parts: Iterable[Mapping[str, Any]], num_parts: int) -> dict[str, Any]:
    r"""The mean of the workers' parts, of which no more than two are held at a time; the first is overwritten.

    .. math:: \bar y = \tfrac1K \textstyle\sum_i y_i

    of parameters, floating-point buffers, local optimizers' states (momenta, second moments, step counters), and of
    what compression has not sent: the new workers' means then hold as much of it as the old ones' would have. Counters,
    schedules, and states with lists or tensors of integers in them (LBFGS, 8-bit optimizers) are the first worker's.
    Parts with a number that is not finite are left out, unless all have one. Places in the data are shared out anew.
    Random states, accumulated gradients, and the states of loaders that have their own, are dropped.

    Args:
        parts: of the workers, at least one.
        num_parts: that there will be of the new workers. The result has, as `share`, the batches that one of them has
            for one of an old worker's.

    Example:
        >>> import torch
        >>> part = {"checkpoint": {"optimizer_states": []}, "random": {}, "gradients": {}, "loaders": [None]}
        >>> local = [{"round_idx": 3, "sync": {"params": [torch.tensor([x])]}} for x in (1.0, 2.0)]
        >>> merged([{**part, "local": own} for own in local], num_parts=1)["local"]
        {'round_idx': 3, 'sync': {'params': [tensor([1.5000])], 'flight': None}}
    """
    first, mean, number, usable = {}, {}, 0, False
    total = 0
    for part in parts:
        total += 1
        own = {"local": part["local"], "states": part["checkpoint"]["optimizer_states"]}
        finite = all(bool(t.isfinite().all()) for t in _numbers(own))
        if number == 0 or (finite and not usable):
            first = {**part, "checkpoint": {**part["checkpoint"]}}
            del first["local"], first["checkpoint"]["optimizer_states"]
            mean, number, usable = own, 1, finite
        elif finite or not usable:
            number += 1
            _move(mean["local"], own["local"], 1 / number)
            for states, new in zip(mean["states"], own["states"], strict=True):
                _move_states(states["state"], new["state"], 1 / number)
    mean["local"]["sync"]["exchange"] = None  # its steps are in the mean, too
    share = Fraction(total, num_parts)
    return {
        "checkpoint": {**first["checkpoint"], "optimizer_states": mean["states"]},
        "local": mean["local"],
        "random": None,
        "gradients": {},
        "loaders": [s and {**s, "consumed": int(s["consumed"] * share), "start": None} for s in first["loaders"]],
        "share": share,
    }


def _numbers(tree: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested dictionaries and lists."""
    if isinstance(tree, Tensor) and tree.is_floating_point():
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _numbers(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _numbers(value)


def _move(mean: Any, new: Any, weight: float) -> None:
    """Move the floating-point tensors of a tree toward those of another one, in place; the rest stays."""
    if isinstance(mean, Tensor) and isinstance(new, Tensor):
        if mean.is_floating_point() and mean.shape == new.shape:
            mean.lerp_(new.to(mean), weight)
    elif isinstance(mean, Mapping) and isinstance(new, Mapping):
        for key in mean.keys() & new.keys():
            _move(mean[key], new[key], weight)
    elif isinstance(mean, list) and isinstance(new, list):
        for pair in zip(mean, new, strict=False):
            _move(*pair, weight)


def _move_states(mean: dict[Any, Any], new: Mapping[Any, Any], weight: float) -> None:
    """The same for an optimizer's states; a parameter that only one worker has a state for gets that."""
    for key, state in new.items():
        own = mean.setdefault(key, state)
        if not any(isinstance(v, list | Mapping) or (isinstance(v, Tensor) and _is_code(v)) for v in own.values()):
            _move(own, state, weight)


def _is_code(tensor: Tensor) -> bool:
    return tensor.ndim > 0 and not tensor.is_floating_point()
