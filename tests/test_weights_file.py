"""Weights files: round trips, and every kind of damage is an error that says what is wrong."""

from __future__ import annotations

import json
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lopt import AdaMLP, WeightsError
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
        ({"version": "2"}, "version '2' of its format, expected '1'"),
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


def test_a_diverged_network_is_not_saved(tmp_path):
    network = AdaMLP(seed=0)
    with torch.no_grad():
        network.layers[0].weight[0, 0] = float("nan")
    with pytest.raises(WeightsError, match="cannot be saved"):
        network.save(tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()
