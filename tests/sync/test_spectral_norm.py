"""Spectral normalisation: after a sync, and while the mean is evaluated, the largest singular value is 1."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lopt import Rounds, SyncOptions
from tests.threads import run_threads

LAYERS = {
    "linear": lambda: nn.Linear(6, 8),
    "convolution": lambda: nn.Conv2d(3, 5, 2),
    "transposed": lambda: nn.ConvTranspose2d(3, 5, 2),
}
STYLES = {"parametrization": nn.utils.parametrizations.spectral_norm, "hook": nn.utils.spectral_norm}
SHAPES = {"linear": (4, 6), "convolution": (2, 3, 4, 4), "transposed": (2, 3, 4, 4)}


def _sigma(layer, inputs):
    layer.eval()
    layer(inputs)  # the old style computes its weight here
    weight = layer.weight.detach()
    layer.train()
    return torch.linalg.matrix_norm(weight.movedim(int(isinstance(layer, nn.ConvTranspose2d)), 0).flatten(1), 2).item()


def _train(rank, make_comm, layers, kind, overlap):
    layer = layers[rank]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    options = SyncOptions(overlap_steps=overlap)
    rounds = Rounds(layer, optimizer, 4, lambda p: torch.optim.SGD(p, lr=0.7), comm=make_comm(), options=options)
    inputs = torch.randn(10, *SHAPES[kind], generator=torch.Generator().manual_seed(rank))
    sigmas = []
    for step, x in enumerate(inputs):
        optimizer.zero_grad()
        layer(x).pow(2).mean().neg().backward()
        optimizer.step()
        if rounds.step() and not overlap:
            sigmas.append(_sigma(layer, x))
        if step == 5:
            for weights in ("anchor", "mean"):
                rounds.swap_in(weights)
                sigmas.append(_sigma(layer, x))
                rounds.swap_out()
    rounds.finish_round()
    return [*sigmas, _sigma(layer, x)]


@pytest.mark.parametrize("overlap", [0, 2])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("style", STYLES)
def test_sigma_is_1(style, kind, overlap):
    torch.manual_seed(0)
    layers = [STYLES[style](LAYERS[kind]()) for _ in range(2)]
    first, second = run_threads(_train, 2, layers, kind, overlap)
    assert first == pytest.approx([1.0] * len(first), abs=0.02)
    assert second[-1] == first[-1]
