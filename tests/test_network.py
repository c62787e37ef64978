"""AdaMLP: its arguments, the ablation without Ada features, and the bundled weights."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt import AdaMLP, LearnedLocalSGD, LearnedOptimizer, WeightsError


def test_missing_file_and_name():
    for wrong in ("nowhere.safetensors", "defualt"):
        with pytest.raises(FileNotFoundError, match=rf"no weights file {wrong}\. Give a path that .* \['default', "):
            LearnedLocalSGD(network=wrong)
    with pytest.raises(WeightsError, match="no bundled weights 'nonsense'"):
        AdaMLP.bundled("nonsense")


@pytest.mark.parametrize(
    "options",
    [
        *({"inputs": inputs} for inputs in (0, True, "all")),
        *({"hidden": hidden} for hidden in ((), 8, (8,), (8, 8, 8), (8, 0), (8, -1), (8, 8.0), "ab")),
        {"step_mult": 0},
        {"exp_mult": -1},
        {"update": "x"},
    ],
    ids=str,
)
def test_wrong_arguments(options):
    with pytest.raises(ValueError, match="must be"):
        AdaMLP(**options)


def test_the_ablation_is_an_mlp_on_gradient_parameter_and_time():
    """LOpt, written out: whatever the accumulators hold, 13 inputs make the step."""
    network = AdaMLP(hidden=(6, 5), step_mult=0.5, ada_features=False, seed=0)
    p = torch.nn.Parameter(torch.linspace(-1, 2, 12).view(3, 4))
    outer = LearnedOptimizer([p], network)
    first, second, last = (layer for layer in network.layers)
    weight = torch.cat([first.weight[:, :2], first.weight[:, -11:]], 1)
    scales = torch.tensor([1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000])
    for t in range(3):
        p.grad = torch.randn(3, 4)
        normed = [x * (x.square().mean() + 1e-5).rsqrt() for x in (p.grad, p.detach().clone())]
        time = torch.tanh(t / scales - 1).expand(3, 4, 11)
        hidden = torch.cat([torch.stack(normed, -1), time], -1) @ weight.T + first.bias
        d, m = last(second(hidden.relu()).relu()).unbind(-1)
        expected = p.detach() - 0.5 * d * torch.exp(0.001 * m)
        outer.step()
        torch.testing.assert_close(p.detach(), expected.detach())


def test_the_ablation_is_saved_with_the_network(tmp_path):
    AdaMLP(ada_features=False).save(tmp_path / "lopt.safetensors")
    assert not AdaMLP.load(tmp_path / "lopt.safetensors").ada_features
    with pytest.raises(ValueError, match="ada_features must be True"):
        AdaMLP(update="blended_nesterov", ada_features=False)


@pytest.mark.parametrize("options", [{"lr": 0}, {"lr": 10}, {"momentum": 0}, {"momentum": 1}])
def test_wrong_arguments_of_the_base_step(options):
    with pytest.raises(ValueError, match="must be in"):
        AdaMLP.base_step(**options)


def test_bundled_weights_have_a_card_and_are_the_default():
    assert "default" in AdaMLP.bundled_names()
    for name in AdaMLP.bundled_names():
        path = AdaMLP.bundled_path(name)
        network = AdaMLP.bundled(name)
        assert path.with_suffix(".md").read_text().strip()
        assert {"command", "commit", "seed"} <= set(network.card)
    p = torch.nn.Parameter(torch.ones(3))
    default = LearnedOptimizer([p]).network
    assert all(torch.equal(a, b) for a, b in zip(default.parameters(), AdaMLP.bundled().parameters(), strict=True))
    assert default.inputs == "mean"
