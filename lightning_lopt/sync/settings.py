"""Settings that a script gives, as checkpoints record them, to find out after a resume which have changed.

One rule for all: the state of a run is the checkpoint's. A setting that the script has changed since the checkpoint was
written is the script's, and a warning names it; one that it has not is the checkpoint's, where an optimizer or a
schedule may have changed it in the meantime.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def describe(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as texts that a checkpoint can hold, and that differ for settings that do.

    Two objects of a custom class differ if their `repr` does.

    Example:
        >>> describe({"lr": 0.7, "merge": "overwrite"})
        {'lr': '0.7', 'merge': "'overwrite'"}
    """
    return {name: _text(value) for name, value in settings.items()}


def changed(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of the settings that both have, with other texts.

    Example:
        >>> changed({"lr": "0.7", "old": "1"}, {"lr": "0.5", "new": "2"})
        ['lr']
    """
    return [name for name, text in now.items() if saved.get(name, text) != text]


def changes(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return a phrase for each setting that has changed.

    Example:
        >>> changes({"lr": "0.7"}, {"lr": "0.5"})
        ['lr 0.7 -> 0.5']
    """
    return [f"{name} {saved[name]} -> {now[name]}" for name in changed(saved, now)]


def warn_of_changes(phrases: Sequence[str]) -> None:
    """Say which settings of the script hold in place of the checkpoint's, if there are any.

    Args:
        phrases: One phrase per setting, as `changes` returns them.
    """
    if phrases:
        warnings.warn(
            f"Changed since the checkpoint was written, and from now on as in the script: {', '.join(phrases)}.",
            stacklevel=3,
        )


def _text(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
