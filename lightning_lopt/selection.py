"""Selection of the coordinates that a sync sends: everything, random ones, or tensors in turn."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from lightning_lopt.functional.balance import least_loaded
from lightning_lopt.functional.integers import as_integer, as_number
from lightning_lopt.functional.subset import shared_indices


class Selection(Protocol):
    """Rule for the coordinates that a sync sends, the same on all workers without communication.

    A selection is shared by virtual workers and remembers nothing: the round alone decides. Give it a `repr` with its
    settings, as a dataclass has: workers compare it, and a resume says if it has changed.

    Attributes:
        num_turns: Number of syncs that `local_steps` are divided into; more than one if parts take turns.
        whole_tensors: Whether a tensor is sent as a whole or not at all.
        partial: Whether a sync leaves anything out.

    Example:
        >>> class LargestRarely:  # SyncOptions(selection=LargestRarely())
        ...     "The largest tensor, often an embedding, in every fourth round."
        ...     num_turns, whole_tensors, partial = 1, True, True
        ...     def pick(self, sizes, round_idx):
        ...         return [size < max(sizes) or round_idx % 4 == 0 for size in sizes]
        >>> [LargestRarely().pick([9, 2, 3], round_idx) for round_idx in (0, 1)]
        [[True, True, True], [False, True, True]]
    """

    @property
    def num_turns(self) -> int: ...
    @property
    def whole_tensors(self) -> bool: ...
    @property
    def partial(self) -> bool: ...

    def pick(self, sizes: Sequence[int], round_idx: int) -> list[bool | Tensor]:
        """Choose the coordinates to send.

        Args:
            sizes: Number of coordinates of each parameter in training, in the order of the local optimizer's groups.
            round_idx: Index of the round.

        Returns:
            For each tensor whether it is sent, or the ascending flat indices of the coordinates that are, int64 [n].
        """
        ...


@dataclass(frozen=True)
class Everything:
    """All coordinates in every sync.

    Example:
        >>> Everything().pick([4, 2], round_idx=0)
        [True, True]
    """

    num_turns = 1
    whole_tensors = True
    partial = False

    def pick(self, sizes: Sequence[int], round_idx: int) -> list[bool | Tensor]:
        return [True] * len(sizes)


@dataclass(frozen=True)
class RandomCoordinates:
    """Uniformly random coordinates, others in every round; each worker draws the same ones from the shared seed.

    Args:
        density: Share of all coordinates, in (0, 1].
        seed: Seed of the draws, the same on all workers.

    Raises:
        ValueError: `density` is outside (0, 1].

    Memory: 8 bytes per coordinate that is sent, for its index. Sends density × 2(K-1)/K × 4 bytes per parameter and
    round. Fails when workers drift apart on what is seldom sent.

    Source: arXiv 2605.20866 (LOSCAR-SGD); SPARTA.

    Example:
        >>> [len(index) for index in RandomCoordinates(0.5).pick([1, 7], round_idx=0)]
        [0, 4]
    """

    density: float
    seed: int = 0

    num_turns = 1
    whole_tensors = False
    partial = True

    def __post_init__(self) -> None:
        if not 0 < as_number(self.density) <= 1:
            raise ValueError(f"density must be in (0, 1], the share of the coordinates to send, not {self.density!r}.")

    def pick(self, sizes: Sequence[int], round_idx: int) -> list[bool | Tensor]:
        total = sum(sizes)
        index = shared_indices(total, max(1, round(self.density * total)), self.seed, round_idx)
        starts = [0, *accumulate(sizes)]
        bounds = torch.searchsorted(index, torch.tensor(starts)).tolist()
        return [index[low:high] - start for (low, high), start in zip(pairwise(bounds), starts, strict=False)]


@dataclass(frozen=True)
class Fragments:
    """Groups of whole tensors in turn, of about equal size: the traffic is the same, its peaks are lower.

    `local_steps` are a fragment's own period: with 4 fragments and H = 100 there is a sync every 25 steps.

    Args:
        num_fragments: Number of groups P >= 1, at most the number of tensors; 4 is a start.

    Raises:
        ValueError: `num_fragments` is not an integer >= 1, or there are fewer tensors.

    Memory: none. Sends 1/P × 2(K-1)/K × 4 bytes per parameter in each of its P syncs. Fails with one tensor that is
    most of the model, whose turn sends as much as everything, and with P so large that H/P steps hide no transfer.

    Source: arXiv 2501.18512 (streaming DiLoCo).

    Example:
        >>> fragments = Fragments(2)
        >>> fragments.pick([5, 4, 2], round_idx=0), fragments.pick([5, 4, 2], round_idx=1)
        ([True, False, False], [False, True, True])
    """

    num_fragments: int

    def __post_init__(self) -> None:
        num_fragments = as_integer(self.num_fragments, least=1)
        if num_fragments is None:
            raise ValueError(f"num_fragments must be an integer >= 1, not {self.num_fragments!r}.")
        object.__setattr__(self, "num_fragments", num_fragments)

    whole_tensors = True

    @property
    def num_turns(self) -> int:
        return self.num_fragments

    @property
    def partial(self) -> bool:
        return self.num_fragments > 1

    def pick(self, sizes: Sequence[int], round_idx: int) -> list[bool | Tensor]:
        if len(sizes) < self.num_fragments:
            raise ValueError(f"{len(sizes)} tensors cannot make {self.num_fragments} fragments; use fewer.")
        owners = least_loaded(sizes, [0] * self.num_fragments)
        return [owner == round_idx % self.num_fragments for owner in owners]


def drawn_ahead(selection: Selection) -> Selection:
    """Wrap a selection so that random coordinates of the next round are drawn before this one ends.

    Example:
        >>> ahead = drawn_ahead(RandomCoordinates(0.5))
        >>> [[len(index) for index in ahead.pick([1, 7], round_idx)] for round_idx in (0, 1, 0)]
        [[0, 4], [1, 3], [0, 4]]
    """
    return _DrawnAhead(selection) if isinstance(selection, RandomCoordinates) else selection


class _DrawnAhead:
    """`RandomCoordinates` that are drawn by a thread, one round ahead.

    Drawing 10 % of 86 million coordinates takes a core 0.3 s, for which no sync should wait. The indices of the next
    round are held meanwhile, 8 bytes for each.
    """

    num_turns = 1
    whole_tensors = False
    partial = True

    def __init__(self, selection: RandomCoordinates) -> None:
        self._selection = selection
        self._thread = ThreadPoolExecutor(1, "draw")
        self._next: tuple[list[int], int, Future[list[bool | Tensor]]] | None = None

    def pick(self, sizes: Sequence[int], round_idx: int) -> list[bool | Tensor]:
        if self._next is not None and self._next[:2] == ([*sizes], round_idx):
            choice = self._next[2].result()
        else:  # the first, or one that was not foreseen
            choice = self._selection.pick(sizes, round_idx)
        following = self._thread.submit(self._selection.pick, [*sizes], round_idx + 1)
        self._next = [*sizes], round_idx + 1, following
        return choice
