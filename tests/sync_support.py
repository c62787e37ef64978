"""A model of one tensor, a selection that is given, a schedule that listens, and local steps, for tests of a sync."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn


class Point(nn.Module):
    """One parameter `x`."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.clone())


@dataclass(frozen=True)
class Given:
    """Coordinates of one tensor by masks [R, d], which are no part of what workers compare."""

    masks: list = field(repr=False)
    num_turns = 1
    whole_tensors = False
    partial = True

    def pick(self, sizes, round_idx):
        return [torch.tensor(self.masks[round_idx]).nonzero().squeeze(1)]


class WhileDriftIsSmall:
    """H doubles while the drift is at most `limit`, and halves above it; as a user would write it."""

    def __init__(self, limit: float, local_steps: int) -> None:
        self.limit, self.local_steps = limit, local_steps
        self.seen: list = []  # which no checkpoint holds

    def __call__(self, info):
        self.seen.append(info)
        if info.drift is not None and info.drift > self.limit:
            self.local_steps = max(1, self.local_steps // 2)
        elif info.drift is not None:
            self.local_steps *= 2
        return self.local_steps

    def state_dict(self):
        return {"local_steps": self.local_steps}

    def load_state_dict(self, state):
        self.local_steps = state["local_steps"]


def flat(model: nn.Module) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def move(rounds, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int) -> torch.Tensor:
    """Local steps on a problem of the worker's own; the parameters after each."""
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p - rank - i).square().sum() for i, p in enumerate(model.parameters())).backward()
        optimizer.step()
        rounds.step()
        seen.append(flat(model))
    return torch.stack(seen)
