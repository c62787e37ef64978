"""Access of a callback to the rounds of the Trainer's strategy."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from lightning_lopt.strategies import LocalSGD
from lightning_lopt.strategies.virtual import ProcessRounds


def rounds_of(trainer: pl.Trainer, callback: Callback) -> ProcessRounds:
    """Return the rounds of the Trainer's strategy.

    Args:
        trainer: Trainer in a fit.
        callback: Callback that needs them.

    Raises:
        MisconfigurationException: It has none.
    """
    if not isinstance(trainer.strategy, LocalSGD) or trainer.strategy.rounds is None:
        raise MisconfigurationException(
            f"{type(callback).__name__} needs a strategy of lightning_lopt, not {type(trainer.strategy).__name__}: "
            "pass Trainer(strategy=LearnedLocalSGD(...)), for example, or leave the callback out."
        )
    return trainer.strategy.rounds
