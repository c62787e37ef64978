"""Simulated runs have the trajectories of their optimizers; the table follows from their curves."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from examples.benchmarks import __main__ as bench
from examples.benchmarks.compare import methods, plot, simulate
from examples.benchmarks.compare.clients import Shared
from examples.benchmarks.compare.methods import Setting
from examples.benchmarks.compare.simulate import Experiment
from examples.benchmarks.report import UsageError
from lightning_lopt import AdaMLP, BlendedNesterov, ControlledNesterov, Controller
from lightning_lopt.meta.local import LocalOptimizer
from lightning_lopt.meta.outer import SimulatedRound
from lightning_lopt.meta.tasks import ImageMLP


@pytest.fixture
def task():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.rand(60, 2, 3, generator=generator) + labels[:, None, None]
    return ImageMLP(images, labels, hidden=(5,), batch_size=4)


def runs(task, settings, seeds=(0, 1), **kwargs):
    experiment = Experiment(**{"num_workers": 2, "local_steps": 3, "num_rounds": 4, **kwargs})
    network = AdaMLP(seed=0, update="blended_nesterov")
    return simulate.simulate(Shared(task), settings, seeds, experiment, network)


def losses(*args, **kwargs):
    return runs(*args, **kwargs).losses


def test_settings_and_seeds_do_not_mix(task):
    momentum = {"lr": 0.5, "momentum": 0.3}
    for method, options in (("local_sgd", {}), ("learned", {}), ("slowmo", momentum), ("base_step", momentum)):
        settings = [Setting(method, lr, options) for lr in (0.5, 0.1)]
        together = losses(task, settings)
        assert together.shape == (2, 2, 5)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            alone = losses(task, settings[i : i + 1], seeds=(j,))
            torch.testing.assert_close(together[i, j], alone[0, 0], rtol=1e-5, atol=1e-6)


def test_methods_that_are_local_sgd_by_algebra(task):
    expected = losses(task, [Setting("local_sgd", 0.2)])
    slowmo = losses(task, [Setting("slowmo", 0.2, {"lr": 1.0, "momentum": 0.0})])
    torch.testing.assert_close(slowmo, expected, rtol=1e-5, atol=1e-6)
    assert all(later < sooner for sooner, later in pairwise(expected.mean((0, 1)).tolist()))


def test_data_parallel_methods_are_torch_on_the_whole_batch(task):
    """With the local optimizer's one step and one round per communication, K·H batches are one large batch."""
    experiment = {"num_workers": 2, "local_steps": 3, "num_rounds": 4}
    for method, make in (("parallel_sgd", torch.optim.SGD), ("parallel_adam", torch.optim.Adam)):
        found = losses(task, [Setting(method, 0.1)], seeds=(0,), decay=True, **experiment)[0, 0]
        generator = torch.Generator().manual_seed(0)
        params = {name: p.requires_grad_() for name, p in task.init(1, generator).items()}
        optimizer = make(params.values(), lr=0.1)
        wanted = [task.loss(params, (task.images[None], task.labels[None])).item()]
        for t in range(4):
            images, labels = (part.flatten(0, 1)[None] for part in task.batch(6, generator))
            optimizer.param_groups[0]["lr"] = 0.1 * Experiment(num_rounds=4, decay=True).factor(t)
            task.loss(params, (images, labels)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            wanted.append(task.loss(params, (task.images[None], task.labels[None])).item())
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_one_worker_with_one_step_is_the_local_optimizer_alone(task):
    """K = H = 1: averaging over rounds keeps the optimizer's state, so Local AdamW is data-parallel Adam."""
    alone = losses(task, [Setting("parallel_adam", 0.05)], num_workers=1, local_steps=1)
    local = losses(task, [Setting("local_sgd", 0.05)], num_workers=1, local_steps=1, optimizer=LocalOptimizer("adamw"))
    torch.testing.assert_close(local, alone, rtol=1e-5, atol=1e-6)


def test_fedadam_moves_every_coordinate_by_its_rate(task):
    """Adam's first step is the sign of the pseudo-gradient times the rate."""
    start = task.init(1, torch.Generator().manual_seed(0))
    anchor = {name: p.clone() for name, p in start.items()}
    outer = methods.outer([Setting("fedadam", 0.1, {"lr": 0.01})], anchor, AdaMLP())
    workers = {name: p.unsqueeze(1) - 0.5 for name, p in start.items()}
    outer(anchor, SimulatedRound(workers, torch.tensor([0]), torch.tensor([0.1]), 1, 0.0, []))
    for name, p in anchor.items():
        torch.testing.assert_close(p, start[name] - 0.01, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "optimizer", "options"),
    [
        ("base_step", BlendedNesterov, [{"lr": 0.5}, {"momentum": 0.6, "phase": 0.7}]),
        ("controlled", ControlledNesterov, [{"lr": 0.5}, {"momentum": 0.6}]),
    ],
)
def test_the_base_step_is_that_of_its_optimizer(task, method, optimizer, options):
    """Two runs side by side, of which one reads the phase of its local rate, or both."""
    start = task.init(2, torch.Generator().manual_seed(0))
    settings = [Setting(method, 0.1, each) for each in options]
    anchor = {name: p.clone() for name, p in start.items()}
    outer = methods.outer(settings, anchor, Controller.bundled())
    twins = [[torch.nn.Parameter(p[i].clone()) for p in start.values()] for i in range(2)]
    optimizers = [optimizer(twin, **each) for twin, each in zip(twins, options, strict=True)]
    generator = torch.Generator().manual_seed(1)
    for t, share in enumerate((1.0, 0.5, 0.2, 0.1)):
        noise = {name: torch.randn(p.shape, generator=generator) for name, p in start.items()}
        workers = {name: (p - noise[name]).unsqueeze(1) for name, p in anchor.items()}
        outer(anchor, SimulatedRound(workers, torch.full((2,), t), torch.full((2,), 0.1 * share), 3, 0.2, []))
        for i, (twin, own) in enumerate(zip(twins, optimizers, strict=True)):
            own.param_groups[0].update(local_lr=0.1 * share, local_steps=3, local_momentum=0.2 ** (1 / 3))
            for p, grad in zip(twin, noise.values(), strict=True):
                p.grad = grad[i]
            own.step()
            ours = [p[i] for p in anchor.values()]
            torch.testing.assert_close(ours, [p.detach() for p in twin], rtol=1e-4, atol=1e-4)


def test_a_diverging_setting_is_a_row(task):
    found = losses(task, [Setting("parallel_sgd", 1e30), Setting("parallel_sgd", 0.1)])
    assert not found[0, :, -1].isfinite().any()
    assert found[1].isfinite().all()
    assert plot.smooth(found[0, 0].tolist())[-1] == float("inf")


def test_a_setting_of_which_all_workers_diverge_stays_where_it_was(task):
    found = runs(task, [Setting("local_sgd", 1e30), Setting("local_sgd", 0.1)])
    assert found.left_out.tolist() == [[8, 8], [0, 0]]
    assert (found.losses[0] == found.losses[0, :, :1]).all()


def test_grids():
    sizes = {method: len(methods.settings(method, [1.0, 0.5])) for method in methods.GRIDS}
    assert sizes == {
        "local_sgd": 2,
        "learned": 2,
        "slowmo": 220,
        "diloco": 60,
        "fedadam": 12,
        "base_step": 40,
        "parallel_sgd": 11,
        "parallel_adam": 11,
    }
    first = methods.settings("slowmo", [0.5])[0]
    assert first.options == {"lr": 2.0, "momentum": 0.99}


def test_groups_hold_every_setting_once(task, monkeypatch):
    settings = methods.settings("diloco", [1.0])
    size = sum(p.nbytes for p in task.init(1, torch.Generator()).values())  # more than a batch
    monkeypatch.setattr(simulate, "GROUP_BYTES", 7 * 6 * size)
    parts = list(simulate.groups(task, settings, 6))
    assert [len(part) for part in parts] == [7, 7, 7, 7, 2]
    assert [setting for part in parts for setting in part] == settings


def row(method, seed, losses, local_lr=1.0, **options):
    return {"method": method, "local_lr": local_lr, "options": options, "seed": seed, "losses": losses}


def test_tuning_and_the_rounds_to_the_baseline():
    rows = [
        *(row("local_sgd", seed, [8.0] + [4.0] * 8 + [2.0 + seed] * 5, 0.5) for seed in (0, 1)),
        *(row("local_sgd", seed, [8.0] + [float("nan")] * 13, 1.0) for seed in (0, 1)),
        *(row("learned", seed, [8.0] + [2.0] * 13, 0.5) for seed in (0, 1)),
        *(row("learned", seed, [8.0] + [0.0] * 13, 1.0) for seed in (0, 1)),  # not at the rate of Local SGD
        *(row("slowmo", seed, [8.0] + [5.0] * 13, 1.0, momentum=0.5) for seed in (0, 1)),
        row("slowmo", 0, [8.0] + [1.0] * 13, 1.0, momentum=0.9),  # one seed only
    ]
    table = {line["method"]: line for line in plot.summary(plot.tune(rows), plot.best_baseline(rows))}
    assert [line["gamma"] for line in table.values()] == [0.5, 0.5, 1.0]
    assert table["local_sgd"]["rounds to Local SGD's"] == "13 13"
    assert table["learned"]["rounds to Local SGD's"] == "5 5"  # the first mean without the 8
    assert table["learned"]["share of its rounds"] == pytest.approx(5 / 13)
    assert table["slowmo"]["rounds to Local SGD's"] == "never never"
    assert table["slowmo"]["share of its rounds"] is None
    assert table["learned"]["to the best baseline's"] == "5 5"


def test_runs_side_by_side_share_their_time():
    """Two settings with two seeds took 8 s, then one with two seeds 3 s; the time of the others is unknown."""
    rows = [row("diloco", seed, [1.0], lr=lr) | {"group_seconds": 8.0} for lr in (0.1, 0.2) for seed in (0, 1)]
    rows += [row("diloco", seed, [1.0], lr=0.3) | {"group_seconds": 3.0} for seed in (0, 1)]
    rows += [row("local_sgd", seed, [1.0]) for seed in (0, 1)]
    candidates = plot._candidates(rows)
    assert [candidate.seconds for candidate in candidates["diloco"]] == [2.0, 2.0, 1.5]
    assert candidates["local_sgd"][0].seconds is None


def test_a_table_needs_local_sgd():
    with pytest.raises(ValueError, match="no run of local_sgd to compare learned with"):
        plot.tune([row("learned", 0, [1.0] * 6)])


def test_run_then_plot(tmp_path, capsys):
    first, second = tmp_path / "grid.jsonl", tmp_path / "best.jsonl"
    sizes = ["--rounds", "3", "--num-workers", "2", "--local-steps", "1"]
    methods = ["--methods", "local_sgd", "learned", "diloco"]
    bench.main(["run", str(first), *sizes, *methods, "--local-lr", "0.5", "0.1", "--seeds", "0"])
    bench.main(["run", str(second), *sizes, *methods, "--best-of", str(first), "--seeds", "0", "1"])
    assert len(first.read_text().splitlines()) == 2 + 2 + 60
    assert len(second.read_text().splitlines()) == 2 + 2 + 2
    with pytest.raises(ValueError, match=r"has no settings of \['slowmo'\]"):
        bench.main(["run", str(second), *sizes, "--methods", "slowmo", "--best-of", str(first)])
    bench.main(["plot", str(second), "--png", str(tmp_path / "loss.png"), "--json", str(tmp_path / "table.json")])
    assert "digits, K = 2, H = 1, 3 rounds" in capsys.readouterr().out
    assert (tmp_path / "loss_digits_k2_h1_3_rounds.png").stat().st_size > 1000
    assert len(json.loads((tmp_path / "table.json").read_text())["digits, K = 2, H = 1, 3 rounds"]) == 3


def test_missing_data_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data"):
        bench.main(["run", str(tmp_path / "x"), "--task", "cifar10", "--methods", "local_sgd", "--data", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-workers", "0"], "--num-workers: 0 is not a positive number"),
        (["--local-lr", "0.1", "-1"], "--local-lr: -1 is not a positive number"),
        (["--seeds", "0", "0"], "repeats a seed"),
        (
            ["--network", "lagg_a_short", "--num-workers", "2", "--methods", "learned"],
            "is made for 8 workers, not for 2",
        ),
    ],
)
def test_what_cannot_run_is_refused_and_writes_nothing(tmp_path, capsys, arguments, message):
    out = tmp_path / "rows.jsonl"
    with pytest.raises((UsageError, SystemExit)) as error:
        bench.main(["run", str(out), *arguments])
    assert message in f"{error.value} {capsys.readouterr().err}"
    assert not out.exists()
