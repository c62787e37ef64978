"""The layers: who may import whom, and what the package shows."""

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
    "optim": {"functional", "network"},
    "schedules": set(),
    "comm": set(),
    "selection": {"functional"},
    "worker_speeds": set(),
    "sync": {"comm", "functional", "selection"},
    "rounds": {"comm", "schedules", "sync", "worker_speeds"},
    "virtual": {"comm", "rounds", "sync", "worker_speeds"},
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
    "bench": {
        "callbacks",
        "comm",
        "functional",
        "meta",
        "network",
        "optim",
        "rounds",
        "schedules",
        "selection",
        "strategies",
        "sync",
        "worker_speeds",
    },
}
LIGHTNING = {"strategies", "callbacks", "bench"}
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


PRIVATE = re.compile(r"_[a-zA-Z]\w*")
CALLS = {"getattr", "hasattr", "setattr", "delattr"}
HOSTED = [m for m in MODULES if m.startswith("strategies/") or m in ("callbacks.py", "virtual/worker_batches.py")]


def _private_uses(source: str) -> list[str]:
    """The names with an underscore that do not belong to the classes of a module, by line."""
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
