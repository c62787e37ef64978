"""Callbacks that average weights over time, of workers whose weights differ between syncs.

Each worker's callback averages its own weights. Such averages are linear: if all workers take equal numbers of steps,
the mean over the workers of their averages is the average of the workers' mean, which is wanted. It replaces all of
them whenever somebody looks: at validation, in a checkpoint, at the end of training.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_lopt.functional.precision import state_dtype
from lightning_lopt.strategies import host
from lightning_lopt.strategies.errors import explain_lost_worker
from lightning_lopt.strategies.virtual import ProcessRounds
from lightning_lopt.sync.status import SyncPoint


def refuse_callbacks(trainer: pl.Trainer, num_workers: int, virtual_workers: int, *, elastic: bool = False) -> None:
    """Refuse callbacks that would end with wrong weights.

    Args:
        trainer: Trainer with the callbacks.
        num_workers: K, of all processes together.
        virtual_workers: Workers that share one process.
        elastic: Whether workers come and go.

    Raises:
        MisconfigurationException: SWA of a model with BatchNorm, any averaging of virtual workers or of those that come
            and go, or pruning.
    """
    if num_workers == 1:
        return
    for callback in host.callbacks_of(trainer):
        name = type(callback).__name__
        if virtual_workers > 1 and host.averages_weights(callback):
            raise MisconfigurationException(
                f"{name} would average the first of the virtual_workers alone, which is all that callbacks see. Use "
                "processes (Trainer(devices=K) without virtual_workers), or leave it out."
            )
        if elastic and host.averages_weights(callback):
            raise MisconfigurationException(
                f"{name} would average this worker's own weights: their mean over all needs collectives between the "
                "syncs, for which workers that come and go do not come together. Keep it in the module, as a "
                "submodule without gradients that on_train_batch_end updates: every sync averages it, and one that "
                "joins takes it over."
            )
        if isinstance(callback, ModelPruning):
            raise MisconfigurationException(
                f"{name} would choose each worker's mask by that worker's own weights, and the masks would differ. "
                "Prune before the fit, with torch.nn.utils.prune: then all workers have the mask of rank 0."
            )
        module = trainer.lightning_module
        if isinstance(callback, StochasticWeightAveraging) and callback.pl_module_contains_batch_norm(module):
            raise MisconfigurationException(
                f"{name} gives each worker other BatchNorm statistics in an epoch of its own after the last sync. Use "
                "EMAWeightAveraging, or WeightAveraging, whose averages are those of all workers."
            )


def sync_weight_averages(
    trainer: pl.Trainer,
    rounds: ProcessRounds | None,
    timeout: timedelta | None,
    join: Callable[[SyncPoint, str], None],
) -> None:
    """Give every worker's averaging callbacks the mean over the workers; in a fit, all workers must call it.

    Args:
        trainer: Trainer with the callbacks.
        rounds: Rounds of this fit, None before there are any.
        timeout: Time limit of the collectives.
        join: Function that makes sure that all workers have such callbacks.
    """
    if rounds is None or trainer.interrupted or trainer.state.fn != TrainerFn.FITTING:
        return
    models = [host.average_model_of(callback) for callback in host.callbacks_of(trainer)]
    tensors = [t for m in models if m is not None for t in (*m.parameters(), *m.buffers())]
    if not tensors or rounds.comm.num_workers == 1:
        return
    join(SyncPoint.COLLECTIVE, f"average {len(tensors)} tensors of {sum(t.numel() for t in tensors)} numbers")
    with explain_lost_worker(timeout), torch.no_grad():
        rounds.sync.wait()
        for dtype in dict.fromkeys(t.dtype for t in tensors if t.is_floating_point()):
            _average([t.detach() for t in tensors if t.dtype == dtype], rounds, trainer.strategy.root_device)


def _average(tensors: list[Tensor], rounds: ProcessRounds, device: torch.device) -> None:
    for t, mean in zip(tensors, rounds.comm.means([t.to(device, state_dtype(t)) for t in tensors]), strict=True):
        t.copy_(mean)
