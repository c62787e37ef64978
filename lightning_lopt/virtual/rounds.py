"""The `Rounds` of K workers in one process, by the same code as K processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from operator import itemgetter
from typing import Any

from lightning_lopt.comm import Communicator
from lightning_lopt.rounds import Rounds
from lightning_lopt.schedules import RoundInfo
from lightning_lopt.sync.replica import OptimizerLike
from lightning_lopt.sync.report import RoundReport
from lightning_lopt.sync.rules import Rule
from lightning_lopt.sync.status import SyncPoint
from lightning_lopt.sync.sync import EvalWeights, Sync
from lightning_lopt.virtual.shared_module import SharedModule
from lightning_lopt.virtual.thread_group import ThreadGroup, VirtualGroup
from lightning_lopt.worker_speeds import WorkerSpeeds


class VirtualRounds:
    """The `Rounds` of K workers in one process.

    Methods are for all workers. Attributes are those of the first worker; setting one sets it for all.

    Args:
        make: Function that makes one worker's rounds from a model, an optimizer, and a communicator.
        shared_module: Weights and states of the workers.
        optimizer: Local optimizer of the module.
        timeout: Time limit for a worker that waits for the others.

    Attributes:
        workers: Rounds of each worker.
    """

    def __init__(
        self,
        make: Callable[..., Rounds],
        shared_module: SharedModule,
        optimizer: OptimizerLike,
        timeout: timedelta | None = None,
    ) -> None:
        self._shared_module, self._optimizer = shared_module, optimizer
        self._versions = shared_module.versions()  # when the workers last met
        size = shared_module.num_workers
        self._group = ThreadGroup(size, timeout)

        def make_one(rank: int) -> Rounds:
            comm = Communicator(backend=VirtualGroup(rank, size, self._group))
            return make(shared_module.model(rank), shared_module.optimizer(rank, optimizer), comm=comm)

        self.workers: list[Rounds] = self._group.run([partial(make_one, rank) for rank in range(size)])
        for rank, rounds in enumerate(self.workers):
            rounds.ask_schedule = partial(self._ask_schedule, rank)

    # -- attributes -----------------------------------------------------------------------------------------------

    @property
    def round_idx(self) -> int:
        """See `Rounds`."""
        return self.workers[0].round_idx

    @property
    def local_step(self) -> int:
        """See `Rounds`."""
        return self.workers[0].local_step

    @property
    def last_report(self) -> RoundReport | None:
        """See `Rounds`."""
        return self.workers[0].last_report

    @property
    def listeners(self) -> list[Callable[[RoundReport], object]]:
        """See `Rounds`; they hear of each round once."""
        return self.workers[0].listeners

    @property
    def comm(self) -> Communicator:
        """Collectives of the first worker."""
        return self.workers[0].comm

    @property
    def sync(self) -> Sync:
        """Sync of the first worker."""
        return self.workers[0].sync

    @property
    def speeds(self) -> WorkerSpeeds:
        """Speeds of the workers, which are equal."""
        return self.workers[0].speeds

    @property
    def step_idx(self) -> int:
        """See `Rounds`."""
        return self.workers[0].step_idx

    @step_idx.setter
    def step_idx(self, value: int) -> None:
        for rounds in self.workers:
            rounds.step_idx = value

    @property
    def total_steps(self) -> int | None:
        """See `Rounds`."""
        return self.workers[0].total_steps

    @total_steps.setter
    def total_steps(self, value: int | None) -> None:
        for rounds in self.workers:
            rounds.total_steps = value

    @property
    def synced(self) -> bool:
        """See `Rounds`."""
        return self.workers[0].synced

    @property
    def equal_steps(self) -> bool:
        """See `Rounds`."""
        return self.workers[0].equal_steps

    @equal_steps.setter
    def equal_steps(self, value: bool) -> None:
        for rounds in self.workers:
            rounds.equal_steps = value

    def rules(self) -> dict[str, Rule]:
        """See `Rounds.rules`."""
        return self.workers[0].rules()

    def _ask_schedule(self, rank: int, info: RoundInfo) -> Any:
        """Call the schedule, which may remember the call, once for all workers."""
        answer = self.workers[0].schedule(info) if rank == 0 else None
        return self._group.join(rank, answer, itemgetter(0))

    # -- all workers together -------------------------------------------------------------------------------------

    def _together(self, work: Callable[[Rounds], Any]) -> list[Any]:
        self._shared_module.collect()
        _ = self._optimizer.param_groups  # a joint one takes up new groups here, not in every thread
        try:
            return self._group.run([partial(work, rounds) for rounds in self.workers])
        finally:
            self._shared_module.show()
            self._versions = self._shared_module.versions()

    def step(self) -> bool:
        """Count a local step that all workers have taken, and sync if it is time. See `Rounds.step`."""
        return self._together(Rounds.step)[0]

    def join(self, point: SyncPoint = SyncPoint.EPOCH_END, *, last: bool = False, stops: bool = False) -> None:
        """See `Rounds.join`."""
        self._together(lambda rounds: rounds.join(point, last=last, stops=stops))

    def check(
        self,
        point: SyncPoint,
        *,
        batches: int | None = None,
        call: int | None = None,
        stops: bool = False,
        uneven: bool = False,
    ) -> None:
        """See `Rounds.check`; workers that take turns cannot part."""

    def finish_round(self) -> None:
        """See `Rounds.finish_round`."""
        self._together(Rounds.finish_round)

    def swap_in(self, weights: EvalWeights, *, moved: bool = False) -> None:
        """See `Rounds.swap_in`."""
        self._together(lambda rounds: rounds.swap_in(weights, moved=moved))

    def swap_out(self) -> None:
        """See `Rounds.swap_out`."""
        self._together(Rounds.swap_out)

    def undo_rounding(self) -> None:
        """See `Rounds.undo_rounding`."""
        self._together(Rounds.undo_rounding)

    def sync_unstepped(self) -> None:
        """See `Rounds.sync_unstepped`."""
        self._together(Rounds.sync_unstepped)

    def average_workers(self) -> None:
        """See `Rounds.average_workers`."""
        self._together(Rounds.average_workers)

    def adopt(self) -> None:
        """Take the weights in the module as those of all workers. See `Rounds.adopt`."""
        self._shared_module.collect()
        self._spread(everything=False)
        self._together(Rounds.adopt)

    def adopt_replaced(self, *, at_start: bool = False) -> bool:
        """See `Rounds.adopt_replaced`; what was written to the module is for all workers."""
        versions, self._versions = self._versions, self._shared_module.versions()
        if self.local_step or not self.sync.common or (versions == self._versions and not at_start):
            return False
        self._shared_module.collect()
        fresh = at_start and not self.workers[0].resumed
        if not fresh and not self.sync.replaced(thorough=True):
            return False
        self._spread(everything=fresh)
        if fresh:
            return self._together(lambda rounds: rounds.adopt_replaced(at_start=True))[0]
        self._together(lambda rounds: rounds.adopt_present(keep_near=not at_start))
        return True

    def _spread(self, *, everything: bool) -> None:
        """Give all workers the first one's tensors, but those with the rule `local` unless everything is meant."""
        kept = [] if everything else [name for name, rule in self.rules().items() if rule == "local"]
        self._shared_module.spread(kept)

    def abandon_round(self) -> None:
        """See `Rounds.abandon_round`."""
        self._together(Rounds.abandon_round)

    # -- states ---------------------------------------------------------------------------------------------------

    def state_dict(self, *, alone: bool = False) -> dict[str, Any]:
        """Return the state that all workers share. See `Rounds.state_dict`."""
        return self._together(lambda rounds: rounds.state_dict(alone=alone))[0]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Rounds.load_state_dict`."""
        self._together(lambda rounds: rounds.load_state_dict(copy.deepcopy(state)))  # it is not copied in there

    def local_state(self) -> dict[str, Any]:
        """Return the first worker's own state; those of the others are in `workers`. See `Rounds.local_state`."""
        self._shared_module.collect()
        return self.workers[0].local_state()

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore the first worker's own state."""
        self._shared_module.collect()
        self.workers[0].load_local_state(state)
        self._shared_module.show()
