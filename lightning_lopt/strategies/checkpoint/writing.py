"""Writing a checkpoint with every worker's part.

Parts lie in the same file while they are small. Large ones are not sent through rank 0: each process writes a file of
its own beside the checkpoint (`worker_files`).

Sizes, in numbers per parameter of the model:

| content | where | numbers |
|---|---|---|
| global weights | checkpoint | 1 |
| anchor | checkpoint | 1 |
| state of the outer optimizer | checkpoint | 0 for averaging, 1 with momentum, 2 with Adam, 4 to 8 if it is learned |
| weights and state of the local optimizer | each part | 1 with SGD, 2 with momentum, 3 with Adam |
| residuals of compression | each part | 1 |
| states of a `LinearCodec` | checkpoint | rank / n per matrix of n rows with `PowerSGD(rank)` |
| values of a sync in flight, mean and own | checkpoint and each part | 1 and 1, or the share that is sent |
| gradients that are accumulating | each part | 1 |

Where ranks share a model, each writes the pieces that it holds into its part: anchors, outer state, and all that is
local. The checkpoint has the global weights alone, as whole tensors, which rank 0 gathers one by one on its host.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lightning_lopt.comm import Communicator
from lightning_lopt.islands import to_local
from lightning_lopt.strategies import host
from lightning_lopt.strategies.checkpoint.entry import CHECKPOINT_KEY, new_entry
from lightning_lopt.strategies.checkpoint.worker_files import part_file, remove_parts
from lightning_lopt.strategies.errors import explain_lost_worker, run_on_all
from lightning_lopt.strategies.loaders import ResumableLoaders
from lightning_lopt.strategies.virtual import ProcessRounds, ProcessWorkers

if TYPE_CHECKING:
    from lightning_lopt.strategies.local_sgd import LocalSGD

GATHER_BYTES = 2**27  # parameters of all workers together; more are not gathered


class CheckpointWriter:
    """Adds every worker's part to a checkpoint and writes it, on all processes or none.

    Args:
        strategy: Strategy of the fit.
        workers: Workers of this process.
        loaders: Training loaders of the fit.
    """

    def __init__(self, strategy: LocalSGD, workers: ProcessWorkers, loaders: ResumableLoaders) -> None:
        self._strategy, self._workers, self._loaders = strategy, workers, loaders

    def write(
        self,
        trainer: pl.Trainer,
        rounds: ProcessRounds,
        comm: Communicator,
        checkpoint: dict[str, Any],
        path: Any,
        write: Callable[[], None],
        *,
        accumulating: bool,
    ) -> None:
        """Write a checkpoint; all processes must call it, but after an exception none waits for the others.

        Args:
            trainer: Trainer in a fit.
            rounds: Rounds of the fit.
            comm: Collectives of the processes.
            checkpoint: Checkpoint that Lightning made on this process, to which an entry is added.
            path: Path of the checkpoint, as this process names it.
            write: Function that writes the checkpoint on rank 0, and does nothing elsewhere.
            accumulating: Whether the present gradients are yet to be used by a step.

        Raises:
            RuntimeError: Another process could not write its part.
            WorkerLostError: Another process did not come.
        """
        strategy, alone = self._strategy, trainer.interrupted
        layout = rounds.sync.replica.layout()
        entry = new_entry(strategy.num_workers, strategy.num_parts, strategy.given, {}, islands=layout is not None)
        checkpoint[CHECKPOINT_KEY] = entry
        if layout is None:
            entry["rounds"] = rounds.state_dict(alone=alone)
        else:  # every rank has its own
            checkpoint["optimizer_states"] = to_local(checkpoint["optimizer_states"])
        if alone:  # the other workers may be gone: nothing of theirs can be saved
            write()
            return
        with explain_lost_worker(strategy.timeout):
            part = self._part(trainer, rounds, checkpoint, accumulating=accumulating)
        if layout is not None:
            del checkpoint["optimizer_states"]  # which are this rank's shards
        if not self._too_large_to_gather(trainer):
            with explain_lost_worker(strategy.timeout):
                gathered = comm.gather_objects(self._workers.parts(trainer, part))
            entry["parts"] = None if gathered is None else [part for parts in gathered for part in parts]
            self._write_on_all(path, write)
            return
        token, main = strategy.broadcast((uuid.uuid4().hex[:12], str(path)))
        entry["files"] = {"token": token}
        own = {"token": token, "rank": strategy.global_rank, **part}
        file = part_file(main, token, strategy.global_rank)
        self._write_on_all(path, partial(strategy.part_io.save_checkpoint, own, file))
        self._write_on_all(path, write)  # the checkpoint appears when all of its files are there
        share = strategy.global_rank, strategy.world_size
        remove_parts(strategy.part_io, main, keep=2, share=share)  # an asynchronous writer may yet be at the last one

    def remove_files(self, path: Any) -> None:
        """Delete all parts beside a checkpoint that is deleted, also those that more processes wrote.

        Args:
            path: Path of the checkpoint.
        """
        if self._strategy.is_global_zero:  # others may have another name for it, or keep it, where steps are unequal
            remove_parts(self._strategy.part_io, path)

    def _part(
        self, trainer: pl.Trainer, rounds: ProcessRounds, checkpoint: dict[str, Any], *, accumulating: bool
    ) -> dict[str, Any]:
        """Return the part of this process's first worker: all that it cannot take over from rank 0."""
        own = ["optimizer_states", "lr_schedulers", "loops", "callbacks", type(trainer.precision_plugin).__qualname__]
        named = trainer.lightning_module.named_parameters()
        layout = rounds.sync.replica.layout()
        shared = {} if layout is None else {"layout": layout.state_dict(), "rounds": rounds.state_dict()}
        return {
            "checkpoint": {name: checkpoint[name] for name in own if name in checkpoint},
            **shared,
            "local": rounds.local_state(),
            "random": host.random_state(),
            "gradients": {name: to_local(p.grad).clone() for name, p in named if accumulating and p.grad is not None},
            "loaders": self._loaders.state_dicts(trainer),
        }

    def _too_large_to_gather(self, trainer: pl.Trainer) -> bool:
        world_size = self._strategy.world_size
        size = sum(p.numel() * p.element_size() for p in trainer.lightning_module.parameters())
        return world_size > 1 and size * world_size > GATHER_BYTES

    def _write_on_all(self, path: Any, write: Callable[[], None]) -> None:
        elsewhere = RuntimeError(
            f"Another worker could not write its part of {path}: see its error. The checkpoints before it are intact."
        )
        run_on_all(self._strategy, write, elsewhere)
