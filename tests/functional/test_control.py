"""Inputs and outputs of the controller: zero changes nothing, scales do not count, every input says what it says."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_lopt.functional.blended import BlendedSettings
from lightning_lopt.functional.control import (
    BOUND,
    INPUTS,
    ControlledState,
    ControllerWeights,
    LocalPhase,
    controlled,
    observe,
)
from lightning_lopt.functional.model import ModelTensor
from lightning_lopt.functional.phase import LocalDecay

BASE = BlendedSettings(torch.tensor([1.1]), torch.tensor([0.85]), torch.tensor([[0.05, 0.45, 0.5]]))


def weights(weight=0.0, bias=(0.0, 0.0, 0.0, 0.0), end=100.0):
    full = torch.full((1, len(INPUTS)), end)
    return ControllerWeights(torch.full((1, 4, len(INPUTS)), weight), torch.tensor([bias]), -full, full)


def observed(grads, param, round_idx=0, gammas=(1.0, 1.0), local_steps=4, retained=0.0, scale=1.0):
    """Inputs of the last of several pseudo-gradients, whose momentum is a mean of half-life one."""
    like = grads[0]
    state = ControlledState.zeros(tuple(like.shape), 1, like.dtype, like.device)
    decays = [LocalDecay()]
    for gamma in gammas:
        decays.append(decays[-1].after(gamma))
    phase = LocalPhase.of(decays[-2:-1], decays[-1:], local_steps, like)
    for t, grad in enumerate(grads):
        index, kept = torch.tensor([round_idx + t]), torch.tensor([retained])
        tensor = ModelTensor(param.unsqueeze(0), scale * grad.unsqueeze(0), state, index, kept, kept)
        inputs = observe(tensor, phase)
        state.momentum.lerp_(scale * grad.reshape(1, 1, 1, *grad.shape), 0.5)
    return dict(zip(INPUTS, inputs[0].tolist(), strict=True))


def test_zeros_change_no_bit():
    for ours, theirs in zip(controlled(torch.randn(1, len(INPUTS)), weights(), BASE), BASE, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("index", range(4))
def test_each_output_turns_one_setting(index):
    bias = [0.0] * 4
    bias[index] = 0.3
    u = BOUND * math.tanh(0.3 / BOUND)
    lr, momentum, blend = controlled(torch.zeros(1, len(INPUTS)), weights(bias=tuple(bias)), BASE)
    rate = (lr / (1 - momentum) / (BASE.lr / (1 - BASE.momentum))).log().item()
    memory = ((1 - momentum) / (1 - BASE.momentum)).log().item()
    shares = (blend / BASE.blend).log()[0]
    found = [rate, memory, *(shares[1:] - shares[0]).tolist()]
    assert found == pytest.approx([u if i == index else 0.0 for i in range(4)], abs=1e-5)
    assert blend.sum().item() == pytest.approx(1)


def test_outputs_are_bounded_and_inputs_clamped():
    inputs = torch.full((1, len(INPUTS)), 50.0)
    lr, momentum, _ = controlled(inputs, weights(1.0), BASE)
    assert (lr / BASE.lr).log().item() == pytest.approx(2 * BOUND)
    assert ((1 - momentum) / (1 - BASE.momentum)).log().item() == pytest.approx(BOUND, abs=1e-5)
    ours, theirs = (controlled(x, weights(0.01, end=1.0), BASE) for x in (inputs, torch.ones_like(inputs)))
    assert torch.equal(ours.lr, theirs.lr)


def test_inputs_by_hand():
    first, second, param = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 6.0]]), torch.tensor([[0.0, 12.0]])
    found = observed([first, second], param, gammas=(0.1, 0.4, 0.2), local_steps=2, retained=0.5)
    half = math.log(0.5)
    expected = {
        "phase": half,
        "fall": half,
        "contraction": math.log(0.75),
        "local_steps": math.log(2),
        "retained": 0.5,
        "age": math.log(2),
        "cosine": 0.0,  # the momentum is (1.5, 0)
        "mean_cosine": 0.0,
        "growth": math.log(2),
        "level": math.log(2) / 2,  # above the mean of both
        "momentum_over_grad": math.log(1.5 / 6),
        "grad_over_param": half,
        "aspect": math.log(2),
        "is_vector": 0.0,
        "phase_local_steps": half * math.log(2),
        "phase_cosine": 0.0,
        "phase_retained": half / 2,
    }
    assert found == pytest.approx(expected, abs=1e-6)
    assert observed([first, first], param)["cosine"] == pytest.approx(1)
    assert observed([first[0]], param[0])["is_vector"] == 1


def test_scales_of_the_loss_do_not_count():
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(3, 4, generator=generator) for _ in range(4)]
    ours, theirs = (observed(grads, scale * torch.ones(3, 4), scale=scale) for scale in (1.0, 1e-3))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 2, 2)])
def test_zeros_are_no_trouble(shape):
    found = observed([torch.zeros(shape)] * 3, torch.zeros(shape)) if shape != (2, 3, 2, 2) else {"cosine": 0.0}
    assert all(map(math.isfinite, found.values()))
    assert found["cosine"] == 0
