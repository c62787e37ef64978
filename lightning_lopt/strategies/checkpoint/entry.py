"""The entry of this package in a checkpoint, and the versions of its layout.

| key | value |
|---|---|
| `version` | version of this layout |
| `num_workers` | K |
| `num_parts` | number of parts: one per process or virtual worker, so several per worker with `ranks_per_worker` |
| `given` | settings of local optimizers and learning rate schedules as the script gave them, as texts |
| `islands` | whether the ranks of a worker share a model |
| `rounds` | state that all workers share (`Rounds.state_dict`): counters, anchors, outer state; empty with islands |
| `parts` | list of the states that single processes or virtual workers have for themselves, while they are small |
| `files` | `{"token": ...}` where each part lies in a file of its own beside the checkpoint |

After an exception there are neither parts nor files. A part has the entries `checkpoint` (those of Lightning's entries
that differ between workers), `local` (`Rounds.local_state`), `random`, `gradients` and `loaders`. That of a rank that
shares a model also has `rounds`, of what the rank holds, and its `layout`; states of optimizers are then local shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_lopt.strategies.errors import CheckpointError
from lightning_lopt.sync.settings import describe

CHECKPOINT_KEY = "lightning_lopt"
CHECKPOINT_VERSION = 9
DERIVED = ("params", "param_names", "initial_lr", "base_lrs", "last_epoch")  # no settings, or those of others
READ_BY = {8: "0.1"}  # releases that resume from the layouts before


def new_entry(
    num_workers: int, num_parts: int, given: dict[str, str], rounds: dict[str, Any], *, islands: bool
) -> dict[str, Any]:
    """Return an entry to which parts or files are yet to be added.

    Args:
        num_workers: K.
        num_parts: Number of parts, of all processes together.
        given: Result of `given_settings`.
        rounds: State that all workers share.
        islands: Whether the ranks of a worker share a model.
    """
    return {
        "version": CHECKPOINT_VERSION,
        "num_workers": num_workers,
        "num_parts": num_parts,
        "given": given,
        "islands": islands,
        "rounds": rounds,
        "parts": None,
        "files": None,
    }


def given_settings(optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> dict[str, str]:
    """Return the settings of new local optimizers and learning rate schedules, by names for a message.

    Args:
        optimizers: Local optimizers, as the script made them.
        schedulers: Their learning rate schedules, likewise.
    """
    given = {}
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            place = f" of group {j}" * (len(optimizer.param_groups) > 1) + f" of optimizer {i}" * (len(optimizers) > 1)
            settings = {name: value for name, value in group.items() if name not in DERIVED}
            given |= {f"{type(optimizer).__name__} {k}{place}": v for k, v in describe(settings).items()}
    for i, scheduler in enumerate(schedulers):
        place = f" of schedule {i}" * (len(schedulers) > 1)
        state = {k: v for k, v in scheduler.state_dict().items() if k not in DERIVED and not k.startswith("_")}
        given |= {f"{type(scheduler).__name__} {k}{place}": v for k, v in describe(state).items()}
    return given


def check_version(entry: Mapping[str, Any]) -> None:
    """Refuse an entry whose layout this release does not read.

    Raises:
        CheckpointError: The layout is older or newer; the error names the release that reads it.
    """
    version = entry.get("version")
    if version == CHECKPOINT_VERSION:
        return
    if isinstance(version, int) and version > CHECKPOINT_VERSION:
        reader = "a newer release of lightning_lopt"
    else:
        reader = f"lightning_lopt {READ_BY[version]}.x" if version in READ_BY else "the release that wrote it"
    raise CheckpointError(
        f"The workers' states in this checkpoint have layout {version}, and this release reads {CHECKPOINT_VERSION}. "
        f"Resume with {reader}, or begin anew from the weights, which any release reads: load_from_checkpoint. "
        "Validation, test and prediction take the checkpoint as it is."
    )


def required(state: Mapping[str, Any], name: str) -> Any:
    """Return a value without which a run cannot go on.

    Args:
        state: Entry of a checkpoint, or a part of it.
        name: Name of the value.

    Raises:
        CheckpointError: There is no such value.
    """
    if name not in state:
        raise CheckpointError(
            f"The checkpoint has no {name!r} among its {sorted(map(str, state))}: it was changed after it was written. "
            "Begin anew from its weights: load_from_checkpoint."
        )
    return state[name]
