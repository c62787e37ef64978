"""What a user installs: its files, its version, and the packages that it imports."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_lopt

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_lopt"
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
# the requirement that brings a package, where it has another name
BROUGHT_BY = {"sklearn": "scikit-learn", "scipy": "scikit-learn", "PIL": "torchvision", "tqdm": "lightning"}
TESTS = ("practice", "test")  # extras for tests alone


def test_every_data_file_is_installed():
    patterns = CONFIG["tool"]["setuptools"]["package-data"]["lightning_lopt"]
    installed = {file for pattern in patterns for file in PACKAGE.glob(pattern)}
    data = {file for file in PACKAGE.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert PACKAGE / "py.typed" in data
    assert data == installed


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == lightning_lopt.__version__


def test_the_readme_has_the_bounds_on_versions():
    bounds = [f"Python{CONFIG['project']['requires-python']}", *CONFIG["project"]["dependencies"]]
    install = (ROOT / "README.md").read_text().split("## Install")[1].split("\n## ")[0]
    named = re.findall(r"(Python|torch|lightning) ≥ ([\d.]+)", install)
    assert {name for name, _ in named} == {"Python", "torch", "lightning"}
    for name, version in named:
        assert any(re.match(rf"{name}>={re.escape(version)}(,|$)", bound) for bound in bounds), name


def test_the_classifiers_are_the_versions_that_were_tried():
    claimed = re.findall(r":: (3\.\d+)", " ".join(CONFIG["project"]["classifiers"]))
    tried = re.findall(r"^\| (3\.\d+)\.\d+ \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    assert claimed == sorted({*tried})
    assert CONFIG["project"]["requires-python"] == f">={claimed[0]}"


def test_the_long_description_needs_no_repository():
    text, readme = CONFIG["project"]["readme"]["text"], (ROOT / "README.md").read_text()
    assert not re.findall(r"\]\((?!https://)", text)
    first_lines, script = text.split("\n\n")[0], re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(script) == 1
    assert all(part in readme for part in [first_lines, *script])  # whose blocks are run


def _imports(tree: ast.AST, deferred: bool) -> Iterator[str]:
    """The packages that a module imports when it is imported itself and, if `deferred`, those that its functions do."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
        elif deferred or not isinstance(node, ast.FunctionDef):
            yield from _imports(node, deferred)


@pytest.mark.parametrize(
    ("folder", "extras"), [("lightning_lopt", False), ("lightning_lopt", True), ("examples", True)]
)
def test_every_import_is_required(folder, extras):
    """By the package itself; by it or an extra for imports within functions, and for the examples."""
    files = [file for file in (ROOT / folder).rglob("*.py") if "records" not in file.parts]
    own = {"lightning_lopt", "examples", *(file.stem for file in (ROOT / "examples").glob("*.py"))}
    imported = {name for file in files for name in _imports(ast.parse(file.read_text()), deferred=extras)}
    imported -= own | sys.stdlib_module_names
    optional = CONFIG["project"]["optional-dependencies"] if extras else {}
    lines = [*CONFIG["project"]["dependencies"], *(x for name, xs in optional.items() if name not in TESTS for x in xs)]
    assert "torch" in imported
    assert {BROUGHT_BY.get(name, name) for name in imported} <= {re.split(r"[^\w-]", line)[0] for line in lines}
