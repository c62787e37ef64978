"""Controller: the meta-parameters of the controlled step, and the file they live in."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lopt.functional.control import INPUTS, OUTPUTS, ControllerWeights
from lightning_lopt.weights_file import read_file, write_file

FORMAT = "lightning_lopt.Controller"


class Controller(nn.Module):
    r"""A linear controller of the blended Nesterov step: how its settings follow from what a run shows.

    The equation is that of `lightning_lopt.functional.control.controlled`. A new one is 0 and changes nothing.

    Args:
        card: Provenance, anything that JSON can hold; saved with the weights.

    Shape:
        Parameters ``weight`` [4, 17] and ``bias`` [4]; buffers ``low`` and ``high`` [17], to which inputs are clamped.

    Example:
        >>> sum(p.numel() for p in Controller().parameters())
        72
    """

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, card: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.card = dict(card or {})
        self.weight = nn.Parameter(torch.zeros(len(OUTPUTS), len(INPUTS)))
        self.bias = nn.Parameter(torch.zeros(len(OUTPUTS)))
        self.register_buffer("low", torch.full((len(INPUTS),), -100.0))
        self.register_buffer("high", torch.full((len(INPUTS),), 100.0))

    def weights(self) -> ControllerWeights:
        """Return the meta-parameters as `functional.control` takes them, with P = 1."""
        tensors = (self.weight, self.bias, self.low, self.high)
        return ControllerWeights(*(tensor.detach().unsqueeze(0) for tensor in tensors))

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the weights and the card to a safetensors file; arguments and errors are those of `AdaMLP.save`."""
        write_file(path, FORMAT, {}, self.card, self.state_dict(), overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Controller:
        """Read what `save` wrote. Nothing in the file is executed.

        Raises:
            FileNotFoundError: There is no such file.
            WeightsError: The file is of another format, is damaged, or holds values that are not finite.
        """
        controller, tensors = read_file(path, FORMAT, cls, _shapes)
        controller.load_state_dict(tensors, assign=True)
        return controller

    @classmethod
    def bundled(cls) -> Controller:
        """Load the controller that comes with the package."""
        return cls.load(cls.bundled_path())

    @staticmethod
    def bundled_path() -> Path:
        """Return the path of the file of that controller."""
        return Path(str(resources.files("lightning_lopt") / "weights" / "controllers" / "linear.safetensors"))


def _shapes(controller: Controller) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in controller.state_dict().items()}
