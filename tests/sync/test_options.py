"""Which answers exclude each other."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt import Fragments, LearnedOptimizer, RandomCoordinates, Rounds, SyncOptions, TopK


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 0.5, "selection": Fragments(2)}, "one of the two"),
        ({"selection": 4}, "selection must be"),
        ({"selection": Fragments}, "selection must be"),
        ({"compression": "int4"}, "compression must be"),
        ({"compression": 8}, "compression must be"),
        ({"compression": TopK}, "compression must be"),
        ({"overlap_steps": -1}, "overlap_steps"),
        ({"overlap_steps": True}, "overlap_steps"),
        ({"merge": "average"}, "merge must be"),
        ({"merge": 1.5}, "merge must be"),
        ({"merge": "overwrite"}, "without overlap_steps there are none"),
        ({"local_state": "drop"}, "local_state must be"),
        ({"local_state": "reset", "density": 0.5}, "needs whole tensors"),
        ({"local_state": "average", "overlap_steps": 1}, "excludes overlap_steps"),
    ],
)
def test_wrong_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        SyncOptions(**options)


@pytest.mark.parametrize(
    ("local_steps", "outer", "options", "match"),
    [
        (4, None, SyncOptions(overlap_steps=4), "no room for overlap_steps=4"),
        (8, None, SyncOptions(overlap_steps=4, selection=Fragments(2)), "2 fragments take turns"),
        (1, None, SyncOptions(selection=Fragments(2)), "no room"),
        (4, LearnedOptimizer, SyncOptions(density=0.5), "cannot step random coordinates"),
        (lambda info: 1, None, SyncOptions(selection=Fragments(2)), "must be at least as many"),
    ],
)
def test_wrong_combinations(local_steps, outer, options, match):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=match):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), local_steps, outer, options=options).step()


def test_fingerprints_tell_settings_apart():
    settings = [
        SyncOptions(),
        SyncOptions(density=0.5),
        SyncOptions(selection=RandomCoordinates(0.5, 1)),
        SyncOptions(merge=0.5),
    ]
    assert len({options.fingerprint for options in settings}) == len(settings)
    assert SyncOptions(density=0.5).fingerprint == SyncOptions(density=0.5).fingerprint
