"""Local training: batched optimizers against torch.optim, what is drawn for an unroll, errors."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_lopt.meta.local import LocalOptimizer, LocalTraining
from lightning_lopt.meta.tasks import ImageMLP


def make(dtype=torch.float64) -> ImageMLP:
    images = torch.rand(40, 6, generator=torch.Generator().manual_seed(3), dtype=dtype)
    return ImageMLP(images, torch.arange(40) % 4, hidden=(7,), batch_size=8)


class MuonAndAdamW:
    """torch's Muon for matrices and AdamW for vectors, at one learning rate."""

    def __init__(self, params, lr: float, weight_decay: float) -> None:
        muon, adamw = ([p for p in params if (p.dim() > 1) == matrix] for matrix in (True, False))
        options = {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw", "weight_decay": weight_decay}
        self.optimizers = (
            torch.optim.Muon(muon, lr, **options),
            torch.optim.AdamW(adamw, lr, weight_decay=weight_decay),
        )
        self.param_groups = [{"lr": lr}]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def torch_optimizer(optimizer: LocalOptimizer, params, lr: float) -> torch.optim.Optimizer | MuonAndAdamW:
    if optimizer.kind == "adamw":
        return torch.optim.AdamW(params, lr, weight_decay=optimizer.weight_decay)
    if optimizer.kind == "muon":
        return MuonAndAdamW(params, lr, optimizer.weight_decay)
    momentum = 0.9 if optimizer.kind == "momentum" else 0.0
    return torch.optim.SGD(params, lr, momentum=momentum, weight_decay=optimizer.weight_decay)


NEEDS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9 has no Muon")


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw", pytest.param("muon", marks=NEEDS_MUON)])
@pytest.mark.parametrize(("weight_decay", "max_grad_norm"), [(0.0, None), (0.1, None), (0.1, 0.05)])
def test_equals_torch_with_a_rate_per_replica_that_changes(kind, weight_decay, max_grad_norm, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # so that torch's Muon is as exact as ours
    task, generator = make(), torch.Generator().manual_seed(0)
    optimizer = LocalOptimizer(kind, weight_decay, max_grad_norm)
    params = task.init(2, generator)
    state = optimizer.init(params)
    twins = [[p[r].clone().requires_grad_() for p in params.values()] for r in range(2)]
    theirs = [torch_optimizer(optimizer, twin, 1.0) for twin in twins]
    for step in range(5):
        rates = torch.tensor([0.3, 0.01], dtype=torch.float64) / (step + 1)
        batch = task.batch(2, generator)
        loss = optimizer.step(task, params, batch, rates, state)
        for r, (twin, their) in enumerate(zip(twins, theirs, strict=True)):
            named = {name: p.unsqueeze(0) for name, p in zip(params, twin, strict=True)}
            wanted = task.loss(named, tuple(part[r : r + 1] for part in batch))
            wanted.sum().backward()
            if max_grad_norm:
                norm = torch.nn.utils.clip_grad_norm_(twin, max_grad_norm)
                assert norm > max_grad_norm  # or the test would not see the clipping
            their.param_groups[0]["lr"] = rates[r].item()
            their.step()
            their.zero_grad()
            torch.testing.assert_close(loss[r], wanted[0].detach(), rtol=0, atol=1e-13)
    for i, p in enumerate(params.values()):
        for r in range(2):
            torch.testing.assert_close(p[r], twins[r][i].detach(), rtol=0, atol=1e-13)
    assert state.steps.tolist() == [5, 5]


def test_a_state_that_is_zeroed_starts_anew():
    task, generator = make(), torch.Generator().manual_seed(0)
    optimizer, params, rates = LocalOptimizer("adamw"), task.init(2, generator), torch.full((2,), 0.1).double()
    state, batches = optimizer.init(params), [task.batch(2, generator) for _ in range(3)]
    for batch in batches:
        optimizer.step(task, params, batch, rates, state)
    fresh, start = optimizer.init(params), {name: p.clone() for name, p in params.items()}
    for tensor in (state.steps, *state.first.values(), *state.second.values()):
        tensor[1] = 0
    optimizer.step(task, params, batches[0], rates, state)
    optimizer.step(task, start, batches[0], rates, fresh)
    for name, p in params.items():
        assert torch.equal(p[1], start[name][1])
        assert not torch.equal(p[0], start[name][0])


def test_draws_are_log_uniform_and_a_share_decays():
    training = LocalTraining(local_lr=(0.01, 1.0), decay_share=0.25)
    generator = torch.Generator().manual_seed(0)
    draws = [training.draw_lr(generator) for _ in range(2_000)]
    rates, decays = (torch.tensor(values, dtype=torch.float64) for values in zip(*draws, strict=True))
    assert rates.min() >= 0.01
    assert rates.max() <= 1
    assert abs((rates < 0.1).double().mean() - 0.5) < 0.05
    assert abs(decays.mean() - 0.25) < 0.04
    assert LocalTraining(local_lr=0.3).draw_lr(generator) == (pytest.approx(0.3), False)


def test_initial_matrices_are_scaled_together():
    task = make()
    for seed in range(5):
        plain = LocalTraining(initial_scale=1.0).init(task, torch.Generator().manual_seed(seed))
        scaled = LocalTraining(initial_scale=(0.5, 2.0)).init(task, torch.Generator().manual_seed(seed))
        factors = {(scaled[f"layers.{i}.weight"] / plain[f"layers.{i}.weight"]).mean().item() for i in range(2)}
        assert max(factors) == pytest.approx(min(factors))
        assert 0.5 <= max(factors) <= 2
        assert math.log(max(factors)) != pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_workers": 0}, "num_workers must be at least 1"),
        ({"local_steps": 0}, "local_steps must be at least 1"),
        ({"local_steps": []}, "local_steps must be at least 1"),
        ({"local_lr": 0.0}, "local_lr must be positive"),
        ({"local_lr": (1.0, 0.1)}, "local_lr must be positive"),
        ({"initial_scale": (0.0, 1.0)}, "initial_scale must be positive"),
        ({"decay_share": 1.5}, r"decay_share must lie in \[0, 1\]"),
    ],
)
def test_bad_local_training_is_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        LocalTraining(**keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"kind": "adam"}, "must be one of"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
    ],
)
def test_bad_optimizers_are_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        LocalOptimizer(**keywords)


@pytest.mark.parametrize(("share", "constant"), [(0.0, 20), (0.5, 10), (1.0, 0)])
def test_schedules_of_whole_unrolls(share, constant):
    training = LocalTraining(local_lr=(0.1, 1.0), decay_share=share)
    rates = training.draw_schedules(20, 50, torch.Generator().manual_seed(0))
    assert rates.shape == (20, 50)
    stays = (rates == rates[:, :1]).all(1)
    assert int(stays.sum()) == constant
    assert (rates.amax(1) >= 0.1).all()
    assert (rates.amax(1) <= 1.0).all()
    decays = rates[~stays] / rates[~stays].amax(1, keepdim=True)
    if len(decays):
        assert (decays[:, -1] < 0.1).all()
        warm = decays[:, 0] < 0.5
        assert int(warm.sum()) == len(decays) // 5
        assert (decays[~warm].diff(dim=1) <= 0).all()
        half = decays[:, 25].sort().values
        torch.testing.assert_close(half[-1], torch.tensor(1.0))  # stable, then linear
