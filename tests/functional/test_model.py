"""Tensors of one shape step together as they would one by one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from lightning_lopt import AdaMLP, BlendedNesterov, LearnedOptimizer
from lightning_lopt.functional import learned, model
from lightning_lopt.functional.model import ModelTensor
from lightning_lopt.functional.updates import UPDATES

SHAPES = [(5, 7), (4,), (5, 7), (), (4,), (3, 2, 2, 2), (5, 7), (), (4,), (0, 3), (3, 2, 2, 2), (2, 9)]
OPTIMIZERS = {
    "default": LearnedOptimizer,
    "paper": lambda params: LearnedOptimizer(params, AdaMLP(seed=0, step_mult=0.1)),
    "workers": lambda params: LearnedOptimizer(params, AdaMLP(3, seed=0, step_mult=0.1)),
    "blended": BlendedNesterov,
}


def trained(make, dtype, num_steps=4):
    """Parameters and states after some steps, of which some tensors miss one."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    groups = [{"params": params[:5], "local_lr": 0.1, "local_momentum": 0.9}, {"params": params[5:]}]
    outer = make(groups)
    for t in range(num_steps):
        for i, p in enumerate(params):
            workers = torch.randn(3, *p.shape, generator=generator).to(dtype)
            p.grad, p.worker_grads = (None if (t, i) == (1, 2) else workers.mean(0)), workers
        outer.step()
    return params, [outer.state[p] for p in params]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("size", [12, 80, 1 << 18])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_parameters_of_one_shape(monkeypatch, make, size, dtype, tolerance):
    monkeypatch.setitem(model.GROUP, "cpu", 1)
    one_by_one, states = trained(make, dtype)
    monkeypatch.setitem(model.GROUP, "cpu", size)
    together, joined = trained(make, dtype)
    torch.testing.assert_close(together, one_by_one, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close([dict(s) for s in joined], [dict(s) for s in states], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("update", UPDATES)
def test_particles_with_networks_of_their_own(update):
    """Each tensor in the same order of particles; networks that differ from tensor to tensor are not mixed."""
    generator, dtype, count = torch.Generator().manual_seed(0), torch.float64, 3

    def networks():
        own = AdaMLP(seed=0, update=update, step_mult=0.1, exp_mult=0.1).double()
        noise = {name: 0.1 * torch.randn(count, *p.shape, dtype=dtype) for name, p in own.named_parameters()}
        return own.functional({name: p.detach() + noise[name] for name, p in own.named_parameters()})

    first, second = networks(), networks()
    used = [first, second, first, first, second]
    shapes = [(4, 3), (4, 3), (4, 3), (6,), (4, 3)]
    values = [torch.randn(2, count, *shape, generator=generator, dtype=dtype) for shape in shapes]
    scale, retained = torch.tensor([0.1, 0.2, 0.0]), torch.tensor([0.0, 0.3, 0.6])

    def tensors():
        states = [UPDATES[update].init_state(shape, count, dtype, scale.device) for shape in shapes]
        rounds = torch.tensor([0, 3, 9])
        return [
            ModelTensor(param.clone(), grad, state, rounds, scale, retained)
            for (param, grad), state in zip(values, states, strict=True)
        ]

    together, one_by_one = tensors(), tensors()
    learned.step_model(together, used, UPDATES[update])
    for tensor, network in zip(one_by_one, used, strict=True):
        learned.step_model([tensor], [network], UPDATES[update])
    for ours, theirs, (before, _) in zip(together, one_by_one, values, strict=True):
        assert not torch.equal(ours.param, before)
        torch.testing.assert_close(ours.param, theirs.param, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.state.momentum, theirs.state.momentum, rtol=1e-12, atol=1e-12)


def test_groups_are_bounded(monkeypatch):
    monkeypatch.setitem(model.GROUP, "cpu", 24)
    shape = (2, 5)
    like = [torch.zeros(1, *shape) for _ in range(5)]
    tensors = [ModelTensor(p, p, None, p, p, p) for p in like]
    assert model.groups_of_one_shape(tensors, [0] * 5) == [[0, 1], [2, 3], [4]]
