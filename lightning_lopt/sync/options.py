"""Options of a sync: the parts that are sent, the time in flight, and the merge rule."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lightning_lopt.comm import digest
from lightning_lopt.compression import Codec, as_codec
from lightning_lopt.functional.merge import MergeRule
from lightning_lopt.selection import Everything, RandomCoordinates, Selection

LocalState = Literal["keep", "reset", "average"]


@dataclass(frozen=True)
class SyncOptions:
    """Options of a sync; by default everything is sent at once, as it is.

    The last sync of a run sends everything, uncompressed and with nothing in flight, whatever the options are.

    Args:
        density: Share of the coordinates that a sync sends, in (0, 1]; they are drawn anew in every round.
        selection: `Fragments(...)` or any `Selection`, in place of a density.
        compression: `"bf16"`, `"int8"`, `TopK(...)` or any `Codec`, with error feedback; None for float32.
        overlap_steps: Number Q of the H local steps that are taken while the sync is in flight, 0 <= Q < H.
        merge: Rule that makes a worker's new parameters from the anchor a, its y at the launch and z at the finish:
            `"delay_corrected"` a + (z - y), `"overwrite"` a, or a number α in [0, 1] for α z + (1 - α) a. Without
            overlap y = z.
        local_state: Treatment of the local optimizer's state of the tensors that were sent: `"keep"`, `"reset"`, or
            `"average"` over the workers, which costs traffic.
        sharded: Whether each worker does the outer step of some of the tensors, holds the outer state of these alone,
            and sends the result to all. The traffic is that of an all-reduce, also where every worker's values are
            needed (LAgg-A).

    Raises:
        ValueError: An argument is out of its range, or two exclude each other.

    Example:
        >>> SyncOptions(density=0.1).effective_selection
        RandomCoordinates(density=0.1, seed=0)
    """

    density: float = 1.0
    selection: Selection | None = None
    compression: str | Codec | None = None
    overlap_steps: int = 0
    merge: MergeRule = "delay_corrected"
    local_state: LocalState = "keep"
    sharded: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.selection, type) or not hasattr(self.effective_selection, "pick"):
            raise ValueError(f"selection must be Fragments(...) or any Selection, not {self.selection!r}.")
        if self.selection is not None and self.density != 1:
            raise ValueError("density is short for selection=RandomCoordinates(density): give one of the two.")
        if isinstance(self.overlap_steps, bool) or not isinstance(self.overlap_steps, int) or self.overlap_steps < 0:
            raise ValueError(f"overlap_steps must be an integer >= 0, not {self.overlap_steps!r}.")
        if self.merge not in ("delay_corrected", "overwrite") and not (
            isinstance(self.merge, int | float) and 0 <= self.merge <= 1
        ):
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
        _ = self.effective_selection, self.codec  # their errors, here

    @property
    def fingerprint(self) -> int:
        """An integer that differs for other options; for custom classes, only if their `repr` does."""
        return digest(re.sub(r" at 0x[0-9a-f]+", "", repr(self)))

    @property
    def effective_selection(self) -> Selection:
        """The selection that `selection` or `density` stands for."""
        return self.selection or (Everything() if self.density == 1 else RandomCoordinates(self.density))

    @property
    def codec(self) -> Codec | None:
        """The codec that `compression` stands for, None for none."""
        return as_codec(self.compression)

    @property
    def leaves_common_weights(self) -> bool:
        """Whether all workers hold the same weights after a sync of which nothing was in flight."""
        return not self.effective_selection.partial and isinstance(self.merge, str)
