"""One module that K workers share, each with weights, buffers and optimizer states of its own."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lopt.sync.replica import OptimizerLike
from lightning_lopt.sync.unstepped import NamedTensors

_Named = dict[str, Tensor | None]


@dataclass
class _Aside:
    """The state of one worker when the turn of another one began.

    Attributes:
        states: States of each optimizer.
        options: Options of each optimizer's parameter groups, all but the parameters.
        gradients: Gradient of each parameter.
        tensors: Parameters and buffers that each submodule has, by its name: objects, which a worker may have replaced
            or registered. Values of those of the start are in `SharedModule.own`.
        others: Values of the other attributes that take turns.
    """

    states: list[dict[Any, Any]] = field(default_factory=list)
    options: list[list[dict[str, Any]]] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    tensors: dict[str, tuple[_Named, _Named]] = field(default_factory=dict)
    others: list[Any] = field(default_factory=list)


class _ModelView:
    """A worker's weights and buffers under the module's names."""

    def __init__(self, shared_module: SharedModule, rank: int, module: nn.Module) -> None:
        self._shared_module, self._rank, self._module = shared_module, rank, module

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._shared_module.parameters(self._rank).items()

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._shared_module.buffers(self._rank).items()

    def get_submodule(self, target: str) -> nn.Module:
        return self._module.get_submodule(target)


class _OptimizerView:
    """The groups and states of a local optimizer with one worker's parameters."""

    def __init__(self, shared_module: SharedModule, rank: int, optimizer: OptimizerLike) -> None:
        self._shared_module, self._rank, self._optimizer = shared_module, rank, optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        own = self._shared_module.own[self._rank]
        return [{**group, "params": [own[p] for p in group["params"]]} for group in self._optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        own = self._shared_module.own[self._rank]
        return {own[p]: s for state in self._shared_module.states(self._rank) for p, s in state.items() if p in own}


class SharedModule:
    """Weights, buffers, optimizer states and options of K workers, of which one is in the module at a time.

    Nothing is copied when the turn changes: tensors of the module are pointed to the next worker's. Options that
    somebody changes between the workers' turns (a learning rate, a new parameter group) change for all of them.

    Args:
        module: Module whose parameters and buffers are the first worker's, and copied for the others.
        optimizers: Optimizers of the module.
        num_workers: Number of workers K >= 2.
        gradients: Whether gradients take turns, too; otherwise they belong to the worker that had the last turn.
        others: Objects and names of attributes that take turns, too, copied for each worker.

    Attributes:
        num_workers: Number of workers K.
        own: Tensors of each worker, by those of the module.
        active: The worker whose turn it is.

    Example:
        >>> import torch
        >>> module = torch.nn.Linear(1, 1)
        >>> shared_module = SharedModule(module, [torch.optim.SGD(module.parameters(), lr=0.1)], num_workers=2)
        >>> for worker in shared_module.turns():
        ...     _ = module.weight.data.fill_(worker)
        >>> [shared_module.own[k][module.weight].item() for k in range(2)]
        [0.0, 1.0]
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        num_workers: int,
        *,
        gradients: bool = False,
        others: Sequence[tuple[Any, str]] = (),
    ) -> None:
        self.num_workers = num_workers
        self.active = 0
        self._module, self._parameters = module, dict(module.named_parameters())
        self._optimizers, self._gradients, self._others = optimizers, gradients, others
        held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        tensors = [*self._parameters.values(), *module.buffers(), *held]
        self.own = [{t: _like(t, copied=k > 0) for t in dict.fromkeys(tensors)} for k in range(num_workers)]
        self._aside = [_Aside() for _ in range(num_workers)]
        self.collect()
        self._seen = self._aside[0].options
        for aside in self._aside[1:]:
            aside.states = [{p: copy.deepcopy(s) for p, s in state.items()} for state in self._aside[0].states]
            aside.options = self._present_options()
            aside.gradients = [None for _ in self._aside[0].gradients]
            aside.tensors = _present_tensors(module)
            aside.others = copy.deepcopy(self._aside[0].others)

    def model(self, rank: int) -> NamedTensors:
        """The module as one worker's `Replica` sees it."""
        return _ModelView(self, rank, self._module)

    def buffers(self, rank: int) -> dict[str, Tensor]:
        """Buffers of one worker by name, those included that it replaced or registered."""
        return self._named(rank, 1)

    def parameters(self, rank: int) -> dict[str, Tensor]:
        """The same for parameters."""
        return self._named(rank, 0)

    def _named(self, rank: int, kind: int) -> dict[str, Tensor]:
        own, named, known = self.own[rank], {}, set()
        for path, both in self._aside[rank].tensors.items():
            for name, tensor in both[kind].items():
                if tensor is not None and tensor not in known:
                    known.add(tensor)
                    named[f"{path}.{name}" if path else name] = own.get(tensor, tensor)
        return named

    def optimizer(self, rank: int, optimizer: OptimizerLike) -> OptimizerLike:
        """The local optimizer as one worker's `Replica` sees it."""
        return _OptimizerView(self, rank, optimizer)

    def states(self, rank: int) -> list[dict[Any, Any]]:
        """States that the optimizers have of one worker; the dictionaries can be changed."""
        return self._aside[rank].states

    def gradients(self, rank: int) -> dict[str, Tensor]:
        """Gradients of one worker by name."""
        pairs = zip(self._parameters, self._aside[rank].gradients, strict=self._gradients)
        return {name: gradient for name, gradient in pairs if gradient is not None}

    def set_gradients(self, rank: int, gradients: Mapping[str, Tensor]) -> None:
        """Restore the result of `gradients`, for a worker that is not active."""
        named = self._parameters.items()
        self._aside[rank].gradients = [gradients[n].to(p.device) if n in gradients else None for n, p in named]

    def others(self) -> Iterator[int]:
        """Give every worker but the first a turn; then the first is in the module again."""
        self._spread_options()
        for rank in range(1, self.num_workers):
            self.activate(rank)
            yield rank
        self.activate(0)
        self._seen = self._present_options()

    def turns(self) -> Iterator[int]:
        """Give every worker a turn; the first comes last, and stays in the module."""
        yield from self.others()
        yield 0
        self._seen = self._present_options()

    def activate(self, rank: int) -> None:
        """Give a worker its turn in the module."""
        if rank == self.active:
            return
        self.collect()
        self.active = rank
        self.show()
        aside = self._aside[rank]
        for optimizer, state, options in zip(self._optimizers, aside.states, aside.options, strict=True):
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, own in zip(optimizer.param_groups, options, strict=False):
                group.update(own)
        for (thing, name), value in zip(self._others, aside.others, strict=True):
            setattr(thing, name, value)
        for p, gradient in zip(self._parameters.values(), aside.gradients, strict=self._gradients):
            p.grad = gradient

    def collect(self) -> None:
        """Take note of the tensors and states that the active worker has in the module."""
        aside = self._aside[self.active]
        for tensor, own in self.own[self.active].items():
            own.data = tensor.data
        for p in self._parameters.values():
            for own in self.own:
                own[p].requires_grad = p.requires_grad
        aside.states = [dict(optimizer.state) for optimizer in self._optimizers]
        aside.options = self._present_options()
        aside.others = [getattr(thing, name) for thing, name in self._others]
        aside.gradients = [p.grad for p in self._parameters.values()] if self._gradients else []
        aside.tensors = _present_tensors(self._module)

    def show(self) -> None:
        """Point the module to the tensors of the active worker."""
        for tensor, own in self.own[self.active].items():
            tensor.data = own.data
        for path, both in self._aside[self.active].tensors.items():
            for present, own in zip(_tensors_of(self._module.get_submodule(path)), both, strict=True):
                present.clear()
                present.update(own)

    def spread(self, kept: Collection[str] = ()) -> None:
        """Give all workers the weights and buffers of the first, those included that it alone has.

        Args:
            kept: Names of those that stay their own.
        """
        first = {**self.parameters(0), **self.buffers(0)}
        for rank in range(1, self.num_workers):
            self._add_missing(rank)
            named = {**self.parameters(rank), **self.buffers(rank)}
            pairs = {own: self.own[0][tensor] for tensor, own in self.own[rank].items()}
            pairs |= {named[name]: value for name, value in first.items() if name in named}
            stay = {named[name] for name in kept if name in named}
            for own, value in pairs.items():
                if own not in stay:
                    own.data = value.data.clone()

    def _add_missing(self, rank: int) -> None:
        """Give a worker a copy of each parameter and buffer that the first one has registered since the start."""
        for path, both in self._aside[0].tensors.items():
            mine = self._aside[rank].tensors.setdefault(path, ({}, {}))
            for tensors, own in zip(both, mine, strict=True):
                new = {name: tensor for name, tensor in tensors.items() if own.get(name) is None}
                own.update({n: None if t is None else _like(t, copied=True) for n, t in new.items()})

    def versions(self) -> list[tuple[int, int]]:
        """Version counters and addresses of the module's parameters."""
        return [(p._version, p.data_ptr()) for p in self._parameters.values()]

    def _present_options(self) -> list[list[dict[str, Any]]]:
        return [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in self._optimizers]

    def _spread_options(self) -> None:
        """Give all workers the options that were changed since the first worker's last turn."""
        before, now = self._seen, self._present_options()
        for i, groups in enumerate(now):
            for j, group in enumerate(groups):
                old = before[i][j] if j < len(before[i]) else {}
                changed = {k: v for k, v in group.items() if k not in old or old[k] is not v}
                for aside in self._aside[1:]:
                    if j == len(aside.options[i]):
                        aside.options[i].append({})
                    aside.options[i][j].update(changed)


def _like(tensor: Tensor, *, copied: bool) -> Tensor:
    values = tensor.detach().clone() if copied else tensor.detach()
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _present_tensors(module: nn.Module) -> dict[str, tuple[_Named, _Named]]:
    found = {path: _tensors_of(submodule) for path, submodule in module.named_modules()}
    return {path: (dict(parameters), dict(buffers)) for path, (parameters, buffers) in found.items()}


def _tensors_of(module: nn.Module) -> tuple[_Named, _Named]:
    """Parameters and buffers that a module itself has, None for those without a value; changes change the module."""
    own = vars(module)  # no public function tells those without a value from those that do not exist
    return own["_parameters"], own["_buffers"]
