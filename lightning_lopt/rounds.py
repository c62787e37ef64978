"""Rounds: counts local steps, asks the schedule when to sync, and drives one `Sync`."""

from __future__ import annotations

import copy
import io
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lopt.comm import Communicator, GroupBrokenError, Membership
from lightning_lopt.functional.balance import even_bounds
from lightning_lopt.functional.integers import as_integer
from lightning_lopt.optim.outer import OuterFactory, check_coordinatewise, check_factory, check_needs_mean_alone
from lightning_lopt.schedules import Constant, RoundInfo, Schedule, StatefulSchedule, as_schedule
from lightning_lopt.sync.options import SyncOptions
from lightning_lopt.sync.replica import OptimizerLike, check_optimizer
from lightning_lopt.sync.report import RoundReport
from lightning_lopt.sync.rules import Rule
from lightning_lopt.sync.settings import changed, changes, describe, warn_of_changes
from lightning_lopt.sync.status import BATCHES, CALL, LOCAL_STEPS, ROUND, SyncPoint, WorkerStatus
from lightning_lopt.sync.sync import EvalWeights, Sync
from lightning_lopt.sync.unstepped import NamedTensors
from lightning_lopt.worker_speeds import Speeds, WorkerSpeeds, check_speeds

_COUNTERS = (
    "round_idx",
    "step_idx",
    "local_step",
    "local_steps",
    "due",
)  # all but the first may differ between workers
_NO_FIGURES: dict[str, float | None] = {"drift": None, "pseudo_grad_norm": None, "seconds": None}


@runtime_checkable
class Stateful(Protocol):
    """An object with a state of tensors and plain values."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


class Rounds:
    r"""Local SGD rounds in a plain PyTorch loop: H local steps on every worker, then a sync.

    Workers are the processes of `torch.distributed`; without a process group there is one, and a round is a
    Lookahead step. Creating a `Rounds` is collective, and gives all workers the parameters of rank 0.

    Args:
        model: Model whose tensors are synchronised.
        optimizer: Local optimizer, whose parameters are synchronised and whose `lr` schedules read.
        local_steps: H >= 1, or a schedule (`QSR`, or any callable from `RoundInfo` to an integer >= 1; with a memory, a
            `StatefulSchedule`).
        outer_optimizer: Function that makes a torch optimizer from parameter groups, for example
            `partial(LearnedOptimizer, network=...)`; None averages.
        total_steps: Local steps of the whole run, if known: the last round is cut so that the run ends synced.
        comm: Collectives among the workers; by default those of a new process group.
        options: Parts that a sync sends, time in flight and merge rule; by default everything, at once.
        worker_speeds: Speeds v, one number per worker, or `"measured"`: worker i takes H v_i / max v steps in a round
            (see `WorkerSpeeds`), so that nobody waits and numbers of steps differ. None is H for all.
        elastic: Workers that come and go between rounds, in place of `comm`: see `Elastic`. Creating a `Rounds` is then
            not collective, and `meet` must be called before the first local step.

    Attributes:
        round_idx: Number of finished rounds.
        step_idx: Number of finished local steps; of this worker, where speeds or data are unequal.
        local_step: Number of finished local steps in the present round.
        local_steps: H of the present round on this worker, None before its first step.
        due: Local step of the present round at which the next sync is launched or finished.
        equal_steps: Whether all workers had taken the same number of steps at the last status exchange.
        total_steps: Local steps of the whole run, None if unknown; may be set before the last round begins.
        schedule: Schedule of H.
        ask_schedule: Function through which the schedule is called; workers of one process call it once for all.
        comm: Collectives among the workers.
        sync: Anchors, outer optimizer and exchanges with the other workers.
        speeds: Speeds of the workers.
        last_report: The `RoundReport` of the last sync.
        resumed: Whether a state was loaded.
        listeners: Functions that are called with each `RoundReport`, at once.
        left: Whether this worker has left the others.
        companions: Objects of which a worker that joins takes over the state, with that of the local optimizer:
            learning rate schedules, for example. All workers must have the same; one that consists of others says by
            its attribute `kind` of which.
        meets_at_once: Whether workers that come and go meet as soon as a round ends; otherwise call `meet` before the
            next local step.

    Raises:
        ValueError: `local_steps` or `total_steps` < 1, nothing to train, an optimizer of another model, a network or
            speeds for another number of workers, or an option that workers who come and go exclude.
        TypeError: An argument of another type.
        DisagreementError: The workers' models, rounds or steps differ.

    Source: arXiv 2312.02204 (learned), 1910.00643 (SlowMo), 2311.08105 (DiLoCo), 2310.14423 (QSR).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rounds = Rounds(model, optimizer, local_steps=2)
        >>> for _ in range(4):
        ...     model(torch.ones(1, 1)).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     print(rounds.step())
        False
        True
        False
        True
        >>> rounds.round_idx
        2
    """

    def __init__(
        self,
        model: NamedTensors,
        optimizer: OptimizerLike,
        local_steps: int | Schedule,
        outer_optimizer: OuterFactory | None = None,
        total_steps: int | None = None,
        comm: Communicator | None = None,
        options: SyncOptions | None = None,
        worker_speeds: Speeds = None,
        elastic: Membership | None = None,
    ) -> None:
        check_optimizer(model, optimizer)
        if total_steps is not None and as_integer(total_steps, least=1) is None:
            raise ValueError(f"total_steps must be an integer >= 1, or None if unknown, not {total_steps!r}.")
        self.schedule = self.ask_schedule = as_schedule(local_steps)
        self._options = SyncOptions() if options is None else options
        check_combination(self.schedule, outer_optimizer, self._options)
        check_speeds(worker_speeds)
        self._given = describe(
            {
                "local_steps": local_steps,
                **{field.name: getattr(self._options, field.name) for field in fields(self._options)},
                "worker_speeds": worker_speeds,
            }
        )
        self._optimizer = optimizer
        self.total_steps = total_steps
        self._membership = elastic
        if elastic is not None:
            check_elastic(
                elastic,
                self._options,
                worker_speeds,
                {
                    "comm, which is a fixed group of workers": comm is not None,
                    "a local optimizer without a state_dict, which a new worker takes over": (
                        not isinstance(optimizer, Stateful)
                    ),
                },
            )
            comm = Communicator(backend=None)
        self.comm = comm or Communicator()
        check_speeds(worker_speeds, self.comm.num_workers)
        self.sync = Sync(model, optimizer, outer_optimizer, self.comm, self._options)
        self.speeds = WorkerSpeeds(worker_speeds, self.comm.num_workers, self.comm.rank, self.sync.device)
        self.equal_steps = not self.speeds.unequal
        self.round_idx = 0
        self.step_idx = 0
        self.local_step = 0
        self.local_steps: int | None = None
        self.due = 0
        self.last_report: RoundReport | None = None
        self.listeners: list[Callable[[RoundReport], object]] = []
        self.resumed = False
        self._chosen: int | None = None  # H of the present round, as the schedule returned it
        self._figures: dict[str, float | None] = _NO_FIGURES  # which schedules read
        self._round_start: float | None = None  # time at which the present round began
        self._round_seconds = 0.0  # of the last round on this worker, 0 if unknown
        self._looked_in = -1  # round in which `adopt_replaced` was last called
        self._has_met, self._must_meet = elastic is None, elastic is not None
        self._leaves, self.left = False, False
        self.companions: list[Stateful] = []
        self.meets_at_once = True
        stepping = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper is one without hooks
        if isinstance(stepping, Optimizer):
            this = weakref.ref(self)
            stepping.register_step_pre_hook(lambda *_: _look_once(this()))

    def step(self) -> bool:
        """Count a local step, right after `optimizer.step()`; launch a sync or end the round if it is time.

        Returns:
            Whether this step ended a round.
        """
        if self._must_meet or self.left:
            raise RuntimeError(
                "This worker is not among the others: call rounds.meet() before the first local step, and take none "
                "after rounds.left."
            )
        if self.local_steps is None:  # the learning rate is now the one of the round's first step
            self._begin_round()
        self.step_idx += 1
        self.local_step += 1
        if self.local_step < self.due:
            return False
        return self._launch_or_end() if self._membership is None else self._end_among_those_left()

    def _begin_round(self) -> None:
        self.local_steps = self.speeds.steps(self._choose_local_steps())
        ends_run = self.step_idx + self.local_steps == self.total_steps
        overlap = 0 if ends_run else self.speeds.overlap(self._options.overlap_steps, self.local_steps)
        self.due = self.local_steps - overlap
        self.speeds.start(self.local_step + 1)

    def _launch_or_end(self) -> bool:
        if self.local_step != self.local_steps:
            self._launch(SyncPoint.LAUNCH)
            assert self.local_steps is not None
            self.due = self.local_steps
            return False
        if not self.sync.in_flight:
            self._launch(everything=self.step_idx == self.total_steps)
        self._end_round()
        return True

    def sync_again(self) -> bool:
        """Give up a sync that failed on all workers, and launch it again with all local steps so far.

        Nothing has changed before everything has arrived, so that the result is that of a sync that did not fail.

        Returns:
            Whether this ended a round, as `step` does.
        """
        self.sync.give_up()
        return self._launch_or_end()

    def _launch(self, point: SyncPoint = SyncPoint.SYNC, *, everything: bool = False, stops: bool = False) -> None:
        steps = self.local_step if point is not SyncPoint.LAUNCH or self.local_steps is None else self.local_steps
        seconds = self.speeds.measure(self.local_step)
        status = WorkerStatus(
            steps,
            point,
            self.speeds.share,
            seconds,
            lr=self._local_lr(),
            round_seconds=self._round_seconds,
            stops=stops,
            uneven=point.answers_syncs,
        )
        self.sync.launch(self.round_idx, status, everything=everything, same_steps=self.equal_steps)

    def check(
        self,
        point: SyncPoint,
        *,
        batches: int | None = None,
        call: int | None = None,
        stops: bool = False,
        uneven: bool = False,
    ) -> None:
        """Make sure that all workers are at the same point of the same round, by a message of a sync's length.

        Args:
            point: Point that this worker has come to.
            batches: Number of batches so far; None where it may differ.
            call: Digest of a collective that is to come, and of its tensors.
            stops: Whether this worker was told to end its training.
            uneven: Whether the workers may be unequally far elsewhere.

        Raises:
            DisagreementError: Another worker is elsewhere; the error says where, and the likely cause.
        """
        steps = self.local_step if self.equal_steps else None
        equal = {ROUND: self.round_idx, LOCAL_STEPS: steps, BATCHES: batches, CALL: call}
        status = WorkerStatus(self.local_step, point, lr=self._local_lr(), stops=stops, uneven=uneven)
        self.sync.check(status, equal)

    def join(self, point: SyncPoint = SyncPoint.EPOCH_END, *, last: bool = False, stops: bool = False) -> None:
        """Wait until all workers have come to the same point, as `torch.distributed.algorithms.Join` does.

        Until then this worker takes part in the others' syncs, with its present parameters and no further steps. If
        the workers have taken unequal numbers of steps in the present round when all are there, the round ends for
        all.

        Args:
            point: A `SyncPoint` that answers the syncs of others.
            last: Whether training ends here, so that all must be synced.
            stops: Whether this worker was told to end its training.

        Raises:
            DisagreementError: Workers wait at different points.
        """
        if self.sync.in_flight:
            self._end_round()
        self._launch(point, stops=stops)
        while self.sync.in_flight:  # somebody was at a sync
            self._end_round()
            self._launch(point, stops=stops)
        self._update_speeds()
        steps = {worker.local_steps for worker in self.sync.worker_statuses}
        self.equal_steps = self.equal_steps and len(steps) == 1
        if len(steps) > 1 or (last and (steps != {0} or not self.sync.common)):
            self._launch(everything=last)
            self._end_round()
            self.speeds.forget()  # what comes now is not training

    def finish_round(self) -> None:
        """Sync everything now, on all workers, even if the round is not over; do nothing if all are synced.

        Where workers come and go, the others may have more to do: this one goes back to the last synced weights, and
        leaves.
        """
        if self._membership is not None:
            if self.local_step > 0:
                self.abandon_round()
            self.leave()
            while self._has_met and not self.left:  # until others have the weights, too
                if not self._must_meet:  # they are within a round
                    self._membership.disconnect()
                self._meet(repeats=False)
        elif not self.synced:
            self._launch(everything=True)
            self._end_round()

    def _end_round(self) -> None:
        if self._chosen is None and isinstance(self.schedule, StatefulSchedule):
            self.ask_schedule(self._info())  # this worker only answered others, and must remember as they do
        self.last_report = self.sync.finish()
        self._update_speeds()
        self._update_figures(self.last_report)
        self.equal_steps = self.equal_steps and all(worker.point.needs_sync for worker in self.sync.worker_statuses)
        self.round_idx += 1
        self.local_step = 0
        self.local_steps = self._chosen = None
        self.speeds.start(0)
        for listener in self.listeners:
            listener(self.last_report)

    def _update_speeds(self) -> None:
        self.speeds.update([worker.step_seconds for worker in self.sync.worker_statuses])

    def _update_figures(self, report: RoundReport) -> None:
        now, known = time.perf_counter(), not report.partial and report.left_out < self.comm.num_workers
        self._figures = {
            "drift": report.drift if known else None,
            "pseudo_grad_norm": report.pseudo_grad_norm if known else None,
            "seconds": max(worker.round_seconds for worker in self.sync.worker_statuses) or None,
        }
        self._round_seconds = 0.0 if self._round_start is None else now - self._round_start
        self._round_start = now

    @property
    def synced(self) -> bool:
        """Whether all workers hold the same weights."""
        return self.local_step == 0 and self.sync.common

    def _info(self) -> RoundInfo:
        return RoundInfo(self.round_idx, self.step_idx, self.total_steps, self._local_lr(), **self._figures)

    def _new_local_steps(self) -> int:
        info = self._info()
        returned = self.ask_schedule(info)
        local_steps = as_integer(returned, least=1)
        if local_steps is None:
            raise ValueError(
                f"The schedule {self.schedule!r} returned {returned!r} local steps for {info}; "
                "it must be an integer >= 1."
            )
        return local_steps

    def _choose_local_steps(self) -> int:
        if self._chosen is None:  # else the round begins anew
            self._chosen = self._new_local_steps()
        local_steps = self._chosen
        turns = self._options.effective_selection.num_turns
        turn, bounds = self.round_idx % turns, even_bounds(local_steps, turns)
        local_steps = bounds[turn + 1] - bounds[turn]
        if local_steps < 1:
            raise ValueError(
                f"{turns} fragments take turns within local_steps: these must be at least as many for {self._info()}."
            )
        if self.total_steps is not None and self.step_idx < self.total_steps:
            local_steps = min(local_steps, self.total_steps - self.step_idx)
        return local_steps

    def _local_lr(self) -> float:
        """The learning rate that schedules read: the largest of all groups."""
        return max(float(group.get("lr") or 0.0) for group in self._optimizer.param_groups)  # None for some

    def rules(self) -> dict[str, Rule]:
        """Return the rule by which the workers' values become one, of every parameter and buffer of the model by name.

        See `sync_rules` of `SyncOptions`.
        """
        return self.sync.replica.rules()

    def swap_in(self, weights: EvalWeights, *, moved: bool = False) -> None:
        """Put the global weights into the model until `swap_out`: see `Sync.swap_in`.

        Right after a sync only what hooks have changed since then is put in: buffers, an EMA teacher.

        Args:
            weights: `"anchor"` or `"mean"`.
            moved: Whether weights were changed without a step, so that they differ right after a sync, too.
        """
        self.sync.swap_in(weights, unstepped_alone=self.synced and not moved)

    def swap_out(self) -> None:
        """Give the model this worker's own weights back."""
        self.sync.swap.undo()

    def undo_rounding(self) -> None:
        """Give the model the global weights again where a worker's own differ from them by rounding alone."""
        if self.synced:
            self.sync.replica.undo_rounding()

    def sync_unstepped(self) -> None:
        """Make what no optimizer steps the same on all workers, where hooks have changed it since the last sync."""
        self.sync.sync_unstepped()

    def average_workers(self) -> None:
        """Give every worker the mean of their weights and optimizer states, outside of a sync."""
        self.sync.average_workers()

    def adopt(self) -> None:
        """Take the present weights as the global ones; all workers must call it, with the same weights.

        A new round begins. Call it after weights were loaded, re-initialised or pruned outside of the optimizer. Before
        the first step after a sync this is noticed, and the method called for you. At any other time the change would
        count as progress of the local steps, which an outer optimizer scales by its learning rate and adds to its
        momentum. The outer optimizer's state of the replaced tensors starts afresh.

        Raises:
            DisagreementError: The workers' weights differ, or some worker does not call it.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> rounds = Rounds(model, torch.optim.SGD(model.parameters(), lr=0.0), local_steps=1)
            >>> model.load_state_dict({"weight": torch.full((1, 1), 5.0)})
            <All keys matched successfully>
            >>> rounds.adopt()
            >>> rounds.abandon_round()  # goes back to the global weights
            >>> model.weight.item()
            5.0
        """
        self.adopt_present(keep_near=False)
        self._looked_in = -1

    def adopt_present(self, *, keep_near: bool) -> None:
        """Take the present weights as the global ones. See `Sync.adopt`."""
        self.sync.swap.undo()
        self.sync.adopt(keep_near=keep_near)
        self.local_step = 0
        self.local_steps = None
        self.speeds.start(0)

    def adopt_replaced(self, *, at_start: bool = False) -> bool:
        """Call `adopt` if weights were written since the last sync; to be called before the first local step after it.

        The outer optimizer keeps the state of what moved by at most half of its norm, as a projection moves it. Nothing
        is noticed within a round, nor where workers hold different weights after a sync (a part is sent, an overlap, a
        merge rule between the two). Writes through `.data` are noticed at the start alone.

        Args:
            at_start: Whether a run begins: all workers must call it then, and all values are compared, those that no
                optimizer steps included if no state was loaded.

        Returns:
            Whether weights were adopted.

        Raises:
            DisagreementError: The workers' weights differ, or only some workers' were written.
        """
        between = self.local_step == 0 and self.sync.common
        if at_start:
            written = between and self.sync.replaced(thorough=True)
            within, written = map(bool, self.comm.agree(self.sync.device, {}, [not between, written]))
            if within:
                return False
        else:
            written = between and self.sync.replaced()
            self._looked_in = self.round_idx
        if written:
            self.adopt_present(keep_near=not at_start)
        elif at_start and not self.resumed:
            self.sync.adopt_unstepped()
        return written

    # -- workers that come and go ---------------------------------------------------------------------------------

    def meet(self) -> None:
        """Agree with the other workers on those who take part from here on; the end of each round does so by itself.

        A worker that is behind the others takes over what the first of those who are furthest has: anchors, outer
        state, counters, and the state of the local optimizer. At the very beginning all take over what the first one
        has, weights included that were loaded after this `Rounds` was made. In a fixed group nothing happens.

        Raises:
            DisagreementError: The others have another model, other settings, or a worker of this identifier.
        """
        if not self._must_meet:
            return
        if not (self._has_met or self.resumed):
            self.adopt_replaced(at_start=True)  # without communication: this worker is alone yet
        self._meet(repeats=False)

    def leave(self) -> None:
        """Take part in the present round, and in none after it; a signal handler may call it.

        At the end of the round `left` is set.
        """
        self._leaves = True

    def _meet(self, *, repeats: bool) -> bool:
        """Meet the other workers.

        Args:
            repeats: Whether a sync broke and is to be repeated.

        Returns:
            Whether this worker has taken over the state of another.
        """
        assert self._membership is not None
        before = self.round_idx
        while True:
            members = self._membership.meet(
                self.round_idx if self._has_met or self.resumed else -1,
                settings=self._settings(),
                repeats=repeats,
                leaves=self._leaves and not repeats,
            )
            self.comm.regroup(members)
            self.left = not members.workers
            if self.left or not _breaks(partial(self._heal, members.rounds, repeats=repeats)):
                self._has_met, self._must_meet = True, False
                return self.round_idx != before

    def _settings(self) -> dict[str, str]:
        """Settings that all workers of a run have, of which one may take over the state of another."""
        return {
            **self._given,
            "total_steps": str(self.total_steps),
            "local optimizer": f"{type(self._optimizer).__name__} of {len(self._optimizer.param_groups)} groups",
            "companions": ", ".join(getattr(c, "kind", type(c).__name__) for c in self.companions),
            **self.sync.settings,
        }

    def _heal(self, rounds: Sequence[int], *, repeats: bool) -> None:
        """Bring those who are behind up to the others."""
        furthest = max(rounds)
        donor = rounds.index(furthest)
        behind = [k for k, r in enumerate(rounds) if r < furthest or (furthest < 0 and k != donor)]
        rank = self.comm.rank
        if not behind:
            return
        if rank == donor:
            own = {
                "rounds": self.state_dict(alone=True),
                "untouched": self.sync.replica.untouched(),
                "local": self._local_optimizer.state_dict(),
                "companions": [companion.state_dict() for companion in self.companions],
            }
            state = _to_bytes(own)
            for k in behind:
                self.comm.send(state, k)
        elif rank in behind:
            state = _from_bytes(self.comm.receive(donor))
            # A worker whose sync broke just before its end has had all steps of that round.
            self._take_over(state, keeps_local=repeats and rounds[rank] == furthest - 1)
        self.comm.max_(torch.zeros(1, device=self.sync.device))  # all or none
        self.sync.note_newcomers()

    def _take_over(self, state: dict[str, Any], *, keeps_local: bool) -> None:
        """Go to where another worker is: the start of a round, or the place within one at which it was resumed."""
        self.load_state_dict(state["rounds"])
        self.sync.swap.undo()
        self.sync.restore_anchor()
        self.sync.replica.restore_with(state["untouched"])
        if not keeps_local:
            self._local_optimizer.load_state_dict(state["local"])
            for companion, own in zip(self.companions, state["companions"], strict=True):
                companion.load_state_dict(own)

    def _end_among_those_left(self) -> bool:
        """End the round; when a worker is lost meanwhile, the others repeat its sync with what they still have."""
        end = self._launch_or_end
        while _breaks(end):
            if self._meet(repeats=True):  # somebody had the whole mean, and now this worker has it, too
                return True
            end = self.sync_again
        self._must_meet = True
        if self.meets_at_once:
            self._meet(repeats=False)
        return True

    @property
    def _local_optimizer(self) -> Stateful:
        assert isinstance(self._optimizer, Stateful)  # checked by the constructor
        return self._optimizer

    def abandon_round(self) -> None:
        """Go back to the anchor, without communication: the local steps since the last sync are lost."""
        self.sync.swap.undo()
        self.sync.restore_anchor()
        self.step_idx -= self.local_step
        self.local_step = 0
        self.local_steps = None

    def state_dict(self, *, alone: bool = False) -> dict[str, Any]:
        """Counters, anchors, states of the outer optimizer and the schedule, the same on all workers; nothing local.

        Args:
            alone: Whether not to talk to the other workers: see `Sync.state_dict`. Otherwise with `sharded=True` all
                must call it.
        """
        if self._options.sharded and not alone:
            self.check(SyncPoint.CHECKPOINT)
        sync = self.sync.state_dict(alone=alone)
        return {
            **self._counters(),
            "equal_steps": self.equal_steps,
            "seconds": [*self.speeds.seconds],
            "chosen": self._chosen,
            "figures": self._figures,
            "schedule": self._schedule_state(),
            "given": self._given,
            "sync": sync,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`.

        Settings that the script has changed since then are the script's, with a warning: those of a round from the next
        one on, those of the outer optimizer at once. A sync in flight is given up if it sent other parts, or in another
        form, than the script wants now; its round ends with a sync of its own.

        Raises:
            ValueError: The state is of something else, another number of parameters, or another kind of outer
                optimizer.
        """
        _check_state(state, "anchors", "state_dict")
        given = state.get("given", {})
        if self.comm.is_first:
            warn_of_changes(changes(given, self._given))
        if {"density", "selection", "compression", "sharded", "sync_rules"} & {*changed(given, self._given)}:
            state = {**state, "sync": {**state["sync"], "exchange": None}}
        self._load_counters(state)
        self.resumed = True
        self.equal_steps = self.equal_steps and state.get("equal_steps", True)
        self._chosen, self._figures = state.get("chosen"), _NO_FIGURES | state.get("figures", {})
        saved, kind = state.get("schedule"), type(self.schedule).__name__
        if isinstance(self.schedule, StatefulSchedule) and saved and saved["kind"] == kind:
            self.schedule.load_state_dict(saved["state"])
        elif saved and self.comm.is_first:
            warnings.warn(f"What {saved['kind']} remembered, in the checkpoint, is not used by {kind}.", stacklevel=2)
        seconds = state.get("seconds", [])
        if len(seconds) == self.comm.num_workers:
            self.speeds.update(seconds)
        self.sync.load_state_dict(state["sync"])

    def local_state(self) -> dict[str, Any]:
        """Everything that differs between the workers: counters, and see `Sync.local_state`.

        Parameters and buffers are this worker's own, also between `swap_in` and `swap_out`.
        """
        self.sync.swap.exchange()
        state = self.sync.local_state()
        self.sync.swap.exchange()
        elapsed = None if self._round_start is None else time.perf_counter() - self._round_start
        return {**self._counters(), "elapsed": elapsed, "round_seconds": self._round_seconds, "sync": state}

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `local_state`, after `load_state_dict`.

        Raises:
            ValueError: The state is of something else.
        """
        _check_state(state, "params", "local_state")
        self._load_counters(state)
        elapsed, self._round_seconds = state.get("elapsed"), state.get("round_seconds", 0.0)
        self._round_start = None if elapsed is None else time.perf_counter() - elapsed
        self.sync.load_local_state(state["sync"])

    def _schedule_state(self) -> dict[str, Any] | None:
        if not isinstance(self.schedule, StatefulSchedule):
            return None
        return {"kind": type(self.schedule).__name__, "state": copy.deepcopy(self.schedule.state_dict())}

    def _counters(self) -> dict[str, int | None]:
        return {name: getattr(self, name) for name in _COUNTERS}

    def _load_counters(self, state: dict[str, Any]) -> None:
        for name in _COUNTERS:
            setattr(self, name, state[name])


def _look_once(rounds: Rounds | None) -> None:
    """Look for replaced weights before the first step of a round; a second one may belong to the same local step."""
    if rounds is not None and rounds._looked_in != rounds.round_idx:
        rounds.adopt_replaced()


def _check_state(state: Mapping[str, Any], entry: str, method: str) -> None:
    if entry not in state.get("sync", {}):
        raise ValueError(
            f"This is no result of Rounds.{method}(). Restore Rounds.state_dict() by load_state_dict first, then every "
            "worker's own Rounds.local_state() by load_local_state."
        )


def _breaks(function: Callable[[], object]) -> bool:
    """Call a function, and return whether a worker was lost meanwhile."""
    try:
        function()
    except GroupBrokenError:
        return True
    return False


def _to_bytes(state: dict[str, Any]) -> Tensor:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _from_bytes(flat: Tensor) -> dict[str, Any]:
    """Invert `_to_bytes`; nothing but tensors and plain values is accepted, since another machine made them."""
    return torch.load(io.BytesIO(flat.numpy().data), map_location="cpu", weights_only=True)


def check_elastic(
    elastic: Membership, options: SyncOptions, worker_speeds: Speeds, reasons: Mapping[str, bool]
) -> None:
    """Refuse what cannot work with workers that come and go.

    Args:
        elastic: The workers.
        options: Options of the syncs.
        worker_speeds: Speeds of the workers.
        reasons: Whether each of these excludes them, too; noun phrases that give the reason.

    Raises:
        TypeError: `elastic` is no `Elastic`.
        ValueError: Something excludes them; it says why.
    """
    if not hasattr(elastic, "meet"):
        raise TypeError(f"elastic must be Elastic(...), not {elastic!r}.")
    reasons = {
        **reasons,
        "overlap_steps: a sync in flight cannot be repeated when a worker is lost": options.overlap_steps > 0,
        "sharded=True: the outer state of a lost worker's tensors would be lost": options.sharded,
        "density, a selection, or a number as merge: a new worker begins from common weights, which they never leave": (
            not options.leaves_common_weights
        ),
        "worker_speeds, which are one number for each of a fixed number of workers": worker_speeds is not None,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(f"Workers that come and go exclude {'; and '.join(found)}.")


def check_combination(schedule: Schedule, outer_optimizer: OuterFactory | None, options: SyncOptions) -> None:
    """Refuse a schedule, an outer optimizer and sync options that are none, or exclude each other.

    Raises:
        TypeError: The outer optimizer is no function that makes one, or the options are of another type.
        ValueError: The outer optimizer needs whole tensors and random coordinates are sent, or every worker's
            pseudo-gradient and a `LinearCodec` sends means alone, or a constant number of local steps leaves no room
            for the overlap or for all fragments.
    """
    check_factory(outer_optimizer)
    if not isinstance(options, SyncOptions):
        raise TypeError(f"options must be SyncOptions(...), as SyncOptions(compression='int8') is, not {options!r}.")
    if outer_optimizer is not None and not options.effective_selection.whole_tensors:
        check_coordinatewise(outer_optimizer)
    if outer_optimizer is not None and options.sends_means_alone:
        check_needs_mean_alone(outer_optimizer, options.compression)
    turns = options.effective_selection.num_turns
    if isinstance(schedule, Constant) and schedule.local_steps // turns <= options.overlap_steps:
        raise ValueError(
            f"With local_steps={schedule.local_steps} a sync comes every {schedule.local_steps // turns} steps"
            + (f" ({turns} fragments take turns)" if turns > 1 else "")
            + f", which leaves no room for overlap_steps={options.overlap_steps}: there must be at least one more."
        )
