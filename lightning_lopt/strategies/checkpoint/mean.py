"""The mean of the workers' parts of a checkpoint, for a run that goes on with another number of workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from torch import Tensor


def mean_part(parts: Iterable[Mapping[str, Any]], batch_ratio: Fraction) -> dict[str, Any]:
    r"""Return the mean of the workers' parts, from which any number of workers can go on.

    .. math:: \bar y = \tfrac1K \textstyle\sum_i y_i

    is taken of parameters, floating-point buffers, local optimizers' states (momenta, second moments, step counters),
    and the residuals of compression, of which the new workers' mean then holds as much as the old ones' did. Counters,
    schedules, and states with lists or tensors of integers in them (LBFGS, 8-bit optimizers) are the first worker's.
    Parts with a number that is not finite are left out, unless all have one. Places in the data are shared out anew.
    Random states, accumulated gradients, and the states of loaders that have their own, are dropped.

    No more than two parts are held at a time; the first is overwritten.

    Args:
        parts: Parts of the old workers, at least one.
        batch_ratio: Number of batches per new worker that are together as many as one batch per old worker.

    Returns:
        A part with one more entry, `batch_ratio`: the number of batches per new worker that are together as many as one
        batch per old worker, if batches stay as large. The states of loaders have it, too.

    Example:
        >>> import torch
        >>> part = {"checkpoint": {"optimizer_states": []}, "random": {}, "gradients": {}, "loaders": [None]}
        >>> local = [{"round_idx": 3, "sync": {"params": [torch.tensor([x])]}} for x in (1.0, 2.0)]
        >>> mean_part([{**part, "local": own} for own in local], Fraction(2, 1))["local"]
        {'round_idx': 3, 'sync': {'params': [tensor([1.5000])], 'exchange': None}}
    """
    first, mean, number, usable = {}, {}, 0, False
    for part in parts:
        own = {"local": part["local"], "states": part["checkpoint"]["optimizer_states"]}
        finite = all(bool(t.isfinite().all()) for t in _floats(own))
        if number == 0 or (finite and not usable):
            first = {**part, "checkpoint": {**part["checkpoint"]}}
            del first["local"], first["checkpoint"]["optimizer_states"]
            mean, number, usable = own, 1, finite
        elif finite or not usable:
            number += 1
            _move(mean["local"], own["local"], 1 / number)
            for states, new in zip(mean["states"], own["states"], strict=True):
                _move_states(states["state"], new["state"], 1 / number)
    mean["local"]["sync"]["exchange"] = None  # its steps are in the mean
    return {
        "checkpoint": {**first["checkpoint"], "optimizer_states": mean["states"]},
        "local": mean["local"],
        "random": None,
        "gradients": {},
        "loaders": [s and {**s, "batch_ratio": batch_ratio, "start": None} for s in first["loaders"]],
        "batch_ratio": batch_ratio,
    }


def _floats(tree: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested dictionaries and lists."""
    if isinstance(tree, Tensor) and tree.is_floating_point():
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _floats(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _floats(value)


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
