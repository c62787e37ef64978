"""Workers whose ranks share one model (FSDP2, tensor parallel): the plain tensors that each rank holds for a sync.

Such a worker is an island of ranks on a fast link. In a sync each rank exchanges its plain tensors with the same rank
of the other workers:

* `LocalShards`: the rank's own shards, without a copy, for outer steps that treat each coordinate by itself;
* `WholeTensors`: some tensors of the model, whole, for outer steps with statistics of rows, columns or matrices, and
  for codecs of matrices. The worker's ranks gather them before a sync, and scatter them after it.

Norms, totals and checksums are summed over the ranks of the worker, by `Communicator.inside_total`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_lopt.comm import Communicator
from lightning_lopt.functional.balance import least_loaded
from lightning_lopt.functional.precision import state_dtype

SUMS_SINCE = "2.8"  # set_force_sum_reduction_for_comms
FULLY_SHARD = (
    "For a model larger than a device use torch.distributed.fsdp.fully_shard (FSDP2) in configure_model: "
    "`mesh = self.device_mesh['data_parallel']`, `for block in self.blocks: fully_shard(block, mesh=mesh)`, "
    "`fully_shard(self, mesh=mesh)`, if self(...) is what the steps call; see ranks_per_worker."
)


class Box(NamedTuple):
    """A rank's piece of a tensor.

    Attributes:
        shape: Shape of the piece.
        offset: Its first index in the whole tensor, in each dimension.
    """

    shape: torch.Size
    offset: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Box:
        """The piece that this rank has of a tensor: all of it where it is not distributed."""
        if not isinstance(tensor, DTensor):
            return cls.whole(tensor)
        (chunk,) = tensor.__create_chunk_list__()  # the documented protocol of distributed checkpoints
        assert chunk.sizes == tensor.to_local().shape
        return cls(chunk.sizes, tuple(chunk.offsets))

    @classmethod
    def whole(cls, tensor: Tensor) -> Box:
        """All of a tensor."""
        return cls(tensor.shape, (0,) * tensor.ndim)

    def of_whole(self, whole: Tensor) -> Tensor:
        """This part of a whole tensor, as a view."""
        return whole[tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))]


@dataclass(frozen=True)
class Layout:
    """Pieces of a worker's model on one of its ranks.

    Attributes:
        groups: Names of the parameters of each group of the optimizer.
        sizes: Shape of each whole tensor, by name.
        boxes: Piece of each tensor that the rank holds for a sync, by name.
        shards: Piece of each tensor that the module itself has on the rank, by name.
    """

    groups: list[list[str]]
    sizes: dict[str, torch.Size]
    boxes: dict[str, Box]
    shards: dict[str, Box]

    @property
    def order(self) -> list[str]:
        """Names of all parameters of the optimizer."""
        return [name for group in self.groups for name in group]

    @property
    def held(self) -> list[str]:
        """Names of the parameters of which the rank holds a piece for a sync."""
        return [name for name in self.order if name in self.boxes]

    def state_dict(self) -> dict[str, Any]:
        """The layout as types that `torch.load(weights_only=True)` accepts."""
        boxes, shards = (
            {name: [list(box.shape), list(box.offset)] for name, box in boxes.items()}
            for boxes in (self.boxes, self.shards)
        )
        sizes = {name: list(size) for name, size in self.sizes.items()}
        return {"groups": self.groups, "sizes": sizes, "boxes": boxes, "shards": shards}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Layout:
        """Restore the result of `state_dict`."""
        boxes, shards = (
            {name: Box(torch.Size(shape), tuple(offset)) for name, (shape, offset) in state[key].items()}
            for key in ("boxes", "shards")
        )
        return cls(state["groups"], {n: torch.Size(size) for n, size in state["sizes"].items()}, boxes, shards)


def unwrapped(name: str) -> str:
    """The name of a tensor in a model of which no part is compiled or checkpoints its activations.

    So a checkpoint of either model resumes with the other.

    Example:
        >>> unwrapped("blocks.0._checkpoint_wrapped_module.weight")
        'blocks.0.weight'
    """
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def reshard(module: nn.Module) -> None:
    """Let a module free its gathered parameters.

    FSDP keeps some of them after a forward pass without a backward pass. They would be out of date once the shards are
    written, and they hide the DTensors from `named_parameters`.
    """
    for part in module.modules():
        method = getattr(part, "reshard", None)
        if callable(method):
            method()


class Held:
    """Tensors of a worker's model that one rank holds, under the names of a module and in the groups of an optimizer.

    Args:
        module: Module whose parameters may be DTensors over the ranks of the worker.
        optimizer: Local optimizer of these parameters.
        comm: Collectives among the workers, by column.

    Attributes:
        device: Device of the parameters.
        held: Plain tensor that stands for each parameter, of those that this rank holds.
    """

    shares_memory = False

    def __init__(self, module: nn.Module, optimizer: Any, comm: Communicator) -> None:
        self._module, self._optimizer, self._comm = module, optimizer, comm
        reshard(module)
        self._names: dict[Tensor, str] = {p: unwrapped(name) for name, p in module.named_parameters()}
        self.device = next(iter(self._names)).device
        self.held: dict[Tensor, nn.Parameter] = {}

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for parameter, held in self.held.items():
            yield self._names[parameter], held

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, buffer in self._module.named_buffers():
            yield unwrapped(name), buffer

    def get_submodule(self, target: str) -> nn.Module:
        return self._module.get_submodule(target)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups = self._optimizer.param_groups
        return [{**g, "params": [self.held[p] for p in g["params"] if p in self.held]} for g in groups]

    @property
    def state(self) -> Any:
        """States of the local optimizer, by the module's own parameters."""
        return self._optimizer.state

    def optimized(self) -> dict[Tensor, str]:
        """All parameters of the local optimizer with their names, those that other ranks hold included."""
        return {p: self._names[p] for group in self._optimizer.param_groups for p in group["params"]}

    def layout(self) -> Layout:
        """Pieces of the model on this rank."""
        shards = {name: Box.of(p) for p, name in self._names.items()}
        return Layout(
            [[self._names[p] for p in group["params"]] for group in self._optimizer.param_groups],
            {name: p.shape for p, name in self._names.items()},
            {self._names[p]: self._box_of_held(p) for p in self.held},
            shards,
        )

    def _box_of_held(self, parameter: Tensor) -> Box:
        return Box.of(parameter) if self.shares_memory else Box.whole(parameter)

    def changed_inside(self, names: set[str]) -> set[str]:
        """Names of tensors of which this rank's part has changed, or that of another rank that holds the same ones.

        Args:
            names: Names of those that have changed on this rank; all ranks of the worker must call it.
        """
        return names

    def whole(self, name: str, piece: Tensor | None) -> Tensor | None:
        """Put a tensor together from the pieces of the worker's ranks, all of which must call it.

        Args:
            name: Name of a parameter.
            piece: Values of what this rank holds of it, None if it has none.

        Returns:
            The whole tensor, None if no rank has a piece.
        """
        if not self._comm.any_inside(piece is not None, self.device):
            return None
        parameter = next(p for p, own in self._names.items() if own == name)
        whole = torch.zeros(parameter.shape, dtype=state_dtype(parameter), device=self.device)
        if piece is not None:
            self._box_of_held(parameter).of_whole(whole).copy_(piece)
        return self._comm.inside_total(whole)

    def pull(self) -> None:
        """Bring what is held up to date with the module."""
        for parameter, held in self.held.items():
            held.requires_grad_(parameter.requires_grad)

    def push(self) -> None:
        """Write what is held into the module."""
        raise NotImplementedError


class LocalShards(Held):
    """This rank's shards, which share the memory of the DTensors."""

    shares_memory = True

    def __init__(self, module: nn.Module, optimizer: Any, comm: Communicator) -> None:
        super().__init__(module, optimizer, comm)
        self.held = {p: nn.Parameter(local_shard(p), p.requires_grad) for p in self._names}

    def pull(self) -> None:
        super().pull()
        for parameter, held in self.held.items():
            local = local_shard(parameter)
            if held.data_ptr() != local.data_ptr():  # FSDP or a load put another tensor in its place
                held.data = local

    def push(self) -> None:
        reshard(self._module)

    def changed_inside(self, names: set[str]) -> set[str]:
        own = [*self._names.values()]
        flags = torch.tensor([name in names for name in own], dtype=torch.int64, device=self.device)
        anywhere = self._comm.inside_total(flags).tolist()
        return names | {name for name, number in zip(own, anywhere, strict=True) if number}


class WholeTensors(Held):
    """Some of the worker's tensors, whole; its other ranks hold the others.

    An all-to-all inside the worker gathers the pieces of a tensor on the rank that holds it, another one scatters them.
    Tensors are assigned in the order of their size, largest first, each to the rank that has the least so far. With R
    ranks, one that is larger than 1/R of the model makes them uneven.
    """

    def __init__(self, module: nn.Module, optimizer: Any, comm: Communicator) -> None:
        super().__init__(module, optimizer, comm)
        self._boxes = comm.gather_inside({name: Box.of(p) for p, name in self._names.items()})
        parameters = list(self._names)
        owners = least_loaded([p.numel() for p in parameters], [0] * comm.inside_size)
        self._owned = [[p for p, o in zip(parameters, owners, strict=True) if o == k] for k in range(comm.inside_size)]
        self.held = {
            p: nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=p.device), p.requires_grad)
            for p in self._owned[comm.inside_rank]
        }
        self.pull()

    @torch.no_grad()
    def pull(self) -> None:
        super().pull()
        outgoing = [[local_shard(p) for p in owned] for owned in self._owned]
        incoming = [[(p, self._box(rank, p).shape) for p in self.held] for rank in range(len(self._owned))]
        for rank, pieces in enumerate(self._exchange(outgoing, incoming)):
            for (parameter, held), piece in zip(self.held.items(), pieces, strict=True):
                self._box(rank, parameter).of_whole(held.data).copy_(piece)

    @torch.no_grad()
    def push(self) -> None:
        reshard(self._module)
        ranks = range(len(self._owned))
        outgoing = [[self._box(rank, p).of_whole(held.data) for p, held in self.held.items()] for rank in ranks]
        incoming = [[(p, local_shard(p).shape) for p in owned] for owned in self._owned]
        for owned, pieces in zip(self._owned, self._exchange(outgoing, incoming), strict=True):
            for parameter, piece in zip(owned, pieces, strict=True):
                local_shard(parameter).copy_(piece)

    def _box(self, rank: int, parameter: Tensor) -> Box:
        return self._boxes[rank][self._names[parameter]]

    def _exchange(
        self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[tuple[Tensor, torch.Size]]]
    ) -> list[list[Tensor]]:
        """Send pieces to each rank of the worker, and return those that it sends here.

        Args:
            outgoing: Pieces for each rank.
            incoming: Parameter and shape of each piece that comes, by the rank that sends it.
        """
        sent = [_bytes(pieces, self.device) for pieces in outgoing]
        sizes = [[shape.numel() * p.element_size() for p, shape in pieces] for pieces in incoming]
        arrived = self._comm.all_to_all_inside(torch.cat(sent), [len(b) for b in sent], [sum(s) for s in sizes])
        parts = arrived.split([sum(s) for s in sizes])
        return [
            [b.clone().view(p.dtype).view(shape) for b, (p, shape) in zip(part.split(s), pieces, strict=True)]
            for part, s, pieces in zip(parts, sizes, incoming, strict=True)
        ]


def to_local(tree: Any) -> Any:
    """Nested dictionaries and lists in which DTensors are replaced by copies of their local shards."""
    if isinstance(tree, DTensor):
        return local_shard(tree).clone()
    if isinstance(tree, Mapping):
        return {key: to_local(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [to_local(value) for value in tree]
    return tree


def to_distributed(local: Any, like: Tensor) -> Any:
    """Turn a local shard into a DTensor with the mesh and placements of another, and return all else unchanged."""
    if not (isinstance(like, DTensor) and isinstance(local, Tensor)) or local.shape != like.to_local().shape:
        return local
    mesh, placements, local = like.device_mesh, like.placements, local.to(like.device)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def has_dtensors(module: Any) -> bool:
    """Whether a model has DTensors among its parameters."""
    return any(isinstance(p, DTensor) for _, p in module.named_parameters())


def foreign_sharding(module: Any) -> str | None:
    """Explain why the ranks of a worker cannot share a module as it is wrapped, and what to do.

    Args:
        module: Module, of which parts may be wrapped.

    Returns:
        None for a module without FSDP1 and DeepSpeed.
    """
    if _has(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
        return (
            "Found modules that are wrapped with FullyShardedDataParallel (FSDP1), whose flat parameters have neither "
            f"names nor rows. {FULLY_SHARD}"
        )
    if _has(module, "deepspeed", "DeepSpeedEngine") or any(hasattr(p, "ds_id") for _, p in module.named_parameters()):
        return (
            "Found modules of DeepSpeed, which steps and saves copies of the parameters that a sync cannot reach. "
            f"Leave out deepspeed.initialize and deepspeed.zero.Init. {FULLY_SHARD}"
        )
    return None


def _has(module: Any, package: str, name: str) -> bool:
    """Whether a module has parts of a class of a package, which is not imported where nobody has."""
    kind = getattr(sys.modules.get(package), name, None)
    modules: Iterable[nn.Module] = module.modules() if isinstance(module, nn.Module) else ()
    return kind is not None and any(isinstance(part, kind) for part in modules)


def hold(module: Any, optimizer: Any, comm: Communicator, *, whole: bool) -> Held:
    """Return the tensors of a sharded model that this rank holds; all ranks must call it.

    FSDP sums gradients and divides them, from now on, where the backend's mean is none.

    Args:
        module: Module with DTensors.
        optimizer: Local optimizer of its parameters.
        comm: Collectives among the workers.
        whole: Whether the outer step or the compression needs whole tensors.

    Raises:
        ValueError: Each rank is a worker, a parameter lies on ranks of several workers or is offloaded, the ranks of a
            worker have other parameters, or gradients cannot be averaged.
    """
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            _check_place(name, parameter, comm.ranks_inside)
    shards = LocalShards(module, optimizer, comm)
    _let_gradients_be_means(module, shards.device, comm)
    layout = shards.layout()
    layouts = [Layout.from_state(state) for state in comm.gather_inside(layout.state_dict())]
    if any(other.sizes != layout.sizes for other in layouts):
        raise ValueError(
            "The ranks of a worker have other parameters, as the stages of a pipeline: they must share each layer. "
            "Build the same module on all of them, and shard it with fully_shard or tensor parallelism."
        )
    several = any(sum(o.shards[n].shape.numel() for o in layouts) > size.numel() for n, size in layout.sizes.items())
    return WholeTensors(module, optimizer, comm) if whole or several else shards


def _check_place(name: str, parameter: DTensor, ranks: Sequence[int]) -> None:
    """Refuse a parameter that lies elsewhere than on the devices of one worker, which has these ranks."""
    mesh = sorted(parameter.device_mesh.mesh.flatten().tolist())
    if len(ranks) == 1 and len(mesh) > 1:
        raise ValueError(
            f"{name} is sharded over {len(mesh)} ranks (DTensor), but each process is a worker here. Give the "
            f"ranks that share a model as ranks_per_worker={len(mesh)}, and shard over self.device_mesh in "
            "configure_model."
        )
    if not set(mesh) <= set(ranks):
        raise ValueError(
            f"{name} is sharded over the ranks {mesh}, and this worker has the ranks {[*ranks]}: the mesh of a "
            "DTensor must lie within one worker. Shard over self.device_mesh in configure_model."
        )
    if parameter.device.type != parameter.device_mesh.device_type:
        raise ValueError(
            f"{name} is on the device {parameter.device} and its mesh on {parameter.device_mesh.device_type}: shards "
            "that are offloaded cannot be exchanged between workers. Leave out offload_policy, and give a worker more "
            "ranks (ranks_per_worker) if memory is short."
        )


def _let_gradients_be_means(module: nn.Module, device: torch.device, comm: Communicator) -> None:
    """Let FSDP divide sums of gradients itself where the backend's mean is none."""
    if comm.averages_inside(device):
        return
    for part in module.modules():
        if not callable(getattr(part, "reshard", None)):
            continue
        force = getattr(part, "set_force_sum_reduction_for_comms", None)
        if force is None:
            raise ValueError(
                f"The process group's backend does not average in torch {torch.__version__}, so that FSDP's gradients "
                f"would be {comm.inside_size} times too large: use torch >= {SUMS_SINCE}, or a backend that averages "
                "(NCCL)."
            )
        force(True)


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank, in the same memory: all of it where it is not distributed."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _bytes(pieces: Sequence[Tensor], device: torch.device) -> Tensor:
    flat = [piece.contiguous().flatten().view(torch.uint8) for piece in pieces]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=device)
