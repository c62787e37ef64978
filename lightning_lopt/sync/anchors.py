"""A worker's parameter with its anchor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lopt.functional.precision import state_dtype


class AnchoredParameter:
    """A parameter and its anchor, which is empty until the parameter is first trained.

    Args:
        param: The worker's own tensor.
        name: Its name, for error messages.
        local: Whether it stays the worker's own: it has no anchor and is never sent.

    Attributes:
        param: The worker's own tensor.
        local: Whether it stays the worker's own.
        dtype: Type of the anchor: float32, or float64 for float64 parameters.
        anchor: Value of the parameter after the last sync, the same on all workers.
        has_anchor: Whether the anchor holds such a value yet.
        residual: Values that compression has left unsent, of the anchor's shape and type; None without compression.
        codec_state: State that a `LinearCodec` keeps of the parameter, the same on all workers; None without.

    Raises:
        ValueError: The parameter is complex or sparse.
    """

    def __init__(self, param: Tensor, name: str = "parameter", *, local: bool = False) -> None:
        if not local and (param.is_complex() or param.layout != torch.strided):
            raise ValueError(
                f"Parameters must be dense and real, and {name} is {param.dtype} with the layout {param.layout}. Train "
                "torch.view_as_real(...) of a complex parameter and make it complex where it is used, or keep it each "
                f"worker's own: sync_rules={{{name!r}: 'local'}}."
            )
        self.param, self.local = param, local
        self.dtype = state_dtype(param)
        self.anchor = torch.empty(0, dtype=self.dtype, device=param.device)
        self.has_anchor = False
        self.residual: Tensor | None = None
        self.codec_state: Tensor | None = None

    @property
    def trained(self) -> bool:
        """Whether the parameter is or was in training."""
        return self.has_anchor or self.param.requires_grad

    @property
    def frozen(self) -> bool:
        """Whether the parameter is not in training at present."""
        return not self.param.requires_grad

    def moved(self, share: float) -> bool:
        """Whether the parameter is further from its anchor than a share of the anchor's norm."""
        distance = (self.param.detach().to(self.dtype) - self.anchor).norm()
        return bool(distance > share * self.anchor.norm())

    def adopt(self, value: Tensor) -> None:
        """Make a copy of a value the anchor."""
        self.anchor.data = value.detach().to(self.dtype, copy=True)
        self.has_anchor = True


def training_checksum(parameters: Sequence[AnchoredParameter]) -> int:
    """The number of coordinates, to which frozen parameters add more: workers in agreement have the same."""
    return sum(p.param.numel() * (1 + p.frozen * (i + 1)) for i, p in enumerate(parameters))
