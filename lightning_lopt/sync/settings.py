"""Settings of the script as a checkpoint records them, and which of them have changed at a resume.

One rule holds for all. If the script gives another value than when the checkpoint was written, the script's value
holds, and a warning names it. If it gives the same, the checkpoint's present value holds, which an optimizer or a
schedule may have changed during training.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def describe(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as texts, for a checkpoint; different settings have different texts.

    Two objects of a custom class count as different if their `repr` differs.

    Example:
        >>> describe({"lr": 0.7, "merge": "overwrite"})
        {'lr': '0.7', 'merge': "'overwrite'"}
    """
    return {name: _text(value) for name, value in settings.items()}


def changed(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of the settings that both have with different texts.

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
    """Warn of the settings of the script that replace those of the checkpoint, if there are any.

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
