"""One synchronisation of the workers: the merge rule that every method here shares."""

from lightning_lopt.sync.sync import Sync

__all__ = ["Sync"]
