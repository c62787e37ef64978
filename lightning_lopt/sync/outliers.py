"""What watches over the syncs: who was left out, and whether the workers still have the same anchors."""

from __future__ import annotations

import math
import warnings

from lightning_lopt.comm import Communicator
from lightning_lopt.functional.outliers import FACTOR, Norms
from lightning_lopt.sync.anchors import AnchoredParameters
from lightning_lopt.sync.exchange import Exchange

CHECK_EVERY = 100  # syncs


class Guard:
    """The memory that `outliers` needs, a warning once, and when to compare the anchors.

    Args:
        comm: the collectives.
        parameters: with the anchors.

    Attributes:
        norms: of the pseudo-gradients that syncs took the mean of.
    """

    def __init__(self, comm: Communicator, parameters: AnchoredParameters) -> None:
        self._comm, self._parameters = comm, parameters
        self._num_checksums = 0
        self._warned = False
        self.norms = Norms()

    def checksum(self) -> int:
        """What workers with the same anchors agree on; computed in the first two syncs and two of each `CHECK_EVERY`.

        Two in a row: one sees what was there, the next what an outer step made of it.
        """
        due = self._num_checksums % CHECK_EVERY < 2
        self._num_checksums += 1
        return self._parameters.checksum() if due else 0

    def see(self, exchange: Exchange, round_idx: int) -> None:
        """Remember the norms of a sync; on rank 0 say, once, whom it left out."""
        if not exchange.skipped:
            self.norms = self.norms.then(exchange.kept_norms)
        if exchange.left_out and self._comm.rank == 0 and not self._warned:
            self._warned = True
            warnings.warn(_explanation(exchange, round_idx), stacklevel=3)


def _explanation(exchange: Exchange, round_idx: int) -> str:
    norms = [f"{norm:.3g}" if math.isfinite(norm) else "not finite" for norm in exchange.told.norms]
    who = ", ".join(f"worker {k} ({norms[k]})" for k in exchange.left_out)
    kept = f", the others' up to {max(exchange.kept_norms):.3g}" if exchange.kept_norms else ""
    return (
        f"Round {round_idx} {'is skipped: it ' * exchange.skipped}leaves out {who}; in brackets the norm of the "
        f"pseudo-gradient{kept}. One that is not finite, or over {FACTOR:g} times the median and all that recent "
        "rounds took, is of a worker that has diverged. It goes on from the global weights and forgets its local "
        "optimizer's state and what compression had not sent. If it happens often (RoundMonitor logs rounds/left_out; "
        "this is said once), lower the local learning rate, clip gradients, or look at that worker's data."
    )
