"""Settings that a script has changed since a checkpoint was written."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from lightning_lopt import QSR, AdaMLP, Fragments, LearnedOptimizer, Rounds, SyncOptions, TopK
from lightning_lopt.sync.settings import describe

SGD = partial(torch.optim.SGD, momentum=0.9)


class Decaying(torch.optim.SGD):
    """Its rate halves with every step."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["lr"] /= 2


def _rounds(local_steps=4, outer=None, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, Rounds(model, optimizer, local_steps, outer, options=SyncOptions(**options))


def _run(steps, parts, state=None):
    """Train until a step, from a state if there is one; the state then, and what was said about settings."""
    model, optimizer, rounds = parts
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if state is not None:
            state = copy.deepcopy(state)
            rounds.load_state_dict(state["rounds"])
            rounds.load_local_state(state["local"])
            optimizer.load_state_dict(state["optimizer"])
    x = torch.randn(20, 8, 4, generator=torch.Generator().manual_seed(1))
    while rounds.step_idx < steps:
        model(x[rounds.step_idx]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        rounds.step()
    state = {"rounds": rounds.state_dict(), "local": rounds.local_state(), "optimizer": optimizer.state_dict()}
    return copy.deepcopy(state), [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"outer": partial(SGD, lr=0.7)}, {"outer": partial(SGD, lr=0.5)}, ["outer lr 0.7 -> 0.5"]),
        (
            {"outer": partial(LearnedOptimizer, network=AdaMLP(seed=0))},
            {"outer": partial(LearnedOptimizer, network=AdaMLP(seed=1))},
            ["outer network (its digest) "],
        ),
        ({"local_steps": 4}, {"local_steps": QSR(0.2, 2)}, ["local_steps 4 -> QSR(alpha=0.2, base_steps=2"]),
        ({"compression": "int8"}, {"compression": None}, ["compression 'int8' -> None"]),
        ({"overlap_steps": 2}, {"overlap_steps": 0, "compression": TopK(0.5)}, ["overlap_steps 2 -> 0", "-> TopK("]),
        ({"overlap_steps": 2, "density": 0.5}, {"overlap_steps": 2}, ["density 0.5 -> 1.0"]),
        (
            {"overlap_steps": 1, "outer": partial(SGD, lr=0.7)},
            {"overlap_steps": 1, "outer": partial(SGD, lr=0.7), "selection": Fragments(2)},
            ["selection None -> Fragments(num_fragments=2)"],
        ),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, dict) else "",
)
@pytest.mark.parametrize("stop", [3, 6, 7, 8])
def test_what_the_script_changes_takes_effect_and_is_said(before, after, said, stop):
    """At any step of a round, in flight too; what was not changed says nothing and goes on bitwise."""
    state, _ = _run(stop, _rounds(**before))
    parts = _rounds(**after)
    _, (text,) = _run(16, parts, state)
    assert all(phrase in text for phrase in said)
    assert all(p.residual is None for p in parts[2].sync.replica.parameters()) or "compression" in after
    if "lr" in said[0]:
        assert [group["lr"] for group in parts[2].sync.outer.param_groups] == [0.5]
    unchanged = _rounds(**before)
    _, nothing = _run(16, unchanged, state)
    whole = _rounds(**before)
    _run(16, whole)
    assert nothing == []
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), unchanged[0].parameters(), strict=True))


def test_what_an_optimizer_has_changed_itself_stays_until_the_script_changes_it():
    state, _ = _run(8, _rounds(outer=partial(Decaying, lr=1.0)))
    for lr, expected in ((1.0, 0.25), (0.8, 0.8)):
        parts = _rounds(outer=partial(Decaying, lr=lr))
        _run(8, parts, state)
        assert parts[2].sync.outer.param_groups[0]["lr"] == expected


def test_a_state_without_the_script_s_settings_is_taken_as_it_is():
    state, _ = _run(4, _rounds(outer=partial(SGD, lr=0.7)))
    del state["rounds"]["given"], state["rounds"]["sync"]["outer"]["given"]
    parts = _rounds(outer=partial(SGD, lr=0.5))
    assert _run(4, parts, state)[1] == []
    assert parts[2].sync.outer.param_groups[0]["lr"] == 0.7


def test_texts_differ_where_settings_do_and_not_by_addresses():
    assert describe({"a": lambda: 1}) == describe({"a": lambda: 2})
    assert describe({"a": torch.tensor(0.5)}) == {"a": "0.5"}
    assert describe({"a": QSR(0.2, 2)}) != describe({"a": QSR(0.2, 3)})
