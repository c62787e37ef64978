"""ControlledNesterov: BlendedNesterov without control, the simulated step with it, the same steps after a resume."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from lightning_lopt import BlendedNesterov, ControlledNesterov, Controller, WeightsError
from lightning_lopt.functional.blended import BlendedSettings, retained_momentum
from lightning_lopt.meta.outer import ControlledStep, SimulatedRound
from tests.optim.test_blended_nesterov import SHAPES, trajectory

GAMMAS = [0.1, 0.4, 0.4, 0.3, 0.1, 0.01, 0.2]


def random_controller(dtype=torch.float32):
    controller, generator = Controller(), torch.Generator().manual_seed(0)
    nn.init.normal_(controller.weight, std=0.1, generator=generator)
    nn.init.normal_(controller.bias, std=0.1, generator=generator)
    return controller.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_without_control_it_takes_the_steps_of_the_blended_one(dtype):
    settings = {"lr": 0.7, "momentum": 0.9, "blend": (0.2, 0.3, 0.5)}
    controlled = partial(ControlledNesterov, controller=Controller(), **settings)
    pairs = zip(trajectory(controlled, dtype), trajectory(partial(BlendedNesterov, **settings), dtype), strict=True)
    for ours, theirs in pairs:
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_it_takes_the_simulated_steps():
    """Two runs whose local rates differ, side by side in the simulation, each with an optimizer of its own."""
    controller, generator = random_controller(torch.float64), torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    anchor = {str(i): draw(2, *shape) for i, shape in enumerate([(4, 3), (5,), (2, 3, 3)])}
    params = [[nn.Parameter(a[run].clone()) for a in anchor.values()] for run in range(2)]
    outers = [ControlledNesterov(own, controller) for own in params]
    numbers = torch.tensor([[1.1, 0.85]] * 2, dtype=torch.float64).unbind(1)
    base = BlendedSettings(*numbers, torch.tensor([[0.05, 0.45, 0.5]] * 2, dtype=torch.float64))
    step = ControlledStep(anchor, base, controller.weights())
    for t, gamma in enumerate(GAMMAS):
        workers = {name: a.unsqueeze(1) - draw(2, 4, *a.shape[1:]) for name, a in anchor.items()}
        rates = torch.tensor([gamma, 0.2], dtype=torch.float64)
        for run, (outer, own) in enumerate(zip(outers, params, strict=True)):
            outer.param_groups[0].update(local_lr=rates[run].item(), local_steps=4, local_momentum=0.9)
            for p, (name, a) in zip(own, anchor.items(), strict=True):
                p.grad = a[run] - workers[name][run].mean(0)
            outer.step()
        step(anchor, SimulatedRound(workers, torch.tensor([t, t]), rates, 4, retained_momentum(0.9, 4), ()))
    for run, own in enumerate(params):
        for p, a in zip(own, anchor.values(), strict=True):
            torch.testing.assert_close(p.detach(), a[run], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_bitwise_the_same(dtype):
    generator, outers = torch.Generator().manual_seed(0), []
    for _ in range(2):
        groups = [{"params": [nn.Parameter(torch.ones(shape, dtype=dtype))]} for shape in SHAPES]
        outers.append(ControlledNesterov(groups, random_controller()))
    for t, gamma in enumerate(GAMMAS):
        if t == 3:
            outers[1].load_state_dict(copy.deepcopy(outers[0].state_dict()))
        for ours, theirs in zip(*(outer.param_groups for outer in outers), strict=True):
            (p,), (q,) = ours["params"], theirs["params"]
            if t == 3:
                q.data.copy_(p.data)
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = p.grad.clone()
        for outer in outers[: 1 if t < 3 else 2]:
            for group in outer.param_groups:
                group.update(local_lr=gamma, local_steps=4)
            outer.step()
    for ours, theirs in zip(*(outer.param_groups for outer in outers), strict=True):
        assert torch.equal(ours["params"][0], theirs["params"][0])


def test_controllers_have_files_and_fingerprints(tmp_path):
    controller, path = random_controller(), tmp_path / "mine.safetensors"
    controller.save(path)
    params = [torch.zeros(2)]
    ours, theirs = (ControlledNesterov(params, each).fingerprint for each in (controller, path))
    assert ours == theirs != ControlledNesterov(params, Controller()).fingerprint
    with pytest.raises(FileExistsError):
        controller.save(path)
    with pytest.raises(WeightsError, match="is not a file that fits here"):
        Controller.load(Controller.bundled_path().parent.parent / "default.safetensors")
    assert {"command", "commit", "seed"} <= set(Controller.bundled().card)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"lr": 0.0}, "lr > 0"), ({"momentum": 1.0}, r"momentum in \[0, 1\)"), ({"blend": (0.5, 0.5)}, "three weights")],
)
def test_wrong_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        ControlledNesterov([torch.zeros(1)], Controller(), **options)
