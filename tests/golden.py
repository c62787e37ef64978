"""Reading the golden numbers: their sign (local - global) and layout ([in, out]) turned into ours."""

from __future__ import annotations

import torch
from torch import nn

from lightning_lopt import AdaMLP


def golden_adamlp(data, dtype: torch.dtype, prefix: str = "") -> AdaMLP:
    """The authors' network; rows of odd features change sign with the pseudo-gradient."""
    first = torch.from_numpy(data["theta/w0"]).double()
    g = first.shape[0] - 38
    odd = [*range(g), *range(g + 1, g + 4), *range(g + 5, g + 8), *range(g + 9, g + 12), *range(g + 24, g + 27)]
    if "odd_features" in data:
        assert data["odd_features"].tolist() == odd
    first[odd] *= -1
    network = AdaMLP(inputs="mean" if g == 1 else g).to(dtype)
    tensors = {"layers.0.weight": first.T}
    for i in range(3):
        tensors[f"layers.{i}.bias"] = torch.from_numpy(data[f"theta/b{i}"])
        if i:
            tensors[f"layers.{i}.weight"] = torch.from_numpy(data[f"theta/w{i}"]).T
    for ours, theirs in (("momentum", "momentum"), ("rms", "rms"), ("factored", "adafactor")):
        tensors[f"decays.{ours}"] = torch.from_numpy(data[f"{prefix}theta/{theirs}_decays"])
    network.load_state_dict(tensors)
    return network


def golden_network(data, dtype: torch.dtype, prefix: str = ""):
    return golden_adamlp(data, dtype, prefix).functional()


def golden_tensors(data) -> list[str]:
    return sorted(name.removeprefix("params0/") for name in data.files if name.startswith("params0/"))


def golden_mlp(data, dtype: torch.dtype, round_idx: int = 0) -> nn.Sequential:
    """The MLP of the golden rounds with its global parameters before a round."""
    count = sum(name.startswith("params/w") for name in data.files)
    layers: list[nn.Module] = []
    for i in range(count):
        weight = torch.from_numpy(data[f"params/w{i}"][round_idx]).T
        layer = nn.Linear(weight.shape[1], weight.shape[0]).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(torch.from_numpy(data[f"params/b{i}"][round_idx]))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
