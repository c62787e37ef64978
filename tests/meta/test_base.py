"""Tasks on data in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lopt.meta import ModuleTask


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"data": ()}, "of one length N >= 1"),
        ({"data": (torch.zeros(3, 2), torch.zeros(4))}, r"not of \[\(3, 2\), \(4,\)\]"),
        ({"data": (torch.zeros(0, 2),)}, "of one length N >= 1"),
        ({"batch_size": 9}, "number of examples 8"),
        ({"num_validation": 1}, "num_validation must be 0 or at least batch_size=2"),
    ],
)
def test_bad_data_is_named(keywords, message):
    good = {"data": (torch.zeros(8, 2), torch.zeros(8, 1)), "batch_size": 2}
    with pytest.raises(ValueError, match=message):
        ModuleTask(lambda: nn.Linear(2, 1), loss=F.mse_loss, **{**good, **keywords})
