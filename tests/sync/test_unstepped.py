"""Buffers: the mean of floating-point ones, the maximum of others, and what changes while a sync is in flight."""

from __future__ import annotations

import torch

from lightning_lopt import Rounds, SyncOptions
from tests.sync_support import Point
from tests.threads import run_threads


class _Buffers(Point):
    def __init__(self) -> None:
        super().__init__(torch.zeros(1))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def values(self):
        return [b.tolist() for b in (self.mean, self.count, self.seen)]


def _in_flight(rank, make_comm):
    """Both workers change all buffers before the launch and, in other places, before the finish."""
    model = _Buffers()
    options = SyncOptions(overlap_steps=1)
    rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=1.0), 2, comm=make_comm(), options=options)
    model.mean[0], model.count[0], model.seen[0] = 2.0 * rank, 2 * rank, bool(rank)
    rounds.step()
    model.mean += torch.tensor([0.0, 1.0 + rank])
    model.count += torch.tensor([1, 1 + rank])
    model.seen[1] = bool(rank)
    rounds.step()
    assert model.mask.tolist() == [0.0, -torch.inf]
    landed = model.values()
    rounds.abandon_round()
    return landed, model.values()


def test_what_changes_in_flight_is_added_to_what_arrives():
    first, second = run_threads(_in_flight, 2)
    assert first[0] == [[1.0, 1.0], [3, 1], [True, False]]
    assert second[0] == [[1.0, 2.0], [3, 2], [True, True]]
    assert first[1] == second[1] == [[1.0, 0.0], [2, 0], [True, False]]
