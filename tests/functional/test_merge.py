"""The merge of the anchor and a worker's own parameters."""

from __future__ import annotations

import torch

from lightning_lopt.functional.merge import merge


def test_merge_with_nothing_in_flight_gives_the_anchor_itself():
    a, z = torch.randn(5), torch.randn(5)
    assert merge(a, None, z, "delay_corrected") is a
    assert merge(a, None, z, "overwrite") is a
    torch.testing.assert_close(merge(a, None, z, 0.25), 0.25 * z + 0.75 * a)


def test_merge_of_half_precision_is_computed_in_the_anchors_type():
    a, y, z = torch.tensor([1.0]), torch.tensor([256.0]).bfloat16(), torch.tensor([258.0]).bfloat16()
    assert merge(a, y, z, "delay_corrected").item() == 3.0
