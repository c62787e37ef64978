"""One worker's copy of the model: everything of it that a sync reads or writes."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any, Protocol

from torch import Tensor


class NamedTensors(Protocol):
    """The part of a `torch.nn.Module` that a `Replica` needs."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...
    def named_buffers(self) -> Iterable[tuple[str, Tensor]]: ...


class LocalOptimizer(Protocol):
    """The part of a `torch.optim.Optimizer` that a `Replica` needs."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    @property
    def state(self) -> MutableMapping[Any, Any]: ...
