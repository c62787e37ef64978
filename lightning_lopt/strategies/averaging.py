"""Callbacks that average weights over time, of workers whose weights differ between syncs.

Each worker's callback averages its own weights. Such averages are linear, so that the mean over the workers of their
averages is the average of their mean, which is wanted, if they take equal numbers of steps. It replaces all of them
whenever somebody looks: for validation, in a checkpoint, at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_lopt.rounds import Rounds
from lightning_lopt.strategies.signals import explained


def refuse_averaging(trainer: Any, processes: int, virtual_workers: int) -> None:
    """Refuse callbacks that would end with wrong weights.

    Args:
        trainer: with the callbacks.
        processes: workers that are processes.
        virtual_workers: of one process.

    Raises:
        MisconfigurationException: SWA in a model with BatchNorm, or any averaging of virtual workers.
    """
    if processes * virtual_workers == 1:
        return
    for callback in trainer.callbacks:
        name = type(callback).__name__
        if virtual_workers > 1 and (
            isinstance(callback, StochasticWeightAveraging) or hasattr(callback, "_average_model")
        ):
            raise MisconfigurationException(
                f"{name} would average the first of the virtual_workers alone, which is all that callbacks see. Use "
                "processes (Trainer(devices=K) without virtual_workers), or leave it out."
            )
        module = trainer.lightning_module
        if isinstance(callback, StochasticWeightAveraging) and callback.pl_module_contains_batch_norm(module):
            raise MisconfigurationException(
                f"{name} gives each worker other BatchNorm statistics in an epoch of its own after the last sync. Use "
                "EMAWeightAveraging, or WeightAveraging, whose averages are those of all workers."
            )


def sync_weight_averages(trainer: Any, rounds: Rounds | None) -> None:
    """Give every worker's averaging callbacks the mean over the workers; all of them must call it in a fit."""
    if rounds is None or trainer.interrupted or trainer.state.fn != TrainerFn.FITTING:
        return
    models = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    tensors = [t for m in models if isinstance(m, nn.Module) for t in (*m.parameters(), *m.buffers())]
    if not tensors or rounds.comm.num_workers == 1:
        return
    with explained(trainer.strategy._timeout), torch.no_grad():
        rounds.sync.wait()
        for dtype in dict.fromkeys(t.dtype for t in tensors if t.is_floating_point()):
            _average([t.detach() for t in tensors if t.dtype == dtype], rounds, trainer.strategy.root_device)


def _average(tensors: list[Tensor], rounds: Rounds, device: torch.device) -> None:
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    flat = torch.cat([t.flatten().to(device, wide) for t in tensors])
    rounds.comm.mean_(flat)
    for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(mean.view_as(t))
