"""One line about what a strategy will do: its repr."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch

from lightning_lopt.optim.outer import OuterFactory, read_contract
from lightning_lopt.schedules import Constant, Schedule
from lightning_lopt.sync.options import SyncOptions

LONG = 60  # characters of a setting that are not shown
PARAMETERS = 1e8  # of a model whose bytes are counted; the few that do not grow with it do not show


def describe(
    name: str, num_workers: int, schedule: Schedule, outer_optimizer: OuterFactory | None, options: SyncOptions
) -> str:
    """Describe workers, rounds, outer step, options that are not the defaults, and bytes.

    Args:
        name: Name of the class.
        num_workers: Number of workers, K, or 0 before it is known.
        schedule: Schedule of H.
        outer_optimizer: Function that makes the outer optimizer, None for the mean.
        options: Options of the syncs.

    Example:
        >>> describe("DiLoCo", 2, Constant(16), partial(torch.optim.SGD, lr=0.7), SyncOptions(compression="int8"))
        "DiLoCo(K=2, H=16, outer_optimizer=SGD(lr=0.7), compression='int8', sends 1 B/param/round)"
    """
    default = SyncOptions()
    settings = {f.name: getattr(options, f.name) for f in fields(SyncOptions)}
    parts = [
        f"K={num_workers}" if num_workers else "",
        f"H={schedule.local_steps if isinstance(schedule, Constant) else _short(schedule)}",
        f"outer_optimizer={_call(outer_optimizer)}" if outer_optimizer else "",
        *(f"{key}={_short(value)}" for key, value in settings.items() if value != getattr(default, key)),
        _bytes(num_workers, outer_optimizer, options) if num_workers else "",
    ]
    return f"{name}({', '.join(filter(None, parts))})"


def _bytes(num_workers: int, outer_optimizer: OuterFactory | None, options: SyncOptions) -> str:
    from lightning_lopt.costs import sync_round  # a command, too, which the package must not have imported

    if options.sends_means_alone:
        return ""  # they depend on the shapes
    contract = read_contract(outer_optimizer([{"params": [torch.zeros(2, 3)]}])) if outer_optimizer else None
    gather = contract is not None and contract.needs_worker_grads
    a_round = sync_round(options, options.overlap_steps + 1, PARAMETERS, num_workers, worker_grads=gather)
    return f"sends {a_round.bytes_sent / PARAMETERS:.3g} B/param/round"


def _call(factory: Callable[..., Any]) -> str:
    if isinstance(factory, partial):
        settings = [*map(_short, factory.args), *(f"{key}={_short(value)}" for key, value in factory.keywords.items())]
        return f"{_name(factory.func)}({', '.join(settings)})"
    return _name(factory)


def _name(thing: Callable[..., Any]) -> str:
    return getattr(thing, "__name__", type(thing).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    long = len(text) > LONG or "\n" in text or " at 0x" in text
    return f"{_name(value) if callable(value) else type(value).__name__}(…)" if long else text
