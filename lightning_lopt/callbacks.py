"""RoundMonitor: what `LearningRateMonitor` is for the learning rate."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_lopt.report import RoundReport
from lightning_lopt.rounds import Rounds
from lightning_lopt.strategies import LocalSGD


class RoundMonitor(Callback):
    """Log what each round did and cost, to every logger and the progress bar.

    Metrics, once per round: ``rounds/round`` (finished), ``rounds/local_steps``, ``rounds/bytes_sent`` (total of this
    worker; rank 0's holds the broadcast of the first weights too),
    ``rounds/sync_seconds``, ``rounds/transfer_seconds``, ``rounds/outer_seconds`` (of this round),
    ``rounds/sync_share`` (of the time since training began), ``rounds/pseudo_grad_norm``, ``rounds/drift`` (root mean
    square distance of the workers from their mean), ``rounds/fell_back`` (refused outer steps so far),
    ``rounds/left_out`` (workers that rounds left out, so far).

    Attributes:
        history: one dictionary of these metrics per round, with ``step``.

    Raises:
        MisconfigurationException: the trainer's strategy is not one of this package.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lopt import LocalSGD, RoundMonitor
        >>> trainer = Trainer(accelerator="cpu", strategy=LocalSGD(), callbacks=[RoundMonitor()], logger=False)
    """

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self._rounds: Rounds | None = None
        self._last: RoundReport | None = None
        self._start = 0.0
        self._sync_seconds = 0.0
        self._fell_back = 0
        self._left_out = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(trainer.strategy, LocalSGD):
            raise MisconfigurationException(
                f"RoundMonitor watches the rounds of this package's strategies, not {type(trainer.strategy).__name__}; "
                "pass e.g. Trainer(strategy=LearnedLocalSGD(...)) or leave the callback out."
            )
        self._rounds, self._last = trainer.strategy.rounds, None
        self._start = time.perf_counter()
        self._sync_seconds = 0.0

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._log_new_round(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_new_round(trainer, None)

    def _log_new_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule | None) -> None:
        rounds = self._rounds
        if rounds is None or rounds.last_report is self._last:
            return
        report = self._last = rounds.last_report
        assert report is not None
        self._sync_seconds += report.sync_seconds
        self._fell_back += report.fell_back
        self._left_out += report.left_out
        elapsed = time.perf_counter() - self._start
        metrics = {
            "rounds/round": float(rounds.round_idx),
            "rounds/local_steps": float(report.local_steps),
            "rounds/bytes_sent": float(rounds.comm.bytes_sent),
            "rounds/sync_seconds": report.sync_seconds,
            "rounds/transfer_seconds": report.transfer_seconds,
            "rounds/outer_seconds": report.outer_seconds,
            "rounds/sync_share": self._sync_seconds / elapsed,
            "rounds/pseudo_grad_norm": report.pseudo_grad_norm,
            "rounds/drift": report.drift,
            "rounds/fell_back": float(self._fell_back),
            "rounds/left_out": float(self._left_out),
        }
        self.history.append({"step": float(trainer.global_step), **metrics})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if pl_module is not None and trainer.progress_bar_callback is not None:
            pl_module.log("round", metrics["rounds/round"], prog_bar=True, logger=False, rank_zero_only=True)
            pl_module.log(
                "sent_MB", metrics["rounds/bytes_sent"] / 1e6, prog_bar=True, logger=False, rank_zero_only=True
            )
