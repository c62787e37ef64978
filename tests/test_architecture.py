"""The layers: who may import whom, and what the package shows."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import lightning_lopt

ROOT = Path(lightning_lopt.__file__).parent
MODULES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")

# What each layer may import of this package, besides itself.
MAY_IMPORT = {
    "functional": set(),
    "network": {"functional", "weights_file"},
    "weights_file": set(),
    "optim": {"functional", "network"},
    "schedules": set(),
    "comm": set(),
    "selection": {"functional"},
    "compression": {"functional"},
    "report": set(),
    "swap": set(),
    "travel": {"comm", "compression", "functional", "selection"},
    "parameters": set(),
    "packing": {"parameters"},
    "buffers": {"comm"},
    "sharding": {"comm", "packing", "parameters"},
    "agreement": {"comm", "functional"},
    "cargo": {"outer", "packing", "parameters", "selection", "sharding", "travel"},
    "exchange": {"agreement", "buffers", "comm", "compression", "functional", "packing", "parameters", "sharding"},
    "flight": {"agreement", "exchange", "packing", "report"},
    "guard": {"comm", "exchange", "functional", "parameters"},
    "outer": {"comm", "packing", "parameters", "sharding"},
    "sync": {
        "agreement",
        "buffers",
        "cargo",
        "comm",
        "exchange",
        "flight",
        "functional",
        "guard",
        "outer",
        "packing",
        "parameters",
        "report",
        "sharding",
        "swap",
        "travel",
    },
    "pace": set(),
    "rounds": {"agreement", "comm", "outer", "pace", "report", "schedules", "sync", "travel"},
    "replicas": set(),
    "virtual": {"comm", "replicas", "rounds"},
    "strategies": {
        "agreement",
        "comm",
        "compression",
        "functional",
        "network",
        "optim",
        "outer",
        "pace",
        "replicas",
        "rounds",
        "schedules",
        "selection",
        "sync",
        "travel",
        "virtual",
    },
    "callbacks": {"report", "rounds", "strategies"},
    "meta": {"functional", "network", "weights_file", "comm"},
    "bench": {
        "compression",
        "pace",
        "functional",
        "network",
        "optim",
        "schedules",
        "comm",
        "selection",
        "travel",
        "sync",
        "rounds",
        "strategies",
        "callbacks",
        "meta",
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


def test_every_module_says_what_it_is_for():
    for module in MODULES:
        name = "lightning_lopt." + module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if not name.endswith("__main__"):
            assert importlib.import_module(name).__doc__, name
