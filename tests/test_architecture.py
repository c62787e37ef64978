"""The layers: who may import whom, what the package shows, and where its tests are."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import lightning_lopt

ROOT = Path(lightning_lopt.__file__).parent
MODULES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")

# What each layer may import of this package, besides itself.
MAY_IMPORT = {
    "functional": set(),
    "weights_file": set(),
    "network": {"functional", "weights_file"},
    "optim": {"functional", "network"},
    "schedules": set(),
    "comm": set(),
    "selection": {"functional"},
    "worker_speeds": set(),
    "sync": {"comm", "functional", "optim", "selection"},
    "rounds": {"comm", "optim", "schedules", "sync", "worker_speeds"},
    "virtual": {"comm", "rounds", "sync"},
    "strategies": {
        "comm",
        "functional",
        "network",
        "optim",
        "rounds",
        "schedules",
        "selection",
        "sync",
        "virtual",
        "worker_speeds",
    },
    "callbacks": {"rounds", "strategies", "sync"},
    "meta": {"comm", "functional", "network", "weights_file"},
}
TESTS = Path(__file__).parent
# Modules whose tests are elsewhere, and where.
TESTED_ELSEWHERE = {
    "functional/ada.py": "functional/test_learned.py and test_separable.py: accumulators and features",
    "functional/blocks.py": "functional/test_separable.py: blocks of the separable form",
    "functional/grams.py": "functional/test_whitening.py: the matrices that whiten",
    "functional/layers.py": "functional/test_separable.py: the network of the learned step",
    "functional/momentum.py": "optim/test_optim.py: the slow momentum step",
    "functional/plain.py": "functional/test_separable.py: the slow form that the fast one is compared with",
    "functional/products.py": "functional/test_orthogonal.py and test_whitening.py: their matrix products",
    "functional/updates.py": "functional/test_separable.py: each update of the learned step",
    "meta/callbacks.py": "meta/test_export.py: exports during meta-training",
    "meta/outer.py": "meta/test_evaluation.py and test_particles.py: outer steps of simulated rounds",
    "optim/learned.py": "optim/test_optim.py",
    "optim/slow_momentum.py": "optim/test_optim.py",
    "strategies/checkpoint/atomic.py": "strategies/test_atomic.py",
    "strategies/checkpoint/strategy.py": "strategies/test_checkpoint.py",
    "strategies/checkpoint/worker_files.py": "strategies/test_parts.py",
    "strategies/joint.py": "sync/test_sync.py and strategies/test_models.py: several optimizers as one",
    "strategies/loaders.py": "strategies/test_checkpoint.py: the place in the data",
    "strategies/local_sgd.py": "test_strategies.py",
    "strategies/presets.py": "test_strategies.py",
    "strategies/signals.py": "strategies/test_faults.py",
    "strategies/uneven.py": "strategies/test_rendezvous.py",
    "sync/report.py": "it holds numbers only",
}
# Tests of several modules together, and what of.
OF_THE_WHOLE = {
    "functional/test_separable.py": "the separable form of the learned step equals the plain one",
    "meta/test_reality.py": "simulated rounds equal real ones",
    "optim/test_optim.py": "the contract of outer optimizers",
    "strategies/test_atomic.py": "checkpoint/atomic.py",
    "strategies/test_checkpoint.py": "checkpoint/",
    "strategies/test_faults.py": "signals, lost workers, full disks",
    "strategies/test_models.py": "odd models, loops and launchers",
    "strategies/test_parts.py": "checkpoint/worker_files.py",
    "strategies/test_ranks.py": "workers of several ranks",
    "strategies/test_rendezvous.py": "unequal data and speeds",
    "strategies/test_travel.py": "options of a sync under a Trainer",
    "test_architecture.py": "the layers, the public names, and the places of tests",
    "test_examples.py": "the examples run",
    "test_golden_rounds.py": "rounds of the authors' code",
    "test_gpu.py": "the same on GPUs",
    "test_processes.py": "the helpers of the tests",
    "test_quality.py": "lint, format and types",
    "test_readme.py": "the blocks of the README run",
    "test_soak.py": "runs that are killed go on bitwise",
    "test_strategies.py": "the strategies under a Trainer",
    "test_third_party.py": "models of others train unchanged",
    "test_wire.py": "transfers on links of a limited rate",
}
LIGHTNING = {"strategies", "callbacks"}
LIGHTNING_OF_META = {"meta/module.py", "meta/callbacks.py"}
DISTRIBUTED = {"comm", "strategies", "virtual"}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_left(module):
    layer = module.removesuffix(".py").split("/")[0]
    imports = _imports(ROOT / module)
    own = {name.split(".")[1] for name in imports if name.startswith("lightning_lopt.") and name.count(".") >= 1}
    assert not {name for name in imports if name.split(".")[0] in ("examples", "tests")}
    layers = own & set(MAY_IMPORT)
    assert layers <= MAY_IMPORT[layer] | {layer}
    if any(name == "lightning" or name.startswith("lightning.") for name in imports):
        assert layer in LIGHTNING or module in LIGHTNING_OF_META
    if any(name.startswith("torch.distributed") for name in imports):
        assert layer in DISTRIBUTED


def test_public_names():
    assert sorted(lightning_lopt.__all__) == sorted(set(lightning_lopt.__all__))
    for name in lightning_lopt.__all__:
        thing = getattr(lightning_lopt, name)
        assert thing.__doc__, name
        assert thing.__module__.startswith("lightning_lopt."), name


def test_every_module_says_what_it_is_for():
    for module in MODULES:
        name = "lightning_lopt." + module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if not name.endswith("__main__"):
            assert importlib.import_module(name).__doc__, name


def _has_code(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.parse(path.read_text()).body)


def _test_of(module: Path) -> Path:
    return module.with_name(f"test_{module.name}")


def test_every_module_has_its_tests_at_its_own_path():
    modules = {Path(module) for module in MODULES if not module.endswith(("__init__.py", "__main__.py"))}
    modules = {module for module in modules if _has_code(ROOT / module)}
    without = {str(module) for module in modules if not (TESTS / _test_of(module)).exists()}
    assert without == set(TESTED_ELSEWHERE)


def test_every_test_file_belongs_to_a_module():
    files = {path.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    roots = ROOT, ROOT.parent  # tests/examples mirrors examples
    mirrors = {f for f in files if any((root / f.with_name(f.name.removeprefix("test_"))).exists() for root in roots)}
    assert {str(file) for file in files - mirrors} == set(OF_THE_WHOLE)


def test_the_readme_names_tests_that_exist():
    defined = {
        node.name
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    named = set(re.findall(r"`(test_\w+)`", (TESTS / "README.md").read_text()))
    assert len(named) > 50
    assert named <= defined
