"""A small file from which meta-training goes on with fresh particles: network and state of the meta-optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_lopt.meta.base import Tensors
from lightning_lopt.network import AdaMLP, parameter_shapes
from lightning_lopt.weights_file import WeightsError, read_file, write_file

FORMAT = "lightning_lopt.MetaTraining"
MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}  # our names and torch's


@dataclass(frozen=True)
class Export:
    """The state of a meta-training, without its particles: tens of kB.

    Attributes:
        network: Network that is trained.
        iterations: Number of steps of the meta-optimizer so far, >= 0.
        moments: Moments of AdamW, ``"first"`` and ``"second"``, each {[*S]} by the names of the meta-parameters.

    Example:
        >>> Export.of(AdaMLP(seed=0), torch.optim.AdamW(AdaMLP(seed=0).parameters()), 0).iterations
        0
    """

    network: AdaMLP
    iterations: int
    moments: dict[str, Tensors]

    @classmethod
    def of(cls, network: AdaMLP, optimizer: Optimizer, iterations: int) -> Self:
        """Collect the state of a run.

        Args:
            network: Network that is trained.
            optimizer: AdamW on its meta-parameters.
            iterations: Number of its steps so far.
        """
        moments = {
            ours: {
                name: optimizer.state.get(p, {}).get(theirs, torch.zeros_like(p))
                for name, p in network.named_parameters()
            }
            for ours, theirs in MOMENTS.items()
        }
        return cls(network, iterations, moments)

    def restore(self, parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
        """Give a new AdamW on these meta-parameters the state of the old one."""
        if not self.iterations:
            return
        for name, p in parameters.items():
            state = {theirs: self.moments[ours][name].clone().to(p.device) for ours, theirs in MOMENTS.items()}
            optimizer.state[p] = {"step": torch.tensor(float(self.iterations)), **state}

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the export to a safetensors file; arguments and errors are those of `AdaMLP.save`."""
        tensors = {f"{kind}.{name}": t for kind, moments in self.moments.items() for name, t in moments.items()}
        tensors |= {"iterations": torch.tensor(float(self.iterations)), **dict(self.network.named_parameters())}
        write_file(path, FORMAT, self.network.config, self.network.card, tensors, overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Nothing in the file is executed.

        Raises:
            FileNotFoundError: There is no such file.
            WeightsError: The file is no export, is damaged, or holds numbers that no meta-training has.
        """
        network, tensors = read_file(path, FORMAT, AdaMLP, _shapes)
        iterations = tensors.pop("iterations").item()
        moments = {
            kind: {name: tensors.pop(f"{kind}.{name}") for name in parameter_shapes(network)} for kind in MOMENTS
        }
        if iterations < 0 or iterations % 1 or min(t.min() for t in moments["second"].values()) < 0:
            raise WeightsError(f"{path} cannot be used: its iterations or second moments are not of a meta-training.")
        network.load_state_dict(tensors, assign=True)
        return cls(network, int(iterations), moments)


def _shapes(network: AdaMLP) -> dict[str, tuple[int, ...]]:
    """List the shapes of all tensors of an export."""
    parameters = parameter_shapes(network)
    moments = {f"{kind}.{name}": shape for kind in MOMENTS for name, shape in parameters.items()}
    return {**parameters, **moments, "iterations": ()}
