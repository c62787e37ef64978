"""The README's Python blocks run as they stand."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.processes import run_command

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


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
