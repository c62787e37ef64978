"""The table of features against the authors' order, and the forms that are sliced from it."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt import AdaMLP
from lightning_lopt.functional.features import (
    ALL_KINDS,
    PUBLISHED_KINDS,
    columns_of_kinds,
    count_features,
    feature_slices,
)


@pytest.mark.parametrize("num_inputs", [1, 4, 8])
def test_order_and_numbers_are_the_authors(num_inputs):
    """Odd features change sign with the pseudo-gradient; the golden networks list their places (`tests.golden`)."""
    g, slices = num_inputs, feature_slices(num_inputs, PUBLISHED_KINDS)
    odd = [*range(g), *range(g + 1, g + 4), *range(g + 5, g + 8), *range(g + 9, g + 12), *range(g + 24, g + 27)]
    names = ("grads", "momentum", "normed_momentum", "factored_grad", "factored_momentum")
    assert [i for name in names for i in range(count_features(g))[slices[name]]] == odd
    assert count_features(g, PUBLISHED_KINDS) == g + 38
    assert slices["time"] == slice(g + 27, g + 38)
    assert slices["param"] == slice(g, g + 1)


@pytest.mark.parametrize("num_inputs", [1, 3])
def test_kinds_part_the_columns(num_inputs):
    count = count_features(num_inputs)
    weight = torch.arange(2.0 * count).view(1, 2, count)
    parts = [columns_of_kinds(weight, num_inputs, kind) for kind in ALL_KINDS]
    assert [part.shape[-1] for part in parts] == [num_inputs + 15, 6, 6, 11, 11]
    assert torch.equal(torch.cat(parts, -1).sort(-1).values, weight)
    coordinate = feature_slices(num_inputs, ("coordinate",))
    everywhere = feature_slices(num_inputs)
    for name, columns in coordinate.items():
        assert torch.equal(parts[0][..., columns], weight[..., everywhere[name]])


def test_a_published_network_has_no_columns_for_the_tensor():
    weight = AdaMLP(seed=0).functional().weights[0]
    assert torch.equal(columns_of_kinds(weight, 1, "time", "tensor"), weight[..., -11:])
