"""The README's Python blocks, strategies and links work as they stand, and the table that it points to is complete."""

from __future__ import annotations

import dataclasses
import re
import runpy
import sys
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

import lightning_lopt
from lightning_lopt import Rounds, SyncOptions
from lightning_lopt.strategies import LocalSGD
from tests.processes import run_command

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
LINKS = sorted({target for target in re.findall(r"\]\(([^)]+)\)", PROSE) if "://" not in target})
STRATEGIES = re.findall(r"^\| [^|]+ \| `(\w+\(.*?\))` \|", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block(index, tmp_path):
    path = tmp_path / "block.py"
    path.write_text(BLOCKS[index])
    if "Trainer" in BLOCKS[index]:  # it starts itself again, as each of the workers
        run_command([sys.executable, str(path)], 280, {"GLOO_SOCKET_IFNAME": "lo"}, tmp_path)
    else:
        runpy.run_path(str(path), run_name="__main__")


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


def test_the_first_forty_lines_show_what_it_is():
    top = "\n".join(TEXT.splitlines()[:40])
    assert re.search(r"^!\[.+\]\(.+\.png\)$", top, flags=re.MULTILINE)
    assert top.count("|---") >= 1
    assert len(re.findall(r"^python3 -m venv .*$", top, flags=re.MULTILINE)) == 2


@pytest.mark.parametrize("link", LINKS)
def test_link(link):
    path, _, anchor = link.partition("#")
    target = README.parent / unquote(path) if path else README
    assert target.exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
        assert anchor in [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("expression", STRATEGIES)
def test_strategy(expression):
    strategy = eval(expression, {**vars(lightning_lopt), "partial": partial, "torch": torch})
    assert isinstance(strategy, LocalSGD)


def test_there_are_strategies():
    assert len(STRATEGIES) >= 10


def test_the_outer_optimizer_steps(tmp_path):
    path = tmp_path / "block.py"
    path.write_text(next(block for block in BLOCKS if "(torch.optim.Optimizer)" in block))
    outer = runpy.run_path(str(path))["SignSGD"]
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    rounds = Rounds(model, optimizer, 2, partial(outer, lr=0.75))
    for _ in range(2):  # 2 - 0.25 - 0.25 locally; the outer step is 0.75 in the same direction: 2 -> 1.25
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        rounds.step()
    assert model.weight.item() == 1.25


def test_every_option_of_a_sync_has_its_row():
    rows = re.findall(r"^ *\| `(\w+)=", SyncOptions.__doc__ or "", flags=re.MULTILINE)
    assert set(rows) == {field.name for field in dataclasses.fields(SyncOptions)}
