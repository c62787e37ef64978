"""The benchmark of the outer step, on tensors small enough for a test."""

from __future__ import annotations

import json

import pytest
import torch

from examples.benchmarks import __main__ as bench
from examples.benchmarks.speed import outer_step

SHAPES = [(48, 32), (32,), (8, 4, 3, 3)]


def test_all_optimizers_are_timed_and_ours_agrees_with_the_plain_form():
    params = {name: outer_step.parameters(SHAPES) for name in (outer_step.OURS, outer_step.PLAIN)}
    for name, tensors in params.items():
        optimizer = outer_step.OPTIMIZERS[name](tensors)
        for _ in range(3):
            optimizer.step()
    for ours, plain in zip(*params.values(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)

    times, peak = outer_step.time_steps(SHAPES, repeats=2)
    assert set(times) == set(outer_step.OPTIMIZERS)
    assert all(len(values) == 2 and min(values) > 0 for both in times.values() for values in both)
    assert peak > 1e9


@pytest.mark.slow
def test_extra_memory_is_that_of_a_block():
    shapes = [(768, 3072)] * 2
    threads = torch.get_num_threads()
    extra = outer_step.extra_memory(outer_step.OURS, shapes, threads)
    if extra is None:
        pytest.skip("this system does not tell the peak of the resident set")
    assert extra < 64e6
    assert outer_step.extra_memory(outer_step.PLAIN, shapes, threads) > 4 * 39 * 768 * 3072


def test_the_command_prints_a_table_and_writes_json(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(outer_step, "measure", lambda shapes, repeats: _measured(len(shapes), repeats))
    path = tmp_path / "new" / "result.json"
    bench.main(["outer-step", "--model", "squeezenet1_1", "--repeats", "3", "--json", str(path)])
    assert "squeezenet1_1: 52 parameters" in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"][0]["seconds"] == 3


def test_shapes_of_the_models_without_weights():
    counts = {
        name: [len(s), sum(torch.Size(shape).numel() for shape in s)]
        for name, make in outer_step.MODELS.items()
        for s in [make()]
    }
    assert counts == {"tiny_vit": [56, 136_650], "minilm": [103, 22_713_216]}


def _measured(parameters: int, repeats: int):
    return {"parameters": parameters, "sgemm_flops": 1e9, "rows": [{"optimizer": "x", "seconds": repeats}]}
