"""Reading the golden numbers: their sign (local - global) and layout ([in, out]) turned into ours."""

from __future__ import annotations

import torch

from lightning_lopt import AdaMLP


def golden_adamlp(data, dtype: torch.dtype, prefix: str = "") -> AdaMLP:
    """The authors' network; rows of odd features change sign with the pseudo-gradient."""
    first = torch.from_numpy(data["theta/w0"]).double()
    odd = torch.from_numpy(data["odd_features"]) if "odd_features" in data else _odd_features(first.shape[0])
    first[odd] *= -1
    inputs = first.shape[0] - 38
    network = AdaMLP(inputs="mean" if inputs == 1 else inputs).to(dtype)
    tensors = {"layers.0.weight": first.T}
    for i in range(3):
        tensors[f"layers.{i}.bias"] = torch.from_numpy(data[f"theta/b{i}"])
        if i:
            tensors[f"layers.{i}.weight"] = torch.from_numpy(data[f"theta/w{i}"]).T
    for ours, theirs in (("momentum", "momentum"), ("rms", "rms"), ("factored", "adafactor")):
        tensors[f"decays.{ours}"] = torch.from_numpy(data[f"{prefix}theta/{theirs}_decays"])
    network.load_state_dict(tensors)
    return network


def _odd_features(num_features: int) -> torch.Tensor:
    g = num_features - 38
    odd = [*range(g), *range(g + 1, g + 4), *range(g + 5, g + 8), *range(g + 9, g + 12), *range(g + 24, g + 27)]
    return torch.tensor(odd)


def golden_network(data, dtype: torch.dtype, prefix: str = ""):
    return golden_adamlp(data, dtype, prefix).functional()


def golden_tensors(data) -> list[str]:
    return sorted(name.removeprefix("params0/") for name in data.files if name.startswith("params0/"))
