"""Going on from a checkpoint: in the middle of a round and of an epoch, with the same or another number of workers."""

from __future__ import annotations

import copy
import operator
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_lopt.islands import Layout, to_distributed
from lightning_lopt.strategies import host
from lightning_lopt.strategies.checkpoint.entry import CHECKPOINT_KEY, check_version, required
from lightning_lopt.strategies.checkpoint.mean import mean_part
from lightning_lopt.strategies.checkpoint.pieces import cut_part, whole_part, without_flight
from lightning_lopt.strategies.checkpoint.worker_files import load_part
from lightning_lopt.strategies.errors import CheckpointError, run_on_all
from lightning_lopt.strategies.loaders import ResumableLoaders
from lightning_lopt.strategies.virtual import ProcessRounds, ProcessWorkers
from lightning_lopt.sync.settings import changes

if TYPE_CHECKING:
    from lightning_lopt.strategies.local_sgd import LocalSGD


class Resume:
    """The parts of a checkpoint that belong to this process, from reading it to the first batch.

    Args:
        strategy: Strategy of the fit.
        workers: Workers of this process.
        loaders: Training loaders of the fit.

    Attributes:
        goes_on: Whether the fit goes on with the workers' own states, within the round that was saved.
        loops: Counters of the fit that the checkpoint holds, as Lightning has loaded them; None without one.
    """

    def __init__(self, strategy: LocalSGD, workers: ProcessWorkers, loaders: ResumableLoaders) -> None:
        self._strategy, self._workers, self._loaders = strategy, workers, loaders
        self._parts: list[dict[str, Any]] = []
        self._validation_is_over = False  # in the epoch that begins, where Lightning would count on
        self._can_rewind = False  # all loaders
        self._ignored = ExitStack()  # until the first batch
        self.goes_on = False
        self.loops: dict[str, Any] | None = None

    def read(self, checkpoint: dict[str, Any], path: Any, weights_only: bool | None) -> None:
        """Read the parts of this process, and put its own states into the checkpoint for Lightning.

        Args:
            checkpoint: Checkpoint that was read from the path.
            path: Path of the checkpoint, the same on all processes.
            weights_only: Argument of `torch.load`.

        Raises:
            CheckpointError: The entry is that of another release, or a file beside the checkpoint is missing or
                damaged.
        """
        self._parts = []
        entry = checkpoint.get(CHECKPOINT_KEY)
        if entry is not None:
            check_version(entry)
            self._parts = self._read_parts(entry, path, weights_only)
            self._workers.check_parts(self._parts)
            if self._parts:
                checkpoint.update(self._parts[0]["checkpoint"])
        self.loops = {**checkpoint["loops"]["fit_loop"], "state_dict": {}} if "loops" in checkpoint else None

    def _read_parts(self, entry: dict[str, Any], path: Any, weights_only: bool | None) -> list[dict[str, Any]]:
        """Return the parts of this process, none after an exception."""
        parts, files = entry.pop("parts", None), entry.pop("files", None)
        if parts is None and files is None:
            rank_zero_warn(
                "The checkpoint was written after an exception: all workers continue from its last synced weights with "
                "the first worker's optimizer state."
            )
            return []
        strategy, own = self._strategy, self._strategy.own_parts
        saved = required(entry, "num_parts"), required(entry, "num_workers")
        present = strategy.num_parts, strategy.num_workers
        saved_islands, islands = entry.get("islands", False), strategy.has_islands
        same = saved == present and saved_islands == islands
        if parts is not None:
            load = partial(operator.getitem, parts)
        else:
            real = os.path.realpath(path) if host.is_local_path(path) else path  # "last" may be a link
            load = partial(_load_part, strategy.part_io, real, files["token"], weights_only)
        elsewhere = CheckpointError(f"Another worker could not read its file beside {path}: see its error.")
        if same:
            return run_on_all(strategy, lambda: [load(number) for number in own], elsewhere)
        if saved_islands or islands:
            read = partial(self._put_together, entry, load, saved, present)
            parts, gave_up = run_on_all(strategy, read, elsewhere)
        else:
            wanted = (load(number) for number in range(saved[0]))
            batch_ratio = Fraction(max(saved), max(present))  # of shards of the data, which lost workers have, too
            part = run_on_all(strategy, partial(mean_part, wanted, batch_ratio), elsewhere)
            part["checkpoint"]["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)
            parts = [part, *(copy.deepcopy(part) for _ in own[1:])]
            sync = required(entry, "rounds")["sync"]
            gave_up, sync["exchange"] = sync["exchange"] is not None, None
        means = not (saved_islands or islands) or saved[1] != present[1]
        rank_zero_warn(
            f"The checkpoint holds {_count(*saved)}, there are {_count(*present)} now"
            + (", and a model that is shared by the ranks of a worker" if saved_islands or islands else "")
            + (": all continue from the mean of their weights, optimizer states and error feedback" if means else "")
            + ". Random states, gradients that were accumulating and the states of loaders that have their own are "
            "dropped" + (", and so is a sync in flight: its round ends with one of its own." if gave_up else ".")
        )
        return parts

    def _put_together(
        self,
        entry: Mapping[str, Any],
        load: Callable[[int], dict[str, Any]],
        saved: tuple[int, int],
        present: tuple[int, int],
    ) -> tuple[list[dict[str, Any]], bool]:
        """Return parts of whole tensors for the workers of this process, and whether a sync in flight is given up.

        Args:
            entry: Entry of the checkpoint.
            load: Function that reads the part of this number.
            saved: Numbers of parts and of workers in the checkpoint.
            present: Numbers of parts and of workers now.
        """
        size, gave_up = saved[0] // saved[1], False

        def whole(worker: int) -> dict[str, Any]:
            nonlocal gave_up
            numbers = range(worker * size, (worker + 1) * size if entry.get("islands") else worker * size + 1)
            parts = [load(number) for number in numbers]
            if not entry.get("islands"):
                parts[0]["rounds"] = copy.deepcopy(required(entry, "rounds"))
            part, flew = whole_part(parts), parts[0]["rounds"]["sync"]["exchange"] is not None
            if saved[1] != present[1]:
                part = without_flight(part)
            gave_up = flew and part["rounds"]["sync"]["exchange"] is None
            return part

        def of(workers: Sequence[int], among: int) -> dict[str, Any]:
            first = whole(workers[0])
            rounds, exchange = first["rounds"], first["local"]["sync"]["exchange"]
            if entry.get("islands") and rounds["given"].get("sharded") == str(True) and rounds["sync"]["outer"]:
                _complete(rounds, (whole(worker)["rounds"] for worker in range(saved[1])))
            part = mean_part(chain([first], (whole(w) for w in workers[1:])), Fraction(len(workers), among))
            part["checkpoint"]["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)
            part["local"]["sync"]["exchange"] = exchange
            return {**part, "rounds": rounds}

        own = [number * present[1] // present[0] for number in self._strategy.own_parts]
        if saved[1] == present[1]:
            return [of([worker], 1) for worker in own], gave_up
        part = of(range(saved[1]), present[1])
        return [part, *(copy.deepcopy(part) for _ in own[1:])], gave_up

    def prepare(self, trainer: pl.Trainer, rounds: ProcessRounds, checkpoint: dict[str, Any]) -> None:
        """Give optimizer states the layout of a sharded model, before Lightning loads them.

        Args:
            trainer: Trainer in a fit.
            rounds: Rounds of the fit.
            checkpoint: Checkpoint that was read.
        """
        layout = rounds.sync.replica.layout()
        if layout is None or not self._parts:
            return
        (part,) = self._parts
        if part.get("layout") is None:
            part = cut_part(part, layout)
        elif Layout.from_state(part["layout"]) != layout:
            raise CheckpointError(
                "The ranks of this checkpoint's workers held other parts of the model: shard it as when it was saved, "
                "with the same outer optimizer, or begin anew from its weights: load_from_checkpoint."
            )
        self._parts = [part]
        checkpoint["optimizer_states"] = [
            _distributed(state, optimizer)
            for state, optimizer in zip(part["checkpoint"]["optimizer_states"], trainer.optimizers, strict=True)
        ]

    def restore(self, trainer: pl.Trainer, rounds: ProcessRounds, checkpoint: Mapping[str, Any]) -> None:
        """Restore rounds, loaders, and all workers of this process, after Lightning has restored the first one.

        Args:
            trainer: Trainer in a fit.
            rounds: Rounds of the fit.
            checkpoint: Checkpoint that was read.
        """
        entry = checkpoint.get(CHECKPOINT_KEY)
        if entry is None:
            rank_zero_warn("This checkpoint was not written by a lightning_lopt strategy: a fresh round begins.")
        else:
            _warn_of_settings(changes(entry.get("given", {}), self._strategy.given))
            own = self._parts[0].get("rounds") if self._parts else None
            rounds.load_state_dict(own or required(entry, "rounds"))
            if self._parts:
                self.goes_on = True
                rounds.load_local_state(required(self._parts[0], "local"))
                self._restore_loaders(trainer, self._parts[0].get("loaders", []))
            else:
                rounds.abandon_round()
        self._workers.load_parts(trainer, self._parts, checkpoint)

    def _restore_loaders(self, trainer: pl.Trainer, states: list[dict[str, Any] | None]) -> None:
        self._loaders.load_state_dicts(states, host.epochs_done(trainer))
        if host.train_loaders(trainer) is not None:  # configure_optimizers asked for the number of steps
            host.restore_stateful_loaders(trainer)
            host.make_train_iterators(trainer)
        self._can_rewind = None not in states

    def go_to(self, trainer: pl.Trainer, loops: Mapping[str, Any]) -> None:
        """Go to another worker's place in the run, before the first batch of a fit.

        Args:
            trainer: Trainer in a fit.
            loops: Counters of the other worker's fit.
        """
        host.go_to_progress(trainer, loops)
        self.loops = dict(loops)
        self._restore_loaders(trainer, self._loaders.state_dicts(trainer))
        self._parts = [{}]
        self.start(trainer)

    def start(self, trainer: pl.Trainer) -> None:
        """Restore everything that making the loaders' iterators has changed, and the place in the epoch."""
        parts, self._parts = self._parts, []
        if not parts:
            return
        first = parts[0]
        self._loaders.start()
        if self._can_rewind:  # which Lightning does not know when it looks, before the first batch
            self._ignored.enter_context(_ignore_warning("You're resuming from a checkpoint that ended before"))
        gradients = first.get("gradients", {})
        for name, p in trainer.lightning_module.named_parameters():
            if name in gradients:
                p.grad = to_distributed(gradients[name].to(p.device), like=p)
        random = first.get("random")
        if random is None:  # there were other workers
            _share_out_epoch(trainer, self._loaders.batch_ratio(first.get("batch_ratio", Fraction(1))))
        else:
            host.set_random_state(random)  # not earlier: making an iterator of the loader draws a seed
        self._begin_epoch(trainer)
        self._workers.load_gradients(parts)

    def _begin_epoch(self, trainer: pl.Trainer) -> None:
        """Make the iterators of an epoch of which nothing is done yet, where Lightning takes those made before."""
        if not host.resumes_with_new_epoch(trainer):
            return
        if host.was_saved_at_epoch_end(trainer):
            host.begin_new_epoch(trainer)
        for loader in host.train_loaders(trainer) or []:
            host.set_sampler_epoch(loader, host.epochs_done(trainer))
        _pass_over_validation(trainer)
        host.make_train_iterators(trainer)
        if host.forget_stage(trainer):
            self._validation_is_over = True

    def begin_batch(self, trainer: pl.Trainer) -> None:
        """Let validations of the epoch count again; in one that begins, from 0."""
        self._ignored.close()
        host.count_validation_progress(trainer)
        if self._validation_is_over:
            host.reset_validation_progress(trainer)
            self._validation_is_over = False

    def clear(self) -> None:
        """Forget the checkpoint, at the end of a fit."""
        self._ignored.close()
        self._parts, self.goes_on, self.loops = [], False, None


@contextmanager
def _ignore_warning(message: str) -> Iterator[None]:
    """Ignore warnings that begin with a message; filters that others set meanwhile stay."""
    before = list(warnings.filters)
    warnings.filterwarnings("ignore", re.escape(message))
    own = warnings.filters[0]
    try:
        yield
    finally:
        filters: Any = warnings.filters
        if own not in before and own in filters:
            filters.remove(own)


def _warn_of_settings(phrases: list[str]) -> None:
    if phrases:
        rank_zero_warn(
            f"Changed in the script since the checkpoint was written: {', '.join(phrases)}. The checkpoint's values "
            "hold, as always in Lightning: set others in on_train_start, or begin anew from the weights."
        )


def _load_part(io: CheckpointIO, path: Any, token: str, weights_only: bool | None, number: int) -> dict[str, Any]:
    return load_part(io, path, token, number, weights_only)


def _complete(rounds: dict[str, Any], others: Iterable[Mapping[str, Any]]) -> None:
    """Add the outer states of tensors that other workers step."""
    for other in others:
        rounds["sync"]["outer"]["state"].update(other["sync"]["outer"]["state"])


def _distributed(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A state dict of local shards as one of DTensors, where the optimizer's parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        i: {key: to_distributed(value, like=parameters[i]) for key, value in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": states}


def _share_out_epoch(trainer: pl.Trainer, batch_ratio: Fraction) -> None:
    """Count what other workers did in this epoch as batches of these.

    Args:
        trainer: Trainer in a fit.
        batch_ratio: Batches of one of these workers for one of the others'.
    """
    last = trainer.num_training_batches
    if not trainer.is_last_batch:
        begun = host.batches_begun(trainer, in_run=False)
        host.move_within_epoch(trainer, int(min(int(begun * batch_ratio), last - 1)))
    elif last != float("inf"):
        host.move_within_epoch(trainer, int(last))


def _pass_over_validation(trainer: pl.Trainer) -> None:
    """Draw the seeds of a validation that came after the save, as Lightning does, but only where there was one."""
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    count = host.batches_begun(trainer, in_run=epochs is None)
    due = epochs is None or host.epochs_done(trainer) % epochs == 0
    due = due and (every == float("inf") or (every is not None and count % every == 0))
    if due and trainer.enable_validation and host.was_saved_at_batch_end(trainer):
        host.pass_over_validation(trainer)
    host.keep_validation_progress(trainer)


def _count(num_parts: int, num_workers: int) -> str:
    one = "one of " if num_parts < num_workers else ""  # of those that come and go
    several = f" of {num_parts // num_workers} processes" if num_parts > num_workers else ""
    return f"{one}{num_workers} workers{several}"
