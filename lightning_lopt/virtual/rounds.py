"""The `Rounds` of K workers in one process, by the same code as K processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from lightning_lopt.comm import Communicator
from lightning_lopt.rounds import Rounds
from lightning_lopt.sync.replica import LocalOptimizer
from lightning_lopt.virtual.shared_module import SharedModule
from lightning_lopt.virtual.thread_group import ThreadGroup, VirtualGroup


class VirtualRounds:
    """The `Rounds` of K workers in one process; attributes are those of the first worker.

    Args:
        make: Makes the `Rounds` of one worker from a model, an optimizer and a communicator.
        shared_module: Weights and states of the workers.
        optimizer: The local optimizer.
        timeout: Time after which a worker that waits for the others fails.

    Attributes:
        workers: The `Rounds` of each worker.
    """

    def __init__(
        self,
        make: Callable[..., Rounds],
        shared_module: SharedModule,
        optimizer: LocalOptimizer,
        timeout: timedelta | None = None,
    ) -> None:
        self._shared_module, self._optimizer = shared_module, optimizer
        size = shared_module.num_workers
        self._group = ThreadGroup(size, timeout)

        def make_one(rank: int) -> Rounds:
            comm = Communicator(backend=VirtualGroup(rank, size, self._group))
            return make(shared_module.model(rank), shared_module.optimizer(rank, optimizer), comm=comm)

        self.workers: list[Rounds] = self._group.run([partial(make_one, rank) for rank in range(size)])

    def __getattr__(self, name: str) -> Any:
        if name == "workers" or name.startswith("__"):  # not there yet
            raise AttributeError(name)
        return getattr(self.workers[0], name)

    @property
    def step_idx(self) -> int:
        """See `Rounds`; as all attributes, the same for all workers."""
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

    def _together(self, work: Callable[[Rounds], Any]) -> list[Any]:
        self._shared_module.collect()
        _ = self._optimizer.param_groups  # a joint one takes up new groups here, not in every thread
        try:
            return self._group.run([partial(work, rounds) for rounds in self.workers])
        finally:
            self._shared_module.show()

    def step(self) -> bool:
        """All workers have taken a local step: count, and sync if it is time. See `Rounds.step`."""
        return self._together(Rounds.step)[0]

    def finish_round(self) -> None:
        """See `Rounds.finish_round`."""
        self._together(Rounds.finish_round)

    def swap_in(self, weights: Any) -> None:
        """See `Rounds.swap_in`."""
        self._together(lambda rounds: rounds.swap_in(weights))

    def swap_out(self) -> None:
        """See `Rounds.swap_out`."""
        self._together(Rounds.swap_out)

    def abandon_round(self) -> None:
        """See `Rounds.abandon_round`."""
        self._together(Rounds.abandon_round)

    def state_dict(self, *, alone: bool = False) -> dict[str, Any]:
        """See `Rounds.state_dict`; the same for all workers."""
        return self._together(lambda rounds: rounds.state_dict(alone=alone))[0]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Rounds.load_state_dict`."""
        self._together(lambda rounds: rounds.load_state_dict(copy.deepcopy(state)))  # it is not copied in there
