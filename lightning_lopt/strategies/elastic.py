"""A Trainer as one of the workers that come and go: where it is in the run, and how it begins and ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_lopt.comm import Communicator, Membership
from lightning_lopt.rounds import Rounds
from lightning_lopt.strategies import host
from lightning_lopt.strategies.checkpoint.resume import Resume
from lightning_lopt.strategies.errors import WorkerLostError
from lightning_lopt.strategies.signals import Signals
from lightning_lopt.strategies.virtual import ProcessRounds, ProcessWorkers
from lightning_lopt.sync.replica import OptimizerLike


class ElasticWorker(ProcessWorkers):
    """The worker of one process, among others that come and go between rounds.

    They meet at the end of the batch that ends a round, when all is done that Lightning does in a batch. A worker that
    has noted a signal, or has come to the end of the run, leaves at that meeting.

    Args:
        membership: The other workers.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._fit: tuple[pl.Trainer, Rounds] | None = None  # the present one
        self._present: tuple[int, ...] = ()  # workers after the last meeting

    @property
    def _trainer(self) -> pl.Trainer:
        assert self._fit is not None
        return self._fit[0]

    @property
    def _rounds(self) -> Rounds:
        assert self._fit is not None
        return self._fit[1]

    @override
    def check_processes(self, number: int) -> None:
        if number > 1:
            raise MisconfigurationException(
                f"Each of the workers that come and go is one process with a Trainer of its own, and this Trainer has "
                f"{number}: use Trainer(devices=1, num_nodes=1), and start the script once for each worker_id, not all "
                "by one torchrun or srun."
            )

    @override
    def make_rounds(
        self,
        make: Callable[..., Rounds],
        trainer: pl.Trainer,
        optimizer: OptimizerLike,
        comm: Communicator,
        timeout: timedelta | None,
    ) -> ProcessRounds:
        rounds = make(trainer.lightning_module, optimizer, elastic=self._membership)
        rounds.meets_at_once = False
        self._fit = trainer, rounds
        return rounds

    @override
    def sampler_kwargs(self, own: dict[str, Any]) -> dict[str, Any]:
        return {"num_replicas": self._membership.max_workers, "rank": self._membership.worker_id}

    @override
    def meet(self, resume: Resume) -> None:
        place = Place(self._trainer, resume)
        self._rounds.companions = [place]
        self._rounds.meet()
        place.at_start = False
        self._present = ()
        self._report_workers()
        if self._rounds.round_idx == 0 and len(self._present) == 1 < self._membership.max_workers:
            rank_zero_warn(
                f"Worker {self._membership.worker_id} begins a new run alone; others may join it. If theirs has ended "
                'already, stop it: fit(ckpt_path="last") goes on from a checkpoint, not from the beginning.'
            )

    @override
    def act(self, signals: Signals, step: int | None) -> None:
        if names := host.logged_with_sync(self._trainer):
            raise MisconfigurationException(
                f"{', '.join(names)} cannot be logged with sync_dist=True in training: the workers come and go, and "
                "come together for nothing but the ends of rounds. Leave it out; each worker logs its own values."
            )
        rounds = self._rounds
        if signals.noted or rounds.step_idx == rounds.total_steps:
            rounds.leave()
        rounds.meet()
        if rounds.left and signals.noted:
            rank_zero_info(f"Worker {self._membership.worker_id} leaves the others after round {rounds.round_idx - 1}.")
            signals.run_noted_actions()
            host.stop_after_batch(self._trainer)  # also after a requeue: without the others there is no further step
        elif not rounds.left:
            self._report_workers()

    def _report_workers(self) -> None:
        """Say which workers begin a round, where others have begun the last one."""
        before, self._present = self._present, self._rounds.comm.workers
        if self._present != before:
            gone, new = sorted({*before} - {*self._present}), sorted({*self._present} - {*before})
            changes = [f"{w} is gone" for w in gone] + [f"{w} joins" for w in new if before]
            rank_zero_info(
                f"Round {self._rounds.round_idx} begins with workers {[*self._present]}"
                + (f": {', '.join(changes)}." if changes else ".")
            )


class Place:
    """The place of a Trainer in a run, with its learning rate schedules, which a worker that joins takes over.

    It goes on with those batches of its own share of the data that belong there. A worker that is the first of a run
    has no place yet, and leaves the others where they are.

    Args:
        trainer: Trainer in a fit.
        resume: Checkpoint that the fit goes on from, if any.

    Attributes:
        at_start: Whether the first batch is yet to come.
        kind: Kinds of local optimizers, learning rate schedules and precision, which all workers must have.
    """

    def __init__(self, trainer: pl.Trainer, resume: Resume) -> None:
        self._trainer, self._resume = trainer, resume
        self.at_start = True
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        parts = [*trainer.optimizers, *schedules, trainer.precision_plugin]
        self.kind = ", ".join(type(part).__name__ for part in parts)

    def state_dict(self) -> dict[str, Any]:
        """Return counters, and the states of learning rate schedules and of mixed precision."""
        return {
            "loops": self._resume.loops if self.at_start else host.fit_progress(self._trainer),
            "schedules": [config.scheduler.state_dict() for config in self._trainer.lr_scheduler_configs],
            "precision": self._trainer.precision_plugin.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Go to another worker's place.

        Raises:
            WorkerLostError: The fit is under way.
        """
        if not self.at_start:
            raise WorkerLostError(
                "The others have lost contact with this worker and gone on without it for more than a round, or one of "
                "them has come from a later checkpoint: start this one again, and it will join them."
            )
        if state["loops"] is None:
            return
        for config, own in zip(self._trainer.lr_scheduler_configs, state["schedules"], strict=True):
            config.scheduler.load_state_dict(own)
        self._trainer.precision_plugin.load_state_dict(state["precision"])
        self._resume.go_to(self._trainer, state["loops"])
