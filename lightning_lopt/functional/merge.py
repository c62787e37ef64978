"""The merge of the anchor that a sync gave with a worker's own parameters."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MergeRule = Literal["delay_corrected", "overwrite"] | float


def merge(anchor: Tensor, launched: Tensor | None, present: Tensor, rule: MergeRule) -> Tensor:
    r"""Compute a worker's new parameters, from the anchor a that a sync gave, its own y at launch and z at the finish.

    .. math:: x = a + (z - y) \quad|\quad x = a \quad|\quad x = \alpha z + (1 - \alpha) a

    The delay-corrected merge keeps the workers' progress while the sync was in flight, and with it their mean:
    with plain averaging mean x = mean z.

    Args:
        anchor: Anchor a after the sync, [*S].
        launched: Parameters y at the launch, [*S]; None if nothing was in flight, so that y = z.
        present: Parameters z at the finish, [*S].
        rule: Name `"delay_corrected"` or `"overwrite"`, or α in [0, 1], the weight of z.

    Source: arXiv 2605.20866 (delay-corrected), 2501.18512 (blend).

    Example:
        >>> a, y, z = torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([3.5])
        >>> [merge(a, y, z, rule).item() for rule in ("delay_corrected", "overwrite", 0.5)]
        [1.5, 1.0, 2.25]
    """
    if rule == "overwrite":
        return anchor
    if rule == "delay_corrected":
        return anchor if launched is None else anchor + (present.to(anchor.dtype) - launched)
    return torch.lerp(anchor, present.to(anchor.dtype), rule)
