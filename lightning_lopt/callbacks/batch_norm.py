"""Re-estimation of BatchNorm's running statistics for the global weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import has_iterable_dataset
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from lightning_lopt.callbacks.access import rounds_of
from lightning_lopt.strategies import LocalSGD, host
from lightning_lopt.sync.status import SyncPoint


class BatchNormReestimation(Callback):
    r"""Estimate the running statistics of BatchNorm anew for the global weights, before they are evaluated.

    .. math:: \mu \leftarrow \tfrac1n \textstyle\sum_b \mathrm{mean}(x_b), \qquad
        \sigma^2 \leftarrow \tfrac1n \textstyle\sum_b \mathrm{var}(x_b)

    over n training batches b. Between syncs each worker's running statistics follow its own weights. Their average need
    not fit the average of the weights, the less the longer the rounds are. This is `torch.optim.swa_utils.update_bn`
    for several workers: the batches are shared out, and the estimates are averaged. It happens before each validation,
    so that a checkpoint written at its end holds these statistics too, and once for good when training ends. Training
    itself, its running statistics and random states are left as they are.

    Each layer is in the mode in which it trains: dropout is active, as in `update_bn`, and BatchNorm that is frozen by
    ``eval()`` keeps its statistics. If the optimizer has a mode for evaluation (schedule-free), call its ``eval()`` in
    `on_validation_model_eval`, so that the estimates are for the weights of that mode.

    The batches are random ones of the training set, always the same. The module's `forward` gets the first element of
    a batch that is a tuple or a list, else the batch.

    Args:
        num_batches: Number n >= 1 of batches of all workers together, rounded up to a multiple of K.

    Raises:
        ValueError: `num_batches` < 1.
        MisconfigurationException: The Trainer's strategy is not one of this package, or has virtual workers, or its
            training data is not one `DataLoader` of a map-style dataset.

    Source: arXiv 2310.14423, appendix on BatchNorm.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_lopt import BatchNormReestimation, LocalSGD
        >>> trainer = Trainer(accelerator="cpu", strategy=LocalSGD(), callbacks=[BatchNormReestimation()], logger=False)
    """

    def __init__(self, num_batches: int = 32) -> None:
        if num_batches < 1:
            raise ValueError(f"num_batches must be at least 1, not {num_batches!r}.")
        self.num_batches = num_batches

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, LocalSGD) and trainer.strategy.elastic is not None:
            raise MisconfigurationException(
                "BatchNormReestimation averages over the workers between syncs, for which workers that come and go do "
                "not come together. Leave it out: every sync averages the running statistics."
            )
        if isinstance(trainer.strategy, LocalSGD) and trainer.strategy.num_parts > trainer.world_size:
            raise MisconfigurationException(
                "BatchNormReestimation would reach the first of the virtual_workers alone, which is all that callbacks "
                "see. Use processes (Trainer(devices=K) without virtual_workers), or leave it out."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not any(map(host.is_normalization_layer, pl_module.modules())):
            rank_zero_warn(
                f"BatchNormReestimation finds no BatchNorm with running statistics in {type(pl_module).__name__}, and "
                "does nothing: leave it out."
            )

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            named = host.modes_before_validation(trainer)
            modes: dict[nn.Module, bool] = {m: named.get(name, m.training) for name, m in pl_module.named_modules()}
            buffers = [b for norm in _trained_norms(modes) for b in norm.buffers()]
            swap = rounds_of(trainer, self).sync.swap
            swap.put((b, b.clone()) for b in buffers)  # undone by the strategy
            self._reestimate(trainer, pl_module, modes)
            swap.put((b, b.clone()) for b in buffers)  # to be shown: what is written would stay

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.interrupted:
            self._reestimate(trainer, pl_module, {m: m.training for m in pl_module.modules()})

    @torch.no_grad()
    def _reestimate(self, trainer: pl.Trainer, module: pl.LightningModule, in_training: dict[nn.Module, bool]) -> None:
        """Overwrite the statistics, the same on all workers.

        Args:
            trainer: Trainer in a fit.
            module: Module with the layers.
            in_training: Whether each module is in training mode while it trains.
        """
        comm, norms = rounds_of(trainer, self).comm, _trained_norms(in_training)
        if not norms:
            return
        assert isinstance(trainer.strategy, LocalSGD)
        trainer.strategy.join(SyncPoint.COLLECTIVE, f"BatchNormReestimation of {len(norms)}")
        momenta, before = [norm.momentum for norm in norms], {m: m.training for m in in_training}
        _set_modes(in_training)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
        with isolate_rng(), trainer.precision_plugin.train_step_context():
            for batch in self._batches(trainer, comm.rank, comm.num_workers):
                batch = trainer.precision_plugin.convert_input(batch)
                batch = trainer.strategy.batch_to_device(batch, module.device)
                module(batch[0] if isinstance(batch, list | tuple) else batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        _set_modes(before)
        statistics = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
        means = comm.means([s.to(torch.promote_types(s.dtype, torch.float32)) for s in statistics])
        for statistic, mean in zip(statistics, means, strict=True):
            statistic.copy_(mean)

    def _batches(self, trainer: pl.Trainer, rank: int, num_workers: int) -> Iterator[Any]:
        """The batches of one worker."""
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader) or has_iterable_dataset(loader) or loader.batch_size is None:
            raise MisconfigurationException(
                "BatchNormReestimation draws batches from the training set and needs one DataLoader of a map-style "
                f"dataset with a batch_size, not {type(loader).__name__}."
            )
        share = math.ceil(self.num_batches / num_workers) * loader.batch_size
        size = len(loader.dataset)  # pyright: ignore[reportArgumentType]
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        chosen = order[torch.arange(rank * share, (rank + 1) * share) % size].tolist()
        yield from DataLoader(Subset(loader.dataset, chosen), loader.batch_size, collate_fn=loader.collate_fn)


def _trained_norms(in_training: dict[nn.Module, bool]) -> list[host.Norm]:
    """Return the BatchNorm layers whose running statistics change in training."""
    return [m for m, training in in_training.items() if training and host.is_normalization_layer(m)]


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    for m, training in modes.items():
        m.training = training
