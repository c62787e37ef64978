"""Fixtures and helpers shared by all tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def vectors():
    """Loads a file of golden numbers made by other people's code."""

    def load(name: str):
        path = SHARED / "vectors" / name
        if not path.exists():
            pytest.skip(f"golden numbers are not here: {path}")
        return np.load(path)

    return load
