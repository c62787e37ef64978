"""The precision in which values are averaged and states are kept."""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(tensor: Tensor) -> torch.dtype:
    """Type of the means and states that belong to a tensor: float64 for float64, float32 for every other.

    Args:
        tensor: A parameter, a buffer, or a state of an optimizer.

    Example:
        >>> state_dtype(torch.zeros(1, dtype=torch.bfloat16))
        torch.float32
    """
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
