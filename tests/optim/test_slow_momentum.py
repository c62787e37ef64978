"""The slow momentum step: golden numbers of torchdistx and exo gym, wrong input."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_lopt import Rounds, SlowMomentum

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SLOWMO = ["slowmo_b05_a1", "slowmo_b08_a07", "slowmo_decaying_lr", "slowmo_identity"]
NESTEROV = ["diloco", "diloco_lr1_mu0", "outer_heavyball"]


def _anchors(data, dtype):
    return {n: torch.nn.Parameter(torch.from_numpy(data[f"params0/{n}"]).to(dtype)) for n in ("w", "b")}


def _compare(anchors, data, case, t, dtype):
    for name, p in anchors.items():
        wanted = torch.from_numpy(data[f"{case}/params/{name}"][t]).double()
        torch.testing.assert_close(p.data.double(), wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", SLOWMO)
def test_slow_momentum_equals_torchdistx(vectors, case, dtype):
    data = vectors("slowmo_diloco.npz")
    anchors = _anchors(data, dtype)
    outer = SlowMomentum(anchors.values(), lr=float(data[f"{case}/alpha"]), momentum=float(data[f"{case}/beta"]))
    for t, gamma in enumerate(data[f"{case}/gamma"]):
        for name, p in anchors.items():
            p.grad = torch.from_numpy(data[f"pseudo_grad/{name}"][t]).to(dtype)
        outer.param_groups[0]["local_lr"] = float(gamma)
        outer.step()
        _compare(anchors, data, case, t, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", NESTEROV)
def test_torch_sgd_is_diloco(vectors, case, dtype):
    data = vectors("slowmo_diloco.npz")
    anchors = _anchors(data, dtype)
    options = {"lr": float(data[f"{case}/lr"]), "momentum": float(data[f"{case}/momentum"])}
    outer = torch.optim.SGD(anchors.values(), nesterov=bool(data[f"{case}/nesterov"]), **options)
    for t in range(10):
        for name, p in anchors.items():
            p.grad = torch.from_numpy(data[f"pseudo_grad/{name}"][t]).to(dtype)
        outer.step()
        _compare(anchors, data, case, t, dtype)


def test_slow_momentum_with_local_lr_zero_changes_nothing():
    p = torch.nn.Parameter(torch.ones(2))
    outer = SlowMomentum([p])
    p.grad = torch.ones(2)
    outer.step()
    before, buffer = p.detach().clone(), outer.state[p]["momentum_buffer"].clone()
    outer.param_groups[0]["local_lr"] = 0.0
    outer.step()
    assert torch.equal(p, before)
    assert torch.equal(outer.state[p]["momentum_buffer"], buffer)


class SignStep(torch.optim.Optimizer):
    """A local optimizer without a learning rate."""

    def __init__(self, params) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p -= 0.1 * p.grad.sign()


def test_a_local_optimizer_without_lr_is_refused_before_anything_changes():
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = SignStep(model.parameters())
    rounds = Rounds(model, optimizer, 1, SlowMomentum)
    model.weight.grad = torch.ones(1, 1)
    optimizer.step()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="SlowMomentum needs the local learning rate"):
        rounds.step()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("local_lr", [math.nan, math.inf, -0.1])
def test_no_group_steps_if_one_has_no_local_lr(local_lr):
    first, second = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    outer = SlowMomentum([{"params": [first]}, {"params": [second], "local_lr": local_lr}])
    first.grad = torch.ones(1)
    outer.step()  # nothing arrived for the second
    assert first.item() == 0
    second.grad = torch.ones(1)
    with pytest.raises(ValueError, match="needs the local learning rate"):
        outer.step()
    assert (first.item(), second.item()) == (0, 1)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"lr": 0.0}, "lr > 0"), ({"lr": math.inf}, "finite lr"), ({"momentum": 1.0}, r"momentum in \[0, 1\)")],
)
def test_wrong_slow_momentum(options, match):
    with pytest.raises(ValueError, match=match):
        SlowMomentum([torch.zeros(1)], **options)
