"""The English of docstrings: summaries and entries of Args are phrases that stand alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for folder in ("lightning_lopt", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "records" not in path.parts
]
ENTRY = re.compile(r"^(?P<indent> *)(?P<name>\*{0,2}[A-Za-z_][\w.]*(?: \(.*?\))?): (?P<text>.*)$")
SECTION = re.compile(r"^ *(Args|Attributes|Raises|Returns|Yields|Shape|Source|Example|Examples|Memory|Note):")
QUESTIONS = {"what", "which", "who", "whom", "whose", "how", "why", "where", "when"}
PREPOSITIONS = {"of", "from", "in", "to", "for", "on", "with", "without", "after", "before", "by", "at", "as", "than"}
DANGLING = QUESTIONS | PREPOSITIONS | {"has", "have", "is", "are", "was", "were", "and", "or", "but", "if", "that"}


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "module"), text


def _entries(docstring: str) -> Iterator[tuple[str, str]]:
    """Entries of the sections Args and Attributes: name and first line."""
    section, indent = "", None
    for line in docstring.splitlines():
        if match := SECTION.match(line):
            section, indent = match[1], None
        elif section in ("Args", "Attributes") and (match := ENTRY.match(line)):
            indent = len(match["indent"]) if indent is None else indent
            if len(match["indent"]) == indent:
                yield match["name"], match["text"]


def _faults(path: Path) -> Iterator[str]:
    for owner, docstring in _docstrings(path):
        summary = docstring.split("\n\n")[0]
        first = re.match(r"\w+", summary)
        if first and first[0].lower() in DANGLING:
            yield f"{owner}: summary begins with {first[0]!r}: {summary!r}"
        for sentence in re.findall(r"(?:^|(?<=[.] ))(?:What|Which|Who) [^.?]*[.?]", docstring.replace("\n", " ")):
            if not sentence.endswith("?"):
                yield f"{owner}: a sentence has a question word as its subject: {sentence!r}"
        for name, text in _entries(docstring):
            first = re.match(r"[A-Za-z]+", text)
            if first and (first[0].lower() in DANGLING or first[0][0].islower()):
                yield f"{owner}: the entry {name!r} does not stand alone: {text!r}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_phrases_that_stand_alone(path):
    assert not list(_faults(path))


def test_dangling_phrases_are_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""What a sync sends.\n\nArgs:\n    device: of the parameters.\n    lr: Of the group.\n    ok: Rate.\n"""\n'
    )
    assert len(list(_faults(path))) == 4
