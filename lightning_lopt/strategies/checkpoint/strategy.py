"""Checkpoints that hold every worker's state, so that a run goes on as if it had never stopped.

A checkpoint is Lightning's own, with the global weights as `state_dict`, and one more key. It holds the counters, the
float32 anchors and the outer optimizer's state, which all workers share, and a list of what each worker has for
itself. That list lies in the same file while it is small; a large one is not sent through rank 0: each worker writes
a file of its own beside the checkpoint.
"""

from __future__ import annotations

import copy
import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from typing import Any, TypeVar, cast

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_lopt.rounds import Rounds
from lightning_lopt.strategies.checkpoint.atomic import AtomicCheckpointIO, CheckpointError
from lightning_lopt.strategies.checkpoint.worker_files import load_part, merged, part_file, remove_parts
from lightning_lopt.strategies.loaders import ResumableLoaders, random_state, set_random_state
from lightning_lopt.strategies.signals import explained

CHECKPOINT_KEY = "lightning_lopt"
CHECKPOINT_VERSION = 8
GATHER_BYTES = 2**27  # parameters of all workers together; more are not gathered
T = TypeVar("T")


class CheckpointingStrategy(DDPStrategy):
    """DDP's launching and process groups, and checkpoints that hold what belongs to each worker.

    Attributes:
        rounds: the `Rounds` of the present fit, None before.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rounds: Rounds | None = None
        self._own: list[dict[str, Any]] | None = None  # this process's part of the checkpoint that is being restored
        self._resumed = False  # in the middle of a run
        self._at_epoch_start = False
        self._stepped = False  # an optimizer did, in this batch
        self._loaders = ResumableLoaders()
        self._at_once = 1  # batches that make a step

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()  # taken only where none was given
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    # -- saving ---------------------------------------------------------------------------------------------------

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.rounds is None or "optimizer_states" not in checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        rounds, alone = self.rounds, self._trainer.interrupted
        shared = rounds.state_dict(alone=alone)
        state = {"version": CHECKPOINT_VERSION, "rounds": shared, "workers": None, "files": None}
        checkpoint[CHECKPOINT_KEY] = state
        if alone:  # the other workers may be gone: nothing of theirs can be saved
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        write = partial(super().save_checkpoint, checkpoint, filepath, storage_options=storage_options)
        if not self._too_large_to_gather():
            with explained(self._timeout):
                state["workers"] = self._gather_workers(checkpoint)
            self._write(filepath, write)
            return
        token, main = self.broadcast((uuid.uuid4().hex[:12], str(filepath)))
        state["files"] = {"token": token, "num_workers": self.world_size}
        own = part_file(main, token, self.global_rank)
        mine = {"token": token, "rank": self.global_rank, **self._worker_state(checkpoint)}
        self._write(filepath, partial(AtomicCheckpointIO().save_checkpoint, mine, own))
        self._write(filepath, write)  # the checkpoint appears when all of its files are there
        remove_parts(main, self.global_rank, keep=2)  # an asynchronous writer may yet be at the last one

    def _as_one(self, work: Callable[[], T], elsewhere: Exception) -> T:
        """Do it on every worker; if any cannot, none goes on, or waits for it: the others raise `elsewhere`."""
        result, problem = None, None
        try:
            result = work()
        except Exception as error:
            problem = error
        with explained(self._timeout):
            fine = self.reduce_boolean_decision(problem is None)
        if not fine:
            raise problem or elsewhere
        return cast(T, result)

    def _write(self, filepath: Any, write: Callable[[], None]) -> None:
        elsewhere = RuntimeError(
            f"Another worker could not write its part of {filepath}: see its error. The checkpoints before it are "
            "intact."
        )
        self._as_one(write, elsewhere)

    def _too_large_to_gather(self) -> bool:
        assert self.lightning_module is not None
        size = sum(p.numel() * p.element_size() for p in self.lightning_module.parameters())
        return self.world_size > 1 and size * self.world_size > GATHER_BYTES

    def _gather_workers(self, checkpoint: dict[str, Any]) -> list[dict[str, Any]] | None:
        """On rank 0, what each worker cannot take over from it."""
        assert self.rounds is not None
        return self.rounds.comm.gather_objects(self._worker_state(checkpoint))

    def _worker_state(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What this worker cannot take over from rank 0."""
        assert self.rounds is not None
        own = ["optimizer_states", "lr_schedulers", "loops", "callbacks", type(self.precision_plugin).__qualname__]
        trainer = self._trainer
        automatic = trainer.lightning_module.automatic_optimization
        accumulating = trainer.fit_loop._should_accumulate() if automatic else not self._stepped
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        combined = trainer.fit_loop._combined_loader
        return {
            "checkpoint": {name: checkpoint[name] for name in own if name in checkpoint},
            "local": self.rounds.local_state(),
            "random": random_state(),
            "gradients": self._gradients() if accumulating else {},
            "loaders": self._loaders.state_dicts(
                batches if batches < trainer.num_training_batches else 0,
                cycle=combined is not None and combined._mode == "max_size_cycle",
            ),
        }

    def _gradients(self) -> dict[str, torch.Tensor]:
        assert self.lightning_module is not None
        named = self.lightning_module.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero:  # others may have another name for it, or keep it, where steps are unequal
            for rank in range(self.world_size):
                remove_parts(filepath, rank, keep=0)

    # -- restoring ------------------------------------------------------------------------------------------------

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint_path = self.broadcast(checkpoint_path)  # "best" may be another name where steps are unequal
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        state = checkpoint.get(CHECKPOINT_KEY)
        self._own = None
        if state is None or self._trainer.state.fn != TrainerFn.FITTING:
            return checkpoint
        if state["version"] != CHECKPOINT_VERSION:
            raise ValueError(
                f"This checkpoint has version {state['version']}, this release reads {CHECKPOINT_VERSION}. Resume with "
                "the release that wrote it, or begin anew from its weights: load_from_checkpoint."
            )
        self._own = self._choose_own(state, checkpoint_path, weights_only)
        if self._own is not None:
            checkpoint.update(self._own[0]["checkpoint"])
        return checkpoint

    @property
    def num_workers(self) -> int:
        """Parts of a checkpoint: one of each process."""
        return self.world_size

    @property
    def _own_ranks(self) -> list[int]:
        """The parts that belong to this process."""
        return [self.global_rank]

    @property
    def _num_sending(self) -> int:
        """Workers of a mean, which may have several processes each."""
        return self.num_workers

    def _choose_own(self, state: dict[str, Any], path: Any, weights_only: bool | None) -> list[dict[str, Any]] | None:
        """The parts of this process, None if there are none for it."""
        workers, files = state.pop("workers"), state.pop("files")
        if workers is None and files is None:
            rank_zero_warn(
                "The checkpoint was written after an exception: all workers continue from its last synced weights with "
                "the first worker's optimizer state."
            )
            return None
        num_parts = files["num_workers"] if workers is None else len(workers)
        saved, present = (num_parts, len(state["rounds"]["seconds"])), (self.num_workers, self._num_sending)
        ranks = range(num_parts) if saved != present else self._own_ranks
        if workers is not None:
            parts = (workers[rank] for rank in ranks)
        else:
            real = os.path.realpath(path) if _is_local_file_protocol(path) else path  # "last" may be a link
            parts = (load_part(self.checkpoint_io, real, files["token"], rank, weights_only) for rank in ranks)
        elsewhere = CheckpointError(f"Another worker could not read its file beside {path}: see its error.")
        if saved == present:
            return self._as_one(partial(list, parts), elsewhere)
        rank_zero_warn(
            f"The checkpoint holds {_count(*saved)}, there are {_count(*present)} now: all continue from the mean of "
            "their weights, optimizer states and error feedback. Their random states, gradients that were accumulating "
            "and the states of loaders that have their own are dropped."
        )
        state["rounds"]["sync"]["exchange"] = None
        part = self._as_one(partial(merged, parts, self.num_workers), elsewhere)
        part["checkpoint"]["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)
        return [part, *(copy.deepcopy(part) for _ in self._own_ranks[1:])]

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.rounds is not None
        super().load_optimizer_state_dict(checkpoint)
        state = checkpoint.get(CHECKPOINT_KEY)
        if state is None:
            rank_zero_warn("This checkpoint was not written by a lightning_lopt strategy: a fresh round begins.")
            return
        self.rounds.load_state_dict(state["rounds"])
        if self._own is None:
            self.rounds.abandon_round()
            return
        self._resumed = True
        self.rounds.load_local_state(self._own[0]["local"])
        loop = self._trainer.fit_loop
        self._loaders.load_state_dicts(self._own[0]["loaders"], loop.epoch_progress.current.processed)
        if loop._combined_loader is not None:  # configure_optimizers asked for the number of steps
            loop._load_combined_loader_states()
            iter(loop._data_fetcher)
        if None not in self._own[0]["loaders"]:
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")

    @override
    def process_dataloader(self, dataloader: object) -> object:
        dataloader = super().process_dataloader(dataloader)
        if self._trainer.training and self._trainer.state.fn == TrainerFn.FITTING:
            self._loaders.wrap(dataloader, self._trainer.fit_loop.epoch_progress.current.processed, self._at_once)
        return dataloader

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        parts, self._own = self._own, None
        if parts is None:
            return
        assert self.lightning_module is not None
        own = parts[0]
        self._loaders.start()
        for name, p in self.lightning_module.named_parameters():
            if name in own["gradients"]:
                p.grad = own["gradients"][name].to(p.device)
        if own["random"] is None:  # there were other workers
            self._share_out_epoch(own["share"])
        else:
            set_random_state(own["random"])  # not earlier: making an iterator of the loader draws a seed
        self._begin_epoch()

    def _share_out_epoch(self, share: Fraction) -> None:
        """Count what other workers did in this epoch as that many batches of these."""
        loop = self._trainer.fit_loop
        progress = loop.epoch_loop.batch_progress
        done, last = progress.current.ready, loop.max_batches
        if progress.is_last_batch and last == float("inf"):
            return
        new = last if progress.is_last_batch else min(int(done * share), last - 1)
        for name in ("ready", "started", "processed", "completed"):
            setattr(progress.current, name, getattr(progress.current, name) + new - done)

    def _begin_epoch(self) -> None:
        """Make the iterators of an epoch of which nothing is done yet, where Lightning takes those made before."""
        loop = self._trainer.fit_loop
        epoch_loop = loop.epoch_loop
        in_epoch = 0 < epoch_loop.batch_progress.current.processed < loop.max_batches
        ends_epoch_first = loop.restarted_mid_epoch and epoch_loop.restarted_on_last  # saved by its last validation
        if in_epoch or ends_epoch_first or loop.epoch_progress.current.processed == 0:
            return
        if not (loop.is_resuming or loop.restarting):
            return
        if loop.restarted_on_epoch_end:  # with max_steps; Lightning would train on in the epoch that is over
            loop.epoch_progress.increment_completed()
            _Loop.restarting.__set__(loop, False)  # its own setter says True with max_steps
        for loader in loop._combined_loader.flattened:
            _set_sampler_epoch(loader, loop.epoch_progress.current.processed)
        self._pass_over_validation()
        iter(loop._data_fetcher)
        if loop.restarted_mid_epoch or loop.restarted_on_epoch_end:
            loop.reset_restart_stage()  # else Lightning does not count the new epoch, nor calls its first hooks
            self._at_epoch_start = True

    def _pass_over_validation(self) -> None:
        """Draw the seeds of a validation that came after the save, as Lightning does, but only where there was one."""
        trainer, epoch_loop = self._trainer, self._trainer.fit_loop.epoch_loop
        every, epochs, batches = trainer.val_check_batch, trainer.check_val_every_n_epoch, epoch_loop.batch_progress
        count = batches.total.ready if epochs is None else batches.current.ready
        due = epochs is None or trainer.fit_loop.epoch_progress.current.processed % epochs == 0
        due = due and (every == float("inf") or (every is not None and count % every == 0))
        if due and trainer.enable_validation and epoch_loop.restarted_on_train_batch_end:
            epoch_loop.val_loop.increment_progress_to_evaluation_end()
        # Lightning looks at the epoch that begins, at batch -1
        epoch_loop.val_loop.increment_progress_to_evaluation_end = int

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        val_loop = self._trainer.fit_loop.epoch_loop.val_loop
        vars(val_loop).pop("increment_progress_to_evaluation_end", None)
        if self._at_epoch_start:  # Lightning does so before it runs the last epoch's validation
            val_loop.batch_progress.total.reset()
            self._at_epoch_start = False

    @override
    def barrier(self, name: str | None = None) -> None:
        if name == "train_dataloader()":  # Lightning has asked for new ones
            self._loaders.unwrap()
        super().barrier(name)

    @override
    def teardown(self) -> None:
        self._own = None
        self._loaders.unwrap()
        self._loaders.load_state_dicts([], 0)
        super().teardown()

    @property
    def _trainer(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module.trainer


def _count(num_parts: int, num_workers: int) -> str:
    several = f" of {num_parts // num_workers} processes" if num_parts > num_workers else ""
    return f"{num_workers} workers{several}"
