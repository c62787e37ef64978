"""Workers whose ranks share one model: the mesh that `configure_model` shards over, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_lopt.islands import Box, foreign_sharding, has_dtensors, reshard, to_distributed
from lightning_lopt.strategies import host

NOT_AFTER_EXCEPTION = (
    "After an exception a model that the ranks of a worker share cannot be saved: the other ranks may be gone. Go on "
    "from the last checkpoint before it."
)


class WorkerMesh:
    """The ranks of a run as a mesh of workers, and of each worker's ranks.

    Args:
        device: Device of this process.
        num_workers: K.
        ranks: Number of ranks of a worker R.
        tensor_parallel_size: Number of ranks that share the matrices of a layer; it divides R.

    Raises:
        ValueError: `tensor_parallel_size` does not divide R.
    """

    def __init__(self, device: torch.device, num_workers: int, ranks: int, tensor_parallel_size: int) -> None:
        if ranks % tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size={tensor_parallel_size} must divide the {ranks} ranks of a worker "
                "(ranks_per_worker)."
            )
        shape = (num_workers, ranks // tensor_parallel_size, tensor_parallel_size)
        names = ("worker", "data_parallel", "tensor_parallel")
        self._mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)

    @property
    def of_worker(self) -> DeviceMesh:
        """The worker's own mesh ("data_parallel", "tensor_parallel"), as `ModelParallelStrategy` gives it."""
        return self._mesh["data_parallel", "tensor_parallel"]

    def sampler_kwargs(self) -> dict[str, Any]:
        """Arguments of the training loaders' `DistributedSampler`.

        Together the ranks of a worker get in each step the samples that one rank with a larger batch would get; those
        that share the matrices of a layer (tensor parallel) get the same samples.
        """
        workers, size, _ = self._mesh.shape
        rank = self._mesh.get_local_rank("data_parallel") * workers + self._mesh.get_local_rank("worker")
        return {"num_replicas": workers * size, "rank": rank}

    def check_gradients(self, module: nn.Module) -> None:
        """Refuse a sharded module of which some gradients are those of one rank's samples.

        Args:
            module: Module that `configure_model` has sharded.

        Raises:
            MisconfigurationException: The mesh of a parameter in training lacks ranks that see other samples.
        """
        ranks = set(self._mesh["data_parallel"].mesh.flatten().tolist())
        alone = [name for name, p in module.named_parameters() if p.requires_grad and not ranks <= _ranks_of(p)]
        if len(ranks) > 1 and alone:
            raise MisconfigurationException(
                f"Nothing averages the gradients of {', '.join(alone)} over the ranks of a worker that see other "
                "samples: shard over self.device_mesh['data_parallel'] all that trains, at the end by "
                "`fully_shard(self, mesh=mesh)`, or freeze it."
            )


def check_islands(trainer: pl.Trainer, virtual_workers: int, tensor_parallel_size: int = 1) -> None:
    """Refuse what a sharded model does not allow.

    Args:
        trainer: Trainer whose module is configured.
        virtual_workers: Workers that share one process.
        tensor_parallel_size: Number of ranks that share the matrices of a layer.

    Raises:
        MisconfigurationException: The module is wrapped by FSDP1 or DeepSpeed, or it is sharded and there are virtual
            workers, `sync_batchnorm=True` or a callback that copies the module; or it is not sharded, and ranks should
            share its matrices.
    """
    module = trainer.lightning_module
    if (reason := foreign_sharding(module)) is not None:
        raise MisconfigurationException(reason)
    if not has_dtensors(module):
        if tensor_parallel_size > 1:
            raise MisconfigurationException(
                f"tensor_parallel_size={tensor_parallel_size}, but configure_model shards nothing over "
                "self.device_mesh['tensor_parallel']: each rank would train the whole model. Leave it out, or give "
                "ranks_per_worker, and call torch.distributed.tensor.parallel.parallelize_module in configure_model."
            )
        return
    if virtual_workers > 1:
        raise MisconfigurationException(
            "virtual_workers take turns in one module, which cannot be sharded over processes: use "
            "Trainer(devices=K * R) with ranks_per_worker=R."
        )
    if host.has_synced_batch_norm(trainer):
        raise MisconfigurationException(
            "sync_batchnorm=True replaces layers of which FSDP already holds the parameters. Leave it out, and convert "
            "them in configure_model before fully_shard: `torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model, "
            "self.device_mesh['data_parallel'].get_group())` takes statistics over the ranks of a worker."
        )
    for callback in host.callbacks_of(trainer):
        if host.averages_weights(callback):
            raise MisconfigurationException(
                f"{type(callback).__name__} copies the module, which a sharded one does not allow: leave it out. An "
                "average of weights can be a second model that configure_model shards like the first, and that "
                "on_train_batch_end moves toward it (under torch.no_grad): every sync averages it, too."
            )


def _ranks_of(parameter: torch.Tensor) -> set[int]:
    """Ranks of the mesh of a parameter; none where it is not distributed."""
    return {*parameter.device_mesh.mesh.flatten().tolist()} if isinstance(parameter, DTensor) else set()


def full_state_dict(module: nn.Module) -> dict[str, Any]:
    """Copies of whole tensors, under the names of `module.state_dict()`, on the CPU of rank 0; nothing on other ranks.

    All ranks must call it; they gather one tensor at a time.
    """
    reshard(module)
    whole = {}
    for name, value in module.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if dist.get_rank() == 0:
            whole[name] = value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
    return whole


def load_full_state_dict(module: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Load whole tensors, which every rank has, into a sharded module."""
    reshard(module)
    own = module.state_dict()
    module.load_state_dict({name: _shard_of(value, own.get(name)) for name, value in state.items()}, strict=strict)


def _shard_of(value: Any, like: Any) -> Any:
    """This rank's shard of a whole tensor; what is not sharded, or has another shape, as it is."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return to_distributed(Box.of(like).of_whole(value), like)


@contextmanager
def explain_shards() -> Iterator[None]:
    """Say what to shard where a layer meets its shards in place of its parameters."""
    try:
        yield
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" not in str(error):
            raise
        raise MisconfigurationException(
            "A layer was called while its parameters were in shards: FSDP gathers them when the very module is called "
            "that was given to fully_shard. End configure_model with `fully_shard(self.model, mesh=mesh)` where the "
            "steps call self.model(...), and with `fully_shard(self, mesh=mesh)` where they call self(...)."
        ) from error
