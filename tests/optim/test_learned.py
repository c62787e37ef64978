"""The learned optimizer as a torch optimizer: state dicts, copies, wrong input."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lightning_lopt import AdaMLP, LearnedOptimizer, SlowMomentum


def _parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5,), (), (2, 3, 3, 3), (0, 4)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def _steps(outer, params, start, stop):
    for t in range(start, stop):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        outer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_state_dict_round_trip_is_bitwise(dtype, tmp_path):
    network = AdaMLP(seed=1)
    whole = _parameters(dtype)
    _steps(LearnedOptimizer(whole, network), whole, 0, 6)

    first = _parameters(dtype)
    outer = LearnedOptimizer(first, network)
    _steps(outer, first, 0, 3)
    torch.save([outer.state_dict(), first], tmp_path / "state.pt")
    state, second = torch.load(tmp_path / "state.pt", weights_only=False)
    resumed = LearnedOptimizer(second, network)
    resumed.load_state_dict(state)
    _steps(resumed, second, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert {s["second"].dtype for s in resumed.state.values() if s} == {kept}


@pytest.mark.parametrize("missing", ["squared_norm", "norm_limit", "local_scale", "step"])
def test_a_state_of_another_version_is_refused_and_changes_nothing(missing):
    params = _parameters(torch.float32)
    outer = LearnedOptimizer(params, AdaMLP(seed=1))
    _steps(outer, params, 0, 1)
    state = copy.deepcopy(outer.state_dict())
    _steps(outer, params, 1, 2)
    del state["state"][0][missing]
    with pytest.raises(ValueError, match=r"but LearnedOptimizer's now has .*: another version wrote it"):
        outer.load_state_dict(state)
    assert outer.state[params[0]]["step"] == 2


def test_a_state_with_the_names_of_version_0_1_goes_on():
    old_names = {"squared_norm": "square", "norm_limit": "limit", "left_gram": "left", "right_gram": "right"}
    whole, network = _parameters(torch.float32), AdaMLP.base_step(seed=0)
    outer = LearnedOptimizer(whole, network)
    _steps(outer, whole, 0, 3)
    state, params = copy.deepcopy(outer.state_dict()), copy.deepcopy(whole)
    for index, saved in state["state"].items():
        state["state"][index] = {old_names.get(name, name): value for name, value in saved.items()}
    resumed = LearnedOptimizer(params, network)
    resumed.load_state_dict(state)
    _steps(outer, whole, 3, 5)
    _steps(resumed, params, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole, params, strict=True))


def _partly_unused(outer, num_steps):
    """Steps on gradients whose first column is 0; the parameter then."""
    p = outer.param_groups[0]["params"][0]
    for t in range(num_steps):
        p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(t))
        p.grad[:, 0] = 0
        outer.step()
    return p.detach().clone()


@pytest.mark.parametrize("named", [True, False])
def test_a_state_goes_on_with_the_update_that_it_was_saved_with(named):
    """Weights of 0.1 move what is unused, and so do the states of then, which do not name their update."""
    own, former = AdaMLP.bundled(), AdaMLP.bundled()
    former.update = "blended_nesterov"
    outer = LearnedOptimizer([torch.nn.Parameter(torch.ones(4, 3))], former)
    before, state = _partly_unused(outer, 3), copy.deepcopy(outer.state_dict())
    wanted = _partly_unused(outer, 2)
    if not named:
        del state["param_groups"][0]["update"]
    for _ in range(2):
        resumed = LearnedOptimizer([torch.nn.Parameter(before.clone())], own)
        resumed.load_state_dict(state)
        state = copy.deepcopy(resumed.state_dict())
        assert torch.equal(_partly_unused(resumed, 2), wanted)
        assert not torch.equal(wanted[:, 0], before[:, 0])
    fresh = LearnedOptimizer([torch.nn.Parameter(before.clone())], own)
    resumed.load_state_dict(fresh.state_dict())
    assert torch.equal(_partly_unused(resumed, 2)[:, 0], wanted[:, 0])


@pytest.mark.parametrize("old", [AdaMLP(seed=0), AdaMLP.base_step(seed=0)], ids=["published", "blended"])
def test_a_state_of_another_kind_of_network_is_refused(old):
    new = AdaMLP.base_step(seed=0) if old.update == "published" else AdaMLP(seed=0)
    first, second = (LearnedOptimizer(_parameters(torch.float32), network) for network in (old, new))
    _steps(first, first.param_groups[0]["params"], 0, 1)
    with pytest.raises(
        ValueError, match=r"but LearnedOptimizer's has .* an optimizer with another kind of network wrote it"
    ):
        second.load_state_dict(first.state_dict())
    assert not second.state


def test_local_momentum_takes_the_place_of_outer_momentum():
    """After μ^H of it is kept by the workers: a momentum β of (1 - 0.5^2) 0.8 = 0.6 on g = 1, from round 5 on."""
    param = torch.nn.Parameter(torch.zeros(1))
    outer = LearnedOptimizer([param], AdaMLP.base_step(lr=1.0, momentum=0.8))
    outer.param_groups[0].update(local_momentum=0.5, local_steps=2)
    mean = 0.0
    for t in range(12):
        share = max(0.4, 2 / (t + 2))
        mean += share * (1.0 - mean)
        param.grad, before = torch.ones(1), param.detach().clone()
        outer.step()
        torch.testing.assert_close(before - param.detach(), torch.tensor([1.0 + (1 - share) / share * mean]))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda outer: pickle.loads(pickle.dumps(outer))])
def test_copies_step_as_the_original(again):
    param = torch.nn.Parameter(torch.zeros(4, 3))
    outer, other = LearnedOptimizer([param]), None
    for _ in range(3):
        param.grad = torch.randn(4, 3)
        other = other or again(outer)
        outer.step()
        copied = other.param_groups[0]["params"][0]
        copied.grad = param.grad.clone()
        other.step()
        assert torch.equal(copied, param)
        assert copied is not param


def test_parameters_without_gradient_stay():
    params = _parameters(torch.float32)
    before = copy.deepcopy(params)
    outer = LearnedOptimizer(params, AdaMLP(seed=0))
    params[0].grad = torch.ones_like(params[0])
    outer.step()
    assert not torch.equal(params[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(params[1:], before[1:], strict=True))


def test_closure():
    p = torch.nn.Parameter(torch.ones(3))

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    for outer in (LearnedOptimizer([p], AdaMLP(seed=0)), SlowMomentum([p])):
        p.grad = None
        assert outer.step(closure).item() > 0


def test_worker_grads_are_needed_by_lagg():
    p = torch.nn.Parameter(torch.ones(3))
    outer = LearnedOptimizer([p], AdaMLP(inputs=4, seed=0))
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"belongs to 4 workers: set p\.worker_grads"):
        outer.step()


def test_sparse_gradients_are_refused():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match="dense real"):
        LearnedOptimizer([p], AdaMLP(seed=0)).step()


def _moved(last_steps):
    """How far the last of three steps goes, with a pseudo-gradient eightfold that of the others."""
    p = torch.nn.Parameter(torch.zeros(3))
    outer = LearnedOptimizer([{"params": [p]}], AdaMLP.base_step(lr=1.0))
    for size, local_steps in ((1.0, 2), (1.0, 2), (8.0, last_steps)):
        before = p.detach().clone()
        p.grad = size * torch.ones(3)
        outer.param_groups[0].update(local_lr=0.1, local_steps=local_steps)
        outer.step()
    return (before - p.detach())[0].item()


def test_growth_by_more_local_steps_is_not_damped():
    expected = 8 + 0.5 / 0.5 * (0.5 * 1 + 0.5 * 8)  # g + β/(1-β) m in round 2
    assert _moved(16) == pytest.approx(expected)
    assert _moved(2) < 0.1 * expected
