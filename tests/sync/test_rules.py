"""Rules for tensors: which one holds, what it makes of the workers' values, and what is warned of."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn

from lightning_lopt import SyncOptions
from lightning_lopt.sync.rules import Contribution, Rules, combine, warn_if_spoiled
from tests.threads import run_threads

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn]
INTEGERS = [torch.int64, torch.int32, torch.uint8]


def _rules(patterns=None):
    model = nn.Module()
    model.norm = nn.BatchNorm1d(2)
    model.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3))
    model.observer = quantization.MovingAverageMinMaxObserver()
    model.histogram = quantization.HistogramObserver()
    model.fake = quantization.FakeQuantize()
    model.register_buffer("table", torch.zeros(2, dtype=torch.cfloat))
    model.register_buffer("own", torch.zeros(2))
    model._ddp_params_and_buffers_to_ignore = ["own"]
    rules = Rules(model, patterns or {})
    return {name: rules.of(name, tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def test_defaults():
    found = _rules()
    expected = {
        "norm.weight": "mean",
        "norm.running_var": "mean",
        "norm.num_batches_tracked": "max",
        "spectral.parametrizations.weight.0._u": "unit_mean",
        "spectral.parametrizations.weight.0._v": "unit_mean",
        "spectral.parametrizations.weight.original": "mean",
        "observer.min_val": "min",
        "observer.max_val": "max",
        "histogram.min_val": "first",
        "histogram.histogram": "first",
        "fake.scale": "first",
        "fake.zero_point": "first",
        "fake.fake_quant_enabled": "max",
        "table": "mean",
        "own": "local",
    }
    assert {name: found[name] for name in expected} == expected


def test_the_first_pattern_that_fits_holds():
    found = _rules({"own": "first", "norm.running_*": "local", "norm.*": "max", "*": "mean"})
    names = ["own", "norm.running_mean", "norm.num_batches_tracked", "spectral.parametrizations.weight.0._u"]
    assert [found[name] for name in names] == ["first", "local", "max", "mean"]


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match=r"sync_rules must map patterns .* not \{'queue': 'average'\}"):
        SyncOptions(sync_rules={"queue": "average"})


def _combine(rank, make_comm, cases, left_out):
    return combine([Contribution(rule, values[rank], synced) for rule, values, synced in cases], make_comm(), left_out)


def _combined(cases, left_out=()):
    results = run_threads(_combine, 3, cases, left_out)
    assert all(
        torch.equal(a.to(torch.cdouble), b.to(torch.cdouble))
        for r in results[1:]
        for a, b in zip(r, results[0], strict=True)
    )
    assert all(result.dtype == case[1][0].dtype for result, case in zip(results[0], cases, strict=True))
    return [result.to(torch.float64 if not result.is_complex() else result.dtype).tolist() for result in results[0]]


# Workers have [1, 2], [4, 0] and [-2, 4], counts from [1, 1] on.
RULES = {
    "mean": ([1.0, 2.0], [-0.5, 3.0]),
    "max": ([4.0, 4.0], [1.0, 4.0]),
    "min": ([-2.0, 0.0], [-2.0, 2.0]),
    "first": ([1.0, 2.0], [1.0, 2.0]),
    "sum_of_changes": ([1.0, 4.0], [-2.0, 5.0]),
}


@pytest.mark.parametrize("left_out", [[], [1]], ids=["all", "one left out"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32, torch.complex64], ids=str)
def test_each_rule_in_each_type(dtype, left_out):
    values = [torch.tensor(v).to(dtype) for v in ([1.0, 2.0], [4.0, 0.0], [-2.0, 4.0])]
    cases = [(rule, values, torch.ones(2).to(dtype)) for rule in RULES]
    expected = [results[bool(left_out)] for results in RULES.values()]
    if not (dtype.is_floating_point or dtype.is_complex) and left_out:
        expected[0] = [0.0, 3.0]  # whole numbers are rounded to even
    assert _combined(cases, left_out) == expected


def test_booleans_large_integers_first_of_the_rest_and_norms():
    large = 2**53 - 1
    cases = [
        ("max", [torch.tensor([False, i == 2]) for i in range(3)], None),
        ("mean", [torch.tensor(large)] * 3, None),
        ("max", [torch.tensor(2**62 + i) for i in range(3)], None),
        ("sum_of_changes", [torch.tensor(i) for i in range(3)], None),
        ("unit_mean", [torch.tensor([3.0 * i, 4.0]) for i in (0, 1, 2)], None),
    ]
    first, mean, largest, total, unit = _combined(cases)
    assert (first, mean, total, unit) == ([0.0, 1.0], large, 3.0, pytest.approx([0.6, 0.8]))
    assert largest == 2**62
    assert _combined([("first", [torch.tensor(float(i)) for i in range(3)], None)], [0]) == [1.0]
    assert _combined([("mean", [torch.tensor(x) for x in (1.0, float("nan"), 2.0)], None)], [1]) == [1.5]


UNITS = nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
SPOILED = {
    "unit vectors": (UNITS, 0.5 * UNITS, "mean", r"queue holds vectors of norm 1.*'local' or 'first'"),
    "unit columns": (UNITS.t(), 0.5 * UNITS.t(), "mean", "holds vectors of norm 1"),
    "counts": (
        torch.tensor([3, 4]),
        torch.tensor([5, 4]),
        "max",
        "holds whole numbers.*their maximum.*'sum_of_changes'",
    ),
    "float counts": (torch.tensor([3.0, 4.0]), torch.tensor([4.0, 4.0]), "mean", "whole numbers.*their mean"),
    "a memory": (
        torch.tensor([[0.5, 0.7], [0.0, 0.0]]),
        torch.tensor([[0.4, 0.3], [0.0, 0.0]]),
        "mean",
        "rows of which only some were written.*'local' or 'first'",
    ),
    "extremes": (
        torch.tensor([0.5, -torch.inf]),
        torch.tensor([0.7, -torch.inf]),
        "mean",
        "infinities.*'max' or 'min'",
    ),
}


@pytest.mark.parametrize(("own", "result", "rule", "match"), SPOILED.values(), ids=SPOILED)
def test_values_that_a_rule_by_type_spoils(own, result, rule, match):
    with pytest.warns(UserWarning, match=match):
        assert warn_if_spoiled("queue", Contribution(rule, own, torch.zeros_like(own)), result)


@pytest.mark.parametrize(
    ("own", "result"),
    [
        (torch.tensor([0.5, 1.5]), torch.tensor([0.6, 1.4])),
        (torch.tensor([3, 4]), torch.tensor([3, 4])),
        (torch.zeros(2), torch.tensor([0.1, 0.2])),
        (torch.tensor([True]), torch.tensor([False])),
        (torch.zeros(0), torch.zeros(0)),
        (torch.tensor(0.3), torch.tensor(0.4)),
    ],
)
def test_usual_values_are_silent(own, result):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not warn_if_spoiled("running_mean", Contribution("mean", own), result)
