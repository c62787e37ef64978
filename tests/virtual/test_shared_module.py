"""Workers that take turns in one module keep what is theirs."""

from __future__ import annotations

import torch
from torch import nn

from lightning_lopt.virtual.shared_module import SharedModule


def _module():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    return module, torch.optim.AdamW(module.parameters(), lr=0.1)


def _step(module, optimizer, batch):
    module(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_each_worker_trains_as_if_alone():
    batches = torch.randn(4, 2, 8, 3)
    module, optimizer = _module()
    shared_module = SharedModule(module, [optimizer], 2)
    for batch in batches:
        for rank in shared_module.turns():
            _step(module, optimizer, batch[rank])
        optimizer.param_groups[0]["lr"] *= 0.5  # a schedule
    for rank in range(2):
        alone, own = _module()
        for batch in batches:
            _step(alone, own, batch[rank])
            own.param_groups[0]["lr"] *= 0.5
        shared_module.activate(rank)
        assert all(
            torch.equal(a, b) for a, b in zip(module.state_dict().values(), alone.state_dict().values(), strict=True)
        )
        assert torch.equal(optimizer.state[module[0].weight]["exp_avg"], own.state[alone[0].weight]["exp_avg"])


def test_options_that_a_worker_changes_are_its_own():
    module, optimizer = _module()
    shared_module = SharedModule(module, [optimizer], 2)
    for rank in shared_module.turns():
        optimizer.param_groups[0]["scale"] = 10.0 + rank
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.3})
    group, new = optimizer.param_groups
    seen = [(rank, group["scale"], new["lr"]) for rank in shared_module.turns()]
    assert seen == [(1, 11.0, 0.3), (0, 10.0, 0.3)]


def test_gradients_take_turns_where_they_are_accumulated():
    module, optimizer = _module()
    shared_module = SharedModule(module, [optimizer], 2, gradients=True)
    for _ in range(2):
        for rank in shared_module.turns():
            module[2](torch.full((1, 3), 1.0 + rank)).sum().backward()
    assert shared_module.gradients(1)["2.weight"].tolist() == [[4.0, 4.0, 4.0]]
    assert module[2].weight.grad.tolist() == [[2.0, 2.0, 2.0]]
