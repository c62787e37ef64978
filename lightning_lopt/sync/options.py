"""Options of a sync: the parts that are sent, the time in flight, and the merge rule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_lopt.comm import digest
from lightning_lopt.compression import Codec, LinearCodec, as_codec
from lightning_lopt.functional.integers import as_integer, as_number
from lightning_lopt.functional.merge import MergeRule
from lightning_lopt.selection import Everything, RandomCoordinates, Selection
from lightning_lopt.sync.rules import Rule, check_rules

LocalState = Literal["keep", "reset", "average"]


@dataclass(frozen=True)
class SyncOptions:
    """Options of a sync; by default everything is sent at once, as it is.

    The options combine with one another and with any outer optimizer, but for these: a `density` excludes outer
    optimizers with statistics of whole tensors and a `local_state` other than `"keep"`; `PowerSGD` excludes a `density`
    and a network with K inputs; `sharded=True` excludes `compression`; `local_state="average"` excludes
    `overlap_steps`.

    By default a sync sends 4r bytes per parameter, where r = 2(K-1)/K is the factor of a ring all-reduce among K
    workers, plus the buffers that changed. The table says what each option sends instead and the memory that it adds,
    both in bytes per parameter, and when it fails:

    | option                    | sent                  | memory             | fails when                             |
    |---------------------------|-----------------------|--------------------|----------------------------------------|
    | `density=0.1`             | density × 4r          | 8 × density        | workers drift on what is seldom sent   |
    | `selection=Fragments(4)`  | 4r/4, every H/4 steps |                    | a common model is needed between syncs |
    | `compression="bf16"`      | 2r                    | 4                  |                                        |
    | `compression="int8"`      | r                     | 4                  | huge coordinates coarsen others        |
    | `compression=TopK(0.02)`  | (K-1) × 0.02 × 6      | 4                  | K is large: all codes are gathered     |
    | `compression=PowerSGD(4)` | 4r × 4 (n + m) / nm ¹ | 4 + 16/n ¹         | updates have a high rank               |
    | `overlap_steps=16`        |                       | 8 × what is sent ² | more than half of H is in flight       |
    | `merge="overwrite"`       |                       |                    | many steps in flight, which are lost   |
    | `local_state="average"`   | 4r more per momentum  |                    | the link is slow                       |
    | `sharded=True`            | 4r                    | outer state / K    | a tensor exceeds 1/K of the model      |
    | `sync_rules={...}`        | nothing if `"local"`  |                    | a rule does not suit the tensor's use  |

    ¹ For matrices of n rows and m columns.
    ² While the sync is in flight; 12 × what is sent if it is compressed.

    A network with K inputs (LAgg-A) needs every worker's pseudo-gradient. It gathers them, 4(K-1) bytes per parameter,
    2 or 1 times (K-1) if compressed; with `sharded=True` it sends the bytes of an all-reduce.

    * `density` draws other coordinates in each round, from a seed that all workers share; an outer optimizer steps
      these alone. It is not for optimizers with statistics of whole tensors: `LearnedOptimizer`, `BlendedNesterov`,
      Adafactor.
    * `overlap_steps` are the last of the H local steps. `sharded=True` lets them hide the first half of the traffic
      only. A constant H that leaves no step before them is refused; where a schedule gives such an H, the last H - 1
      steps overlap.
    * `merge="delay_corrected"` keeps the steps that are taken while the sync is in flight.
    * With `sharded=True`, the largest of 8 shares is 1.04 times the mean share with ViT-B/16, and 2.5 times with GPT-2,
      because of its embedding (examples/records/2026-11-22_shares).
    * The last sync of a run sends everything, uncompressed and with nothing in flight, whatever the options are. Where
      syncs send only a part, validation and checkpoints see the workers' mean by default.

    Args:
        density: Share of the coordinates that a sync sends, in (0, 1]; they are drawn anew in every round.
        selection: `Fragments(...)` or any `Selection`, in place of a density.
        compression: `"bf16"`, `"int8"`, `TopK(...)`, `PowerSGD(...)`, or any `Codec` or `LinearCodec`, with error
            feedback; None for float32.
        overlap_steps: Number Q of the H local steps that are taken while the sync is in flight, 0 <= Q < H.
        merge: Rule that makes a worker's new parameters from the anchor a, its y at the launch and z at the finish:
            `"delay_corrected"` a + (z - y), `"overwrite"` a, or a number α in [0, 1] for α z + (1 - α) a. Without
            overlap y = z.
        local_state: Treatment of the local optimizer's state of the tensors that were sent: `"keep"`, `"reset"`, or
            `"average"` over the workers, which costs traffic.
        sharded: Whether each worker does the outer step of some of the tensors, holds the outer state of these alone,
            and sends the result to all. The traffic is that of an all-reduce, also where every worker's values are
            needed (LAgg-A).
        sync_rules: Rules for tensors by glob pattern of their full names (`"*queue"`), in place of the defaults of
            *State* in `LocalSGD`: `"mean"`, `"unit_mean"` (scaled to norm 1), `"max"`, `"min"`, `"sum_of_changes"`
            (for counts), `"first"` (rank 0's) or `"local"` (each worker keeps its own); the first pattern that fits
            holds. Parameters in training are `"mean"` or `"local"`.

    Raises:
        ValueError: An argument is out of its range, or two exclude each other.

    Example:
        >>> SyncOptions(density=0.1).effective_selection
        RandomCoordinates(density=0.1, seed=0)
    """

    density: float = 1.0
    selection: Selection | None = None
    compression: str | Codec | LinearCodec | None = None
    overlap_steps: int = 0
    merge: MergeRule = "delay_corrected"
    local_state: LocalState = "keep"
    sharded: bool = False
    sync_rules: Mapping[str, Rule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = ("pick", "num_turns", "whole_tensors", "partial")
        missing = [name for name in names if not hasattr(self.effective_selection, name)]
        if isinstance(self.selection, type) or missing:
            lacks = f", which lacks {' and '.join(missing)}" if 0 < len(missing) < len(names) else ""
            raise ValueError(
                "selection must be Fragments(...), RandomCoordinates(...) or any Selection (an object with pick, "
                f"num_turns, whole_tensors and partial), not {self.selection!r}{lacks}."
            )
        if as_integer(self.effective_selection.num_turns, least=1) is None:
            raise ValueError(f"num_turns of {self.selection!r} must be an integer >= 1.")
        if self.selection is not None and self.density != 1:
            raise ValueError("density is short for selection=RandomCoordinates(density): give one of the two.")
        overlap_steps = as_integer(self.overlap_steps, least=0)
        if overlap_steps is None:
            raise ValueError(f"overlap_steps must be an integer >= 0, not {self.overlap_steps!r}.")
        object.__setattr__(self, "overlap_steps", overlap_steps)
        number = isinstance(self.merge, int | float) and not isinstance(self.merge, bool)
        if self.merge not in ("delay_corrected", "overwrite") and not (number and 0 <= float(self.merge) <= 1):
            raise ValueError(f"merge must be 'delay_corrected', 'overwrite' or a number in [0, 1], not {self.merge!r}.")
        if self.merge == "overwrite" and not self.overlap_steps:
            raise ValueError(
                "merge='overwrite' drops the steps taken while a sync is in flight; without overlap_steps there are "
                "none: give overlap_steps >= 1, or leave merge out."
            )
        if self.local_state not in ("keep", "reset", "average"):
            raise ValueError(f"local_state must be 'keep', 'reset' or 'average', not {self.local_state!r}.")
        if self.local_state != "keep" and not self.effective_selection.whole_tensors:
            raise ValueError(
                f"local_state={self.local_state!r} needs whole tensors: a state in which only some coordinates were "
                "changed would not fit its step count. Use local_state='keep' with random coordinates."
            )
        if self.local_state == "average" and self.overlap_steps:
            raise ValueError(
                "local_state='average' excludes overlap_steps: a mean from before the overlap would undo the steps "
                "in between, and correcting a second moment for the delay can make it negative."
            )
        if self.sharded and self.compression is not None:
            raise ValueError(
                "sharded=True excludes compression: the owners of tensors send the results of their outer steps, and "
                "an error in these would be in the anchor, where no error feedback reaches it."
            )
        if self.sends_means_alone and not self.effective_selection.whole_tensors:
            raise ValueError(
                f"compression={self.compression!r} needs whole tensors: random coordinates of a matrix are no matrix, "
                "and others in each round. Use it without density, or with selection=Fragments(...); TopK(...) and "
                "'int8' compress random coordinates, too."
            )
        check_rules(self.sync_rules)

    @property
    def fingerprint(self) -> int:
        """An integer that differs for other options; for custom classes, only if their `repr` does."""
        return digest(re.sub(r" at 0x[0-9a-f]+", "", repr(self)))

    @property
    def effective_selection(self) -> Selection:
        """The selection that `selection` or `density` stands for."""
        if self.selection is not None:
            return self.selection
        return Everything() if as_number(self.density) == 1 else RandomCoordinates(self.density)

    @property
    def codec(self) -> Codec | LinearCodec | None:
        """The codec that `compression` stands for, None for none."""
        return as_codec(self.compression)

    @property
    def sends_means_alone(self) -> bool:
        """Whether no worker's own values can be had from a sync, since a `LinearCodec` compresses it."""
        return isinstance(self.codec, LinearCodec)

    @property
    def leaves_common_weights(self) -> bool:
        """Whether all workers hold the same weights after a sync of which nothing was in flight."""
        return not self.effective_selection.partial and isinstance(self.merge, str)
