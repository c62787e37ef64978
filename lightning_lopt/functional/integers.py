"""Integers and other numbers in arguments."""

from __future__ import annotations

import math
import operator
from contextlib import suppress
from typing import Any


def as_integer(value: Any, *, least: int) -> int | None:
    """Return an integer of any type, NumPy's and torch's included, as an `int`.

    Args:
        value: Argument to convert; booleans are not integers.
        least: Smallest integer that is allowed.

    Returns:
        The integer; None if the argument is not one, or too small.

    Example:
        >>> as_integer(4, least=1), as_integer(0, least=1), as_integer(True, least=1), as_integer(4.0, least=1)
        (4, None, None, None)
    """
    with suppress(TypeError):
        integer = operator.index(value)
        return None if isinstance(value, bool) or integer < least else integer
    return None


def as_number(value: Any) -> float:
    """Return a real number of any type, NumPy's and torch's included, as a `float`; NaN for anything else.

    NaN is in no range, so that whoever checks a range refuses text, too.

    Example:
        >>> as_number(4), as_number("4"), as_number(True)
        (4.0, nan, nan)
    """
    if not isinstance(value, bool | str | bytes):
        with suppress(TypeError, ValueError, RuntimeError):
            return float(value)
    return math.nan
