"""The layers: who may import whom, what the package shows, and where its tests are."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy

import lightning_lopt
from lightning_lopt.strategies import host

ROOT = Path(lightning_lopt.__file__).parent
MODULES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")

# What each layer may import of this package, besides itself.
MAY_IMPORT = {
    "functional": set(),
    "weights_file": set(),
    "network": {"functional", "weights_file"},
    "controller": {"functional", "weights_file"},
    "optim": {"controller", "functional", "network"},
    "schedules": {"functional"},
    "comm": set(),
    "elastic": {"comm"},
    "islands": {"comm", "functional"},
    "selection": {"functional"},
    "compression": {"functional"},
    "worker_speeds": set(),
    "sync": {"comm", "compression", "functional", "islands", "optim", "selection"},
    "rounds": {"comm", "functional", "optim", "schedules", "sync", "worker_speeds"},
    "virtual": {"comm", "rounds", "schedules", "sync", "worker_speeds"},
    "strategies": {
        "comm",
        "compression",
        "costs",
        "functional",
        "islands",
        "network",
        "optim",
        "rounds",
        "schedules",
        "selection",
        "sync",
        "virtual",
        "worker_speeds",
    },
    "costs": {"compression", "sync"},
    "callbacks": {"costs", "rounds", "strategies", "sync"},
    "meta": {"comm", "controller", "functional", "network", "weights_file"},
}
TESTS = Path(__file__).parent
# Modules whose tests are elsewhere, and where.
TESTED_ELSEWHERE = {
    "controller.py": "optim/test_controlled_nesterov.py: its file",
    "callbacks/access.py": "callbacks/test_batch_norm.py: without a strategy of this package",
    "functional/ada.py": "functional/test_learned.py and test_separable.py: accumulators and features",
    "functional/blended.py": "optim/test_blended_nesterov.py: the step by hand",
    "functional/blocks.py": "functional/test_separable.py: blocks of the separable form",
    "functional/compression.py": "test_compression.py: the codecs that are made of it",
    "functional/grams.py": "functional/test_whitening.py: the matrices that whiten",
    "functional/layers.py": "functional/test_separable.py: the network of the learned step",
    "functional/precision.py": "sync/test_flat.py: tensors of all types",
    "functional/plain.py": "functional/test_separable.py: the slow form that the fast one is compared with",
    "functional/products.py": "functional/test_orthogonal.py and test_whitening.py: their matrix products",
    "functional/slow_momentum.py": "optim/test_slow_momentum.py",
    "meta/callbacks.py": "meta/test_export.py: exports during meta-training",
    "meta/outer.py": "meta/test_evaluation.py and test_particles.py: outer steps of simulated rounds",
    "optim/whole_model.py": "optim/test_learned.py and test_blended_nesterov.py: its two subclasses",
    "strategies/callbacks.py": "strategies/test_local_sgd.py and test_uneven.py: the order of hooks",
    "strategies/checkpoint/mean.py": "strategies/checkpoint/test_worker_files.py: the mean of parts",
    "strategies/host.py": "test_architecture.py: each use has its reason; the rest by every run of a Trainer",
    "strategies/joint.py": "sync/test_sync.py and strategies/test_models.py: several optimizers as one",
    "strategies/loaders.py": "strategies/checkpoint/test_resume.py: the place in the data",
    "strategies/presets.py": "strategies/test_local_sgd.py",
    "sync/report.py": "sync/test_exchange.py and test_outliers.py: drift, norms, and the warning",
}
# Tests of several modules together, and their subjects.
OF_THE_WHOLE = {
    "functional/test_separable.py": "the separable form of the learned step equals the plain one",
    "meta/test_reality.py": "simulated rounds equal real ones",
    "strategies/test_models.py": "odd models, loops and launchers",
    "strategies/test_ranks.py": "workers of several ranks",
    "strategies/test_situations.py": "situations of practice",
    "strategies/test_state.py": "state that no optimizer steps, under a Trainer",
    "strategies/test_travel.py": "options of a sync under a Trainer",
    "sync/test_outliers.py": "workers that diverge",
    "test_architecture.py": "the layers, the public names, and the places of tests",
    "test_docstrings.py": "the English of docstrings",
    "test_examples.py": "the examples run",
    "test_golden_rounds.py": "rounds of the authors' code",
    "test_gpu.py": "the same on GPUs",
    "test_packaging.py": "files, version and requirements of what is installed",
    "test_practice.py": "packages that users train with",
    "test_processes.py": "the helpers of the tests",
    "test_quality.py": "lint, format and types",
    "test_readme.py": "the blocks of the README run",
    "test_soak.py": "runs that are killed go on bitwise",
    "test_third_party.py": "models of others train unchanged",
    "test_wire.py": "transfers on links of a limited rate",
}
LIGHTNING = {"strategies", "callbacks"}
LIGHTNING_OF_META = {"meta/callbacks.py", "meta/controller_training.py", "meta/lightning_task.py", "meta/module.py"}
DISTRIBUTED = {"comm", "elastic", "islands", "strategies", "virtual"}


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


def test_errors_of_the_readme_are_exported():
    named = set(re.findall(r"`(\w+Error)`", (ROOT.parent / "README.md").read_text()))
    assert {"CheckpointError", "DisagreementError", "WorkerLostError"} <= named
    assert {name for name in named if not hasattr(builtins, name)} <= set(lightning_lopt.__all__)


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
    names = {f: {f.name.removeprefix("test_"), f.name.replace("test_main", "__main__")} for f in files}
    mirrors = {f for f in files if any((root / f.with_name(n)).exists() for root in roots for n in names[f])}
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


PRIVATE = re.compile(r"_[a-zA-Z]\w*|fit_loop|epoch_loop|val_loop")  # Lightning does not document its loops
CALLS = {"getattr", "hasattr", "setattr", "delattr"}
OF_HOST = ("strategies/", "callbacks/", "islands.py", "virtual/worker_batches.py")
HOSTED = [m for m in MODULES if m.startswith(OF_HOST)]


def _private_uses(source: str) -> list[str]:
    """The names with an underscore, and of loops, that do not belong to the classes of a module, by line."""
    tree, found = ast.parse(source), []
    nodes = list(ast.walk(tree))
    stored = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    own = {n.attr for n in stored if isinstance(n.value, ast.Name) and n.value.id == "self"}
    for c in nodes:
        if isinstance(c, ast.ClassDef):
            own |= {f.name for f in c.body if isinstance(f, ast.FunctionDef)}
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [part for name in (*modules, *(a.name for a in node.names)) for part in name.split(".")]
        elif isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            names = [] if of_self and node.attr in own else [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        found += [f"line {getattr(node, 'lineno', 0)}: {name}" for name in names if PRIVATE.fullmatch(name)]
    return found


@pytest.mark.parametrize("module", [m for m in HOSTED if m != "strategies/host.py"])
def test_private_api_of_the_host_is_used_in_one_module(module):
    assert _private_uses((ROOT / module).read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "from lightning.fabric.utilities.data import _set_sampler_epoch as set_epoch",
        "from torch._C._distributed_c10d import Store",
        "import torch._C",
        "trainer.fit_loop.epoch_loop._should_accumulate()",
        "trainer.fit_loop.restarted_mid_epoch",
        "self._timeout",
        "class A:\n    def f(self):\n        self.trainer._active_loop = None",
        "super()._configure_launcher()",
        "getattr(callback, '_average_model', None)",
    ],
)
def test_private_api_is_recognized(source):
    assert _private_uses(source)
    assert not _private_uses("class A:\n    def f(self):\n        self._x = self._g()\n    def _g(self): ...")


def test_no_private_name_of_the_host_is_redefined():
    """A private method or attribute with a name of the host's base class would replace it unseen."""
    base = DDPStrategy()
    (tree,) = [c for c in ast.walk(ast.parse((ROOT / "strategies/local_sgd.py").read_text())) if _is_class(c)]
    stored = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    own = {n.attr for n in stored} | {f.name for f in tree.body if isinstance(f, ast.FunctionDef)}
    private = {name for name in own if PRIVATE.fullmatch(name)}
    assert "_workers" in private
    assert {name for name in private if hasattr(base, name)} == set()


def _is_class(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef)


def test_every_use_of_private_api_has_a_reason():
    functions = [f for f in vars(host).values() if inspect.isfunction(f) and f.__module__ == host.__name__]
    public = [f for f in functions if not f.__name__.startswith("_")]
    assert len(public) > 20
    assert [f.__name__ for f in public if "Reason:" not in (f.__doc__ or "")] == []
