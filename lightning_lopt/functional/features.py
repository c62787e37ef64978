"""The inputs of the learned optimizer's network: one table, in the order of the columns of the first layer."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

FeatureKind = Literal["coordinate", "row", "column", "time", "tensor"]
"""Along which dimensions of a matrix a feature varies: both, one of them, or none; a tensor's features differ from
tensor to tensor, those of time do not."""


class Feature(NamedTuple):
    """An input of the network, or several of one meaning.

    Attributes:
        name: Name by which it is looked up.
        size: Number of inputs.
        kind: Dimensions along which it varies.
    """

    name: str
    size: int
    kind: FeatureKind


FEATURES = (
    Feature("grads", 1, "coordinate"),  # one for each worker in a network with K inputs
    Feature("param", 1, "coordinate"),
    Feature("momentum", 3, "coordinate"),
    Feature("second", 1, "coordinate"),
    Feature("normed_momentum", 3, "coordinate"),
    Feature("rsqrt_second", 1, "coordinate"),
    Feature("factored_grad", 3, "coordinate"),
    Feature("row", 3, "row"),
    Feature("col", 3, "column"),
    Feature("rsqrt_row", 3, "row"),
    Feature("rsqrt_col", 3, "column"),
    Feature("factored_momentum", 3, "coordinate"),
    Feature("time", 11, "time"),
    Feature("cosine", 3, "tensor"),  # of the pseudo-gradient and each momentum
    Feature("momentum_over_grad", 3, "tensor"),
    Feature("grad_over_row", 3, "tensor"),
    Feature("grad_over_param", 1, "tensor"),
    Feature("is_vector", 1, "tensor"),
)
PUBLISHED_KINDS: tuple[FeatureKind, ...] = ("coordinate", "row", "column", "time")
ALL_KINDS: tuple[FeatureKind, ...] = (*PUBLISHED_KINDS, "tensor")


@lru_cache
def feature_slices(num_inputs: int, kinds: tuple[FeatureKind, ...] = ALL_KINDS) -> dict[str, slice]:
    """Find the columns of each feature among the features of some kinds.

    Args:
        num_inputs: Number of pseudo-gradients that the network sees.
        kinds: Kinds of the features that are counted.

    Returns:
        Columns by name, in the order of `FEATURES`.

    Example:
        >>> feature_slices(1)["param"], feature_slices(8)["param"], feature_slices(1, ("row",))["rsqrt_row"]
        (slice(1, 2, None), slice(8, 9, None), slice(3, 6, None))
    """
    slices, start = {}, 0
    for name, size, kind in FEATURES:
        if kind in kinds:
            stop = start + (num_inputs if name == "grads" else size)
            slices[name] = slice(start, stop)
            start = stop
    return slices


def count_features(num_inputs: int, kinds: tuple[FeatureKind, ...] = ALL_KINDS) -> int:
    """Count the features of some kinds; arguments are those of `feature_slices`.

    Example:
        >>> count_features(1, PUBLISHED_KINDS), count_features(1), count_features(4, ("coordinate",))
        (39, 50, 19)
    """
    return max((columns.stop for columns in feature_slices(num_inputs, kinds).values()), default=0)


def columns_of_kinds(weight: Tensor, num_inputs: int, *kinds: FeatureKind) -> Tensor:
    """Select the columns of a first layer's weight that multiply features of some kinds.

    Args:
        weight: Weight of the first layer, [P, out, F].
        num_inputs: Number of pseudo-gradients that the network sees.
        *kinds: Kinds of the features.

    Returns:
        Columns in the order of `FEATURES`, [P, out, n].
    """
    return torch.cat([weight[..., columns] for columns in _ranges(num_inputs, kinds)], -1)


@lru_cache
def _ranges(num_inputs: int, kinds: tuple[FeatureKind, ...]) -> list[slice]:
    """Columns of the features of some kinds, neighbours joined."""
    slices, ranges = feature_slices(num_inputs), []
    for feature in FEATURES:
        if feature.kind in kinds:
            start, stop = slices[feature.name].start, slices[feature.name].stop
            if ranges and ranges[-1].stop == start:
                start = ranges.pop().start
            ranges.append(slice(start, stop))
    return ranges
