"""The contract of outer optimizers: a class that knows the documented attributes alone gets what it asks for."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from lightning_lopt import LocalSGD, Rounds, SyncOptions
from lightning_lopt.optim.outer import OuterContract, check_coordinatewise, read_contract
from tests.threads import run_threads

KEYS = ("round_idx", "local_steps", "local_lr", "local_momentum")


class Median(torch.optim.Optimizer):
    """The coordinatewise lower median of the workers' pseudo-gradients, which no other optimizer here computes."""

    needs_worker_grads = True
    num_workers = 3
    max_update_ratio = 2.0
    fingerprint = "median"

    def __init__(self, params) -> None:
        super().__init__(params, {})
        self.seen: list[tuple] = []

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            self.seen.append(tuple(group[key] for key in KEYS))
            for p in group["params"]:
                torch.testing.assert_close(p.worker_grads.mean(0), p.grad)
                p -= p.worker_grads.median(0).values


def _round(rank, make_comm):
    model = nn.ParameterList([torch.zeros(2)])
    optimizer = torch.optim.SGD(model, lr=0.5, momentum=0.5)
    rounds = Rounds(model, optimizer, 2, Median, comm=make_comm())
    for _ in range(2):
        with torch.no_grad():
            model[0].add_(torch.tensor([1.0, 2.0]) * rank)
        rounds.step()
    assert not rounds.last_report.fell_back
    return model[0].tolist(), rounds.sync.outer.seen


def test_a_sync_gives_and_tells_what_the_contract_says():
    # worker k has moved by 2k and 4k: the median is worker 1's
    assert run_threads(_round, 3) == [([2.0, 4.0], [(0, 2, 0.5, 0.5)])] * 3


def test_the_number_of_workers_is_checked():
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="belongs to 3 workers, but there are 1"):
        Rounds(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, Median)


class Jump(torch.optim.Optimizer):
    """A step that is a given multiple of the averaged one."""

    max_update_ratio = 2.0

    def __init__(self, params, ratio) -> None:
        super().__init__(params, {"ratio": ratio})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["ratio"] * p.grad


@pytest.mark.parametrize(("ratio", "moved"), [(1.9, -1.9), (2.1, -1.0)])
@pytest.mark.filterwarnings("ignore:Round 0. the outer step was refused")
def test_a_step_over_the_limit_becomes_an_average(ratio, moved):
    model = nn.ParameterList([torch.zeros(1)])
    rounds = Rounds(model, torch.optim.SGD(model, lr=1.0), 1, partial(Jump, ratio=ratio))
    with torch.no_grad():
        model[0].fill_(-1.0)
    rounds.step()
    assert model[0].item() == pytest.approx(moved)


def test_defaults_of_an_optimizer_that_has_no_attributes():
    contract = read_contract(torch.optim.SGD([torch.zeros(1)], lr=0.7))
    assert contract == OuterContract(False, None, False, None, contract.fingerprint)
    assert contract.fingerprint != read_contract(torch.optim.SGD([torch.zeros(1)], lr=0.6)).fingerprint


class Rows(torch.optim.SGD):
    """SGD that asks for whole tensors."""

    needs_whole_tensors = True


def test_whole_tensors_exclude_random_coordinates():
    check_coordinatewise(partial(torch.optim.SGD, lr=1.0))
    with pytest.raises(ValueError, match="Rows cannot step random coordinates"):
        LocalSGD(outer_optimizer=partial(Rows, lr=1.0), density=0.5)


class Norm(torch.optim.Optimizer):
    """A step of a given norm over all tensors, which a sharded model must sum."""

    def __init__(self, params) -> None:
        super().__init__(params, {})
        self.total = lambda sums: sums

    @torch.no_grad()
    def step(self, closure=None):
        pairs = [(p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        squares = torch.stack([g.square().sum() for _, g in pairs]).sum().reshape(1) if pairs else torch.zeros(1)
        norm = self.total(squares.double()).sqrt()
        for p, grad in pairs:
            p -= (grad / norm).to(p.dtype)


def _sharded(rank, make_comm, sharded):
    model = nn.ParameterList([torch.zeros(3), torch.zeros(2)])
    options = SyncOptions(sharded=sharded)
    rounds = Rounds(model, torch.optim.SGD(model, lr=1.0), 1, Norm, comm=make_comm(), options=options)
    with torch.no_grad():
        for p in model:
            p.add_(1.0 + rank)
    rounds.step()
    return torch.cat([p.detach() for p in model])


def test_a_sharded_sync_gives_sums_over_all_shards():
    plain, sharded = (run_threads(_sharded, 2, flag) for flag in (False, True))
    torch.testing.assert_close(sharded[0], plain[0])
    torch.testing.assert_close(plain[0].norm(), torch.tensor(1.0))
