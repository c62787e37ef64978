"""Monitor of rounds: their effects and costs in the logs, and a summary at the end."""

from __future__ import annotations

import time
from os import PathLike
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_lopt.callbacks.access import rounds_of
from lightning_lopt.callbacks.summary import draw, summarize
from lightning_lopt.sync.report import RoundReport


class RoundMonitor(Callback):
    """Log the effects and costs of each round to every logger, two of them to the progress bar; sum them up at the end.

    Metrics, once per round; totals are those since this fit began, also where it goes on from a checkpoint:

    * ``rounds/round``: rounds finished, in the whole run.
    * ``rounds/workers``: number of workers K in the round.
    * ``rounds/local_steps``: local steps of this worker in the round.
    * ``rounds/bytes_sent``: total of this rank, with the messages by which workers agree on what comes next; rank
      0's includes the broadcast of the first weights.
    * ``rounds/seconds``: from the end of the round before, or the start of the fit, to the end of this one.
    * ``rounds/sync_seconds``, ``rounds/transfer_seconds``, ``rounds/outer_seconds``: of this round.
    * ``rounds/waited_seconds``: the part of the transfer beside which no local step ran.
    * ``rounds/sync_share``: share of all syncs in the time since this fit began.
    * ``rounds/pseudo_grad_norm``: norm of the averaged pseudo-gradient.
    * ``rounds/drift``: root mean square distance of the workers from their mean, see `RoundReport`. It grows with H and
      with the learning rate, and its square with the number of coordinates that a sync sends: compare rounds, or runs,
      in which these are equal.
    * ``rounds/fell_back``: total of refused outer steps.
    * ``rounds/left_out``: total of workers that rounds left out.

    The progress bar shows ``round`` and ``sent_MB`` (``rounds/bytes_sent`` in units of 10⁶ bytes). The summary,
    printed when `fit` ends, says what was sent, what DDP would have sent, the share of the time in syncs, the drift,
    and one line of advice: whether H could be larger or smaller, or the local learning rate is near the largest that
    trains.

    Args:
        plot: File for a plot of norms, bytes, times and H over the rounds of the fit, drawn when it ends, such as
            ``"rounds.png"``. Needs matplotlib, which the extra `examples` installs.

    Attributes:
        history: One dictionary of these metrics per round, with ``step``, over all fits with this callback.

    Raises:
        MisconfigurationException: The Trainer's strategy is not one of this package.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lopt import LocalSGD, RoundMonitor
        >>> trainer = Trainer(accelerator="cpu", strategy=LocalSGD(), callbacks=[RoundMonitor()], logger=False)
    """

    def __init__(self, plot: str | PathLike[str] | None = None) -> None:
        self.history: list[dict[str, float]] = []
        if plot is not None:
            import matplotlib  # an extra; better missed now than when training is over  # noqa: F401
        self._plot = None if plot is None else Path(plot)
        self._new: list[tuple[RoundReport, int, float]] = []  # with the bytes sent and the time by then
        self._first = 0  # round of this fit in the history
        self._start = self._end_of_last = 0.0
        self._sync_seconds = 0.0
        self._fell_back = 0
        self._left_out = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rounds = rounds_of(trainer, self)
        rounds.listeners.append(lambda report: self._new.append((report, rounds.comm.bytes_sent, time.perf_counter())))
        self._new, self._first = [], len(self.history)
        self._start = self._end_of_last = time.perf_counter()
        self._sync_seconds = 0.0
        self._fell_back = self._left_out = 0

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._log_new_rounds(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_new_rounds(trainer, None)  # rounds of others, for whom this worker has waited

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log_new_rounds(trainer, None)
        rounds, history = rounds_of(trainer, self), self.history[self._first :]
        if history and trainer.is_global_zero:
            replica = rounds.sync.replica
            held = sum(p.param.numel() * p.param.element_size() for p in replica.trained())
            gradient_bytes = held / rounds.comm.ranks_sharing
            num_workers = int(max(row["rounds/workers"] for row in history))
            rank_zero_info(summarize(history, gradient_bytes, num_workers))
            if self._plot is not None:
                try:
                    draw(history, gradient_bytes, num_workers, self._plot)
                except (OSError, ValueError) as error:  # a full disk, an unknown format
                    rank_zero_warn(f"{self._plot} was not drawn: {error}")

    def _log_new_rounds(self, trainer: pl.Trainer, pl_module: pl.LightningModule | None) -> None:
        new, self._new = self._new, []
        for report, bytes_sent, end in new:
            self._log(trainer, pl_module, report, bytes_sent, end - self._end_of_last)
            self._end_of_last = end

    def _log(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule | None,
        report: RoundReport,
        bytes_sent: int,
        seconds: float,
    ) -> None:
        self._sync_seconds += report.sync_seconds
        self._fell_back += report.fell_back
        self._left_out += report.left_out
        elapsed = time.perf_counter() - self._start
        metrics = {
            "rounds/round": float(report.round_idx + 1),
            "rounds/workers": float(len(report.workers) + report.left_out),
            "rounds/local_steps": float(report.local_steps),
            "rounds/bytes_sent": float(bytes_sent),
            "rounds/seconds": seconds,
            "rounds/sync_seconds": report.sync_seconds,
            "rounds/transfer_seconds": report.transfer_seconds,
            "rounds/waited_seconds": report.waited_seconds,
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
