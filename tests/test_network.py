"""AdaMLP and its file: round trips and every kind of damage."""

from __future__ import annotations

import json
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lopt import AdaMLP, LearnedLocalSGD, LearnedOptimizer, WeightsError
from lightning_lopt.network import FORMAT


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "weights.safetensors"
    AdaMLP(inputs=3, hidden=(16, 8), update="blended_nesterov", card={"hours": 1.5}, seed=0).save(path)
    return path


def test_round_trip(saved):
    network, again = AdaMLP(inputs=3, hidden=(16, 8), update="blended_nesterov", seed=0), AdaMLP.load(saved)
    assert again.config == network.config
    assert again.card == {"hours": 1.5}
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_layout_of_the_file(tmp_path):
    path = tmp_path / "w.safetensors"
    AdaMLP(seed=0).save(path)
    shapes = {name: tuple(t.shape) for name, t in load_file(path).items()}
    assert shapes == {
        "layers.0.weight": (32, 39), "layers.0.bias": (32,), "layers.1.weight": (32, 32), "layers.1.bias": (32,),
        "layers.2.weight": (2, 32), "layers.2.bias": (2,),
        "decays.momentum": (3,), "decays.rms": (1,), "decays.factored": (3,),
    }  # fmt: skip


def test_a_file_is_replaced_on_demand_only(saved):
    content = saved.read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        AdaMLP(seed=1).save(saved)
    assert saved.read_bytes() == content
    AdaMLP(seed=1).save(saved, overwrite=True)
    assert AdaMLP.load(saved).hidden == (32, 32)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere for weights\.safetensors"):
        AdaMLP(seed=0).save(tmp_path / "nowhere" / "weights.safetensors")
    assert not [*tmp_path.iterdir()]


def test_truncated_at_every_length(saved, tmp_path):
    content = saved.read_bytes()
    broken = tmp_path / "broken.safetensors"
    for length in [0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]:
        broken.write_bytes(content[:length])
        with pytest.raises(WeightsError, match="not a readable safetensors file"):
            AdaMLP.load(broken)


def test_header_that_lies_about_its_size(saved, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(struct.pack("<Q", 1 << 60) + saved.read_bytes()[8:])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        AdaMLP.load(broken)


def _rewrite(path, tensors=None, **metadata):
    network = AdaMLP.load(path)
    given = {
        "format": FORMAT, "version": "1", "config": json.dumps(network.config), "card": "{}", **metadata
    }  # fmt: skip
    save_file({**load_file(path), **(tensors or {})}, path, metadata=given)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": "2"}, "version '2', expected"),
        ({"format": "else"}, "format 'else'"),
        ({"config": "{"}, "configuration that cannot be used"),
        ({"config": json.dumps({"inputs": -1})}, "inputs must be"),
        ({"config": json.dumps({"nonsense": 1})}, "unexpected keyword"),
        ({"config": json.dumps({"update": "magic"})}, "update must be one of"),
        ({"config": json.dumps({"step_mult": float("nan")})}, "step_mult must be"),
        ({"config": json.dumps({"inputs": 4})}, r"layers.0.weight: \('F32', 16, \d+\), expected \('F32', 32, 42\)"),
        ({"tensors": {"layers.1.bias": torch.full((8,), float("nan"))}}, "layers.1.bias holds values"),
        ({"tensors": {"decays.rms": torch.tensor([float("inf")])}}, "decays.rms holds values"),
        ({"tensors": {"decays.rms": torch.zeros(1, dtype=torch.float64)}}, r"decays.rms: \('F64', 1\)"),
        ({"config": json.dumps({"hidden": [10**6, 10**6]})}, "layers.0.weight"),
        ({"config": json.dumps({"hidden": [-1, 4]})}, "configuration that cannot be used"),
        ({"config": json.dumps({"hidden": 10**400})}, "configuration that cannot be used"),
        ({"config": json.dumps([1])}, "configuration that cannot be used"),
        ({"card": "[" * 100_000}, "configuration that cannot be used"),
        ({"card": "[1]"}, "configuration that cannot be used"),
        ({"sha256": "0"}, "does not fit its checksum"),
        ({"sha265": "0"}, "metadata that this version does not know"),
        ({"tensors": {"more": torch.zeros(1)}}, r"more: \('F32', 1\), expected none"),
    ],
)
def test_wrong_content(saved, change, match):
    _rewrite(saved, **change)
    with pytest.raises(WeightsError, match=match):
        AdaMLP.load(saved)


def test_no_damaged_file_is_ever_loaded(saved, tmp_path):
    """Flipped bits, cuts, additions and exchanged parts: always our error, and never other weights."""
    content = saved.read_bytes()
    generator = random.Random(0)
    broken = tmp_path / "broken.safetensors"
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for trial in range(600):
        damaged = bytearray(content)
        at = generator.randrange(header if trial % 2 else len(content))
        length = generator.randrange(1, 64)
        other = generator.randrange(len(content) - length)
        kind = trial % 6
        if kind < 3:
            damaged[at] ^= 1 << generator.randrange(8)
        elif kind == 3:
            del damaged[at:]
        elif kind == 4:
            damaged[at:at] = generator.randbytes(length)
        else:
            damaged[other : other + length] = content[at : at + length]
        broken.write_bytes(damaged)
        if damaged != content:
            with pytest.raises(WeightsError):
                AdaMLP.load(broken)


def test_missing_file_and_name():
    for wrong in ("nowhere.safetensors", "defualt"):
        with pytest.raises(FileNotFoundError, match=rf"no weights file {wrong}\. Give a path that .* \['default', "):
            LearnedLocalSGD(network=wrong)
    with pytest.raises(WeightsError, match="no bundled weights 'nonsense'"):
        AdaMLP.bundled("nonsense")


def test_a_diverged_network_is_not_saved(tmp_path):
    network = AdaMLP(seed=0)
    with torch.no_grad():
        network.layers[0].weight[0, 0] = float("nan")
    with pytest.raises(WeightsError, match="cannot be saved"):
        network.save(tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


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
