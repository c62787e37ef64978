"""Workers whose ranks share one model: the mesh that `configure_model` shards over, and what follows from it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_lopt.islands import foreign_sharding, has_dtensors, reshard
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
            workers or a callback that copies the module; or it is not sharded, and ranks should share its matrices.
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
    for callback in host.callbacks_of(trainer):
        if host.averages_weights(callback):
            raise MisconfigurationException(
                f"{type(callback).__name__} copies the module, which a sharded one does not allow: leave it out."
            )


def _ranks_of(parameter: torch.Tensor) -> set[int]:
    """Ranks of the mesh of a parameter; none where it is not distributed."""
    return {*parameter.device_mesh.mesh.flatten().tolist()} if isinstance(parameter, DTensor) else set()


def full_state_dict(module: nn.Module) -> dict[str, Any]:
    """Whole tensors on the CPU of rank 0, nothing on the other ranks; all ranks of a worker must call it."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_full_state_dict(module: nn.Module, state: dict[str, Any], *, strict: bool) -> None:
    """Load whole tensors, which every rank has, into a sharded module."""
    reshard(module)
    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True, strict=strict))
