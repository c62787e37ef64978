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


class _Living(nn.Module):
    """Buffers that are reassigned, filled or registered in a turn, and a teacher whose parameter is replaced."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1))
        self.teacher = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.register_buffer("center", torch.zeros(1))
        self.register_buffer("cache", None)

    def live(self, rank):
        self.center = self.center + 1 + rank
        self.cache = torch.full((2,), float(rank)) if self.cache is None else self.cache + 1
        self.teacher = nn.Parameter(self.teacher + 1 + rank, requires_grad=False)
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(1))
        self.late += 1 + rank


def test_tensors_that_a_worker_replaces_or_registers_are_its_own():
    module = _Living()
    shared_module = SharedModule(module, [torch.optim.SGD([module.x], lr=0.1)], 2)
    for _ in range(2):
        for rank in shared_module.turns():
            module.live(rank)
    shared_module.collect()
    for rank in range(2):
        named = {**shared_module.parameters(rank), **shared_module.buffers(rank)}
        expected = {
            "center": [2 + 2 * rank],
            "cache": [rank + 1] * 2,
            "teacher": [2 + 2 * rank],
            "late": [2 + 2 * rank],
        }
        assert {name: named[name].tolist() for name in expected} == expected


def test_spreading_gives_all_the_tensors_of_the_first():
    module = _Living()
    shared_module = SharedModule(module, [torch.optim.SGD([module.x], lr=0.1)], 2)
    for rank in shared_module.turns():
        module.x.data.fill_(rank + 1)
        module.center = module.center + rank
    module.load_state_dict({"x": torch.full((1,), 5.0), "teacher": torch.full((1,), 6.0), "center": torch.ones(1)})
    module.register_buffer("table", torch.full((1,), 7.0))
    shared_module.collect()
    shared_module.spread(kept=["x"])
    named = {**shared_module.parameters(1), **shared_module.buffers(1)}
    assert {name: tensor.item() for name, tensor in named.items()} == {"x": 2, "teacher": 6, "center": 1, "table": 7}
    module.table += 1
    assert named["table"].item() == 7
