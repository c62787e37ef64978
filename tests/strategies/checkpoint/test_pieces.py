"""Parts of ranks that share a model; their other contents are tested with a Trainer, in strategies/test_islands.py."""

from __future__ import annotations

import torch

from lightning_lopt.islands import Box, Layout
from lightning_lopt.strategies.checkpoint.pieces import cut_part, whole_part

SIZES = {name: torch.Size(shape) for name, shape in {"a": (4, 3), "b": (2,), "c": (3, 5)}.items()}


def _part(names, layout):
    """A part of a rank that holds these tensors whole."""
    tensors = [torch.full(SIZES[name], float(ord(name))) for name in names]
    states = [None if name == "b" else torch.full((SIZES[name][1], 1), float(ord(name))) for name in names]
    own = {"params": tensors, "residuals": [None] * len(names), "unstepped": {"tensors": {}}, "exchange": None}
    common = {"anchors": tensors, "codec_states": states, "unstepped": {}, "outer": None, "exchange": None}
    return {
        "layout": layout,
        "local": {"sync": own},
        "rounds": {"sync": common},
        "checkpoint": {"optimizer_states": []},
    }


def _layout(names):
    boxes = {name: Box(SIZES[name], (0,) * len(SIZES[name])) for name in names}
    return Layout([list("abc")], SIZES, boxes, boxes)


def test_states_of_a_codec_follow_their_tensors():
    held = ["ac", "b"], ["b", "ca"]
    before, after = ([_layout(names) for names in ranks] for ranks in held)
    whole = whole_part([_part(layout.held, layout.state_dict()) for layout in before])
    torch.testing.assert_close(whole["rounds"], _part("abc", None)["rounds"])
    for layout in after:
        torch.testing.assert_close(cut_part(whole, layout)["rounds"], _part(layout.held, None)["rounds"])
    del whole["rounds"]["sync"]["codec_states"]  # of a run without
    assert cut_part(whole, after[1])["rounds"]["sync"]["codec_states"] == [None, None]
