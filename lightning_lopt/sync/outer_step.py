"""The outer step: averaging, or a torch optimizer on the anchors, with averaging as its guard."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lopt.comm import Communicator
from lightning_lopt.optim.outer import WORKER_GRADS, HasTotal, OuterFactory, read_contract
from lightning_lopt.sync.anchors import AnchoredParameter
from lightning_lopt.sync.flat import FlatBuffer, ParameterSlice, ReceivedSlice
from lightning_lopt.sync.settings import changed, changes, describe, warn_of_changes
from lightning_lopt.sync.sharding import Shards
from lightning_lopt.sync.status import LocalSettings

WRITTEN = ("params", "round_idx", "local_steps", "local_lr", "local_momentum")  # into groups, by every sync


class StepResult(NamedTuple):
    """The result of an outer step.

    Attributes:
        squared_norm: Squared norm of the averaged pseudo-gradient, over all shards; parameters that had no anchor are
            not in it.
        fell_back: Whether the step was refused and the workers were averaged instead.
    """

    squared_norm: float
    fell_back: bool = False


class Total:
    """Sums over all tensors of the model, of which a rank may have some, or parts.

    Args:
        comm: Collectives among the workers.
        shards: Division of the tensors among the workers; None if every worker has them all.

    Attributes:
        divided: Whether this rank has less than everything.
    """

    def __init__(self, comm: Communicator, shards: Shards | None) -> None:
        self._comm, self._shards = comm, shards
        self.divided = shards is not None or comm.inside_size > 1

    def __call__(self, sums: Tensor) -> Tensor:
        if self._shards is not None:
            sums = self._shards.total(sums)
        return self._comm.inside_total(sums)

    def of(self, *values: float) -> list[float]:
        """Sum numbers that this rank has for its own tensors."""
        return self(torch.tensor(values, dtype=torch.float64)).tolist() if self.divided else [*values]


def average(flat_buffers: Iterable[FlatBuffer], total: Total) -> StepResult:
    """Make the means that arrived the anchors.

    Args:
        flat_buffers: Buffers after the exchange.
        total: Sum over all tensors of the model.
    """
    squared_norm = 0.0
    for flat_buffer in flat_buffers:
        for s, mean, _ in flat_buffer.received():
            anchor = s.read(s.parameter.anchor)
            if s.parameter.has_anchor:
                difference = mean if flat_buffer.differences else anchor - mean
                squared_norm += float(difference.square().sum())
            s.write(s.parameter.anchor, anchor - mean if flat_buffer.differences else mean)
    (squared_norm,) = total.of(squared_norm)
    return StepResult(squared_norm)


class OuterStep:
    """A torch optimizer whose parameters are the anchors and whose gradients the averaged pseudo-gradients.

    Args:
        factory: Function that makes the optimizer from parameter groups.
        groups: Parameters of each group of the local optimizer.
        comm: Collectives among the workers.
        shards: Division of the tensors among the workers; None if every worker steps them all.
        total: Sum over all tensors of the model.

    Attributes:
        optimizer: The outer optimizer.
        contract: Its `OuterContract`.

    Raises:
        ValueError: The optimizer belongs to another number of workers, or its step needs more than dense gradients.
    """

    def __init__(
        self,
        factory: OuterFactory,
        groups: Sequence[Sequence[AnchoredParameter]],
        comm: Communicator,
        shards: Shards | None,
        total: Total,
    ) -> None:
        self._comm, self._groups, self._shards, self._total = comm, groups, shards, total
        self.optimizer = factory([{"params": [p.anchor for p in group]} for group in groups])
        self.contract = read_contract(self.optimizer)
        self._given = [_settings(group) for group in self.optimizer.param_groups]  # by the script
        if total.divided and isinstance(self.optimizer, HasTotal):
            self.optimizer.total = total
        present = comm.num_workers if comm.fixed else "as many as come"
        if self.contract.num_workers not in (None, present):
            raise ValueError(
                f"This outer optimizer's network belongs to {self.contract.num_workers} workers, but there are "
                f"{present}. Use as many workers, weights meta-trained for this number, or weights with "
                "inputs='mean', which take any number."
            )

    def add_group(self, group: Sequence[AnchoredParameter]) -> None:
        """Follow a new group of the local optimizer."""
        self.optimizer.add_param_group({"params": [p.anchor for p in group]})
        self._given.append(_settings(self.optimizer.param_groups[-1]))

    def forget(self, parameters: Iterable[AnchoredParameter]) -> None:
        """Drop the optimizer's state of these parameters."""
        for p in parameters:
            self.optimizer.state.pop(p.anchor, None)

    def state_dict(self, *, alone: bool) -> dict[str, Any]:
        """State of the optimizer, that of the other workers' shards included on rank 0.

        Args:
            alone: Whether to leave out the other shards, and not to talk to the other workers.
        """
        state = self.optimizer.state_dict()
        if self._shards is not None and not alone:
            for other in self._comm.gather_objects(state["state"]) or ():
                state["state"].update(other)
        return {**state, "given": self._described()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`, as far as it belongs to tensors that this worker steps.

        Settings that the script has changed since then are the script's, with a warning: see `settings`.
        """
        given = state.get("given", [])
        self.optimizer.load_state_dict({name: value for name, value in state.items() if name != "given"})
        if self._shards is not None:
            for p in (p for group in self._groups for p in group if not self._shards.owns(p)):
                self.optimizer.state.pop(p.anchor, None)
        phrases: dict[str, None] = {}
        for group, own, saved, now in zip(
            self.optimizer.param_groups, self._given, given, self._described(), strict=False
        ):
            group.update(copy.deepcopy({name: own[name] for name in changed(saved, now) if name in own}))
            phrases |= dict.fromkeys(f"outer {phrase}" for phrase in changes(saved, now))
        if self._comm.rank == 0:
            warn_of_changes([*phrases])

    def _described(self) -> list[dict[str, str]]:
        """The settings of each group as the script gave them, with the fingerprint of a network."""
        fingerprint = getattr(self.optimizer, "fingerprint", None)
        network = {} if fingerprint is None else {"network (its digest)": fingerprint[:12]}
        return [describe(own) | network for own in self._given]

    def step(
        self,
        flat_buffers: Collection[FlatBuffer],
        keys: Mapping[str, int],
        settings: LocalSettings,
        *,
        scratch: bool,
    ) -> StepResult:
        """Step the anchors; those of frozen parameters are averaged instead, and their state waits.

        Args:
            flat_buffers: Buffers after the exchange.
            keys: Values to write into all parameter groups.
            settings: Settings of the local optimizer's groups, which go there, too.
            scratch: Whether the workers' own parameters may be overwritten.
        """
        received: list[ReceivedSlice] = []
        frozen_squared_norm = 0.0
        for item in (item for flat_buffer in flat_buffers for item in flat_buffer.received()):
            anchor = item.slice.parameter.anchor
            if not item.slice.parameter.has_anchor:  # from an anchor of 0, minus the pseudo-gradient is the mean
                anchor.copy_(-item.mean)
            elif item.slice.frozen:
                item.slice.write(anchor, item.slice.read(anchor) - item.mean)
                frozen_squared_norm += float(item.mean.square().sum())
            else:
                received.append(item)
        for group, lr, momentum in zip(self.optimizer.param_groups, settings.lrs, settings.momenta, strict=True):
            group.update(keys, local_lr=lr, local_momentum=momentum)
        stepped = sum(float(grad.square().sum()) for _, grad, _ in received)
        squared_norm, frozen_squared_norm = self._total.of(stepped, frozen_squared_norm)
        limit = self.contract.max_update_ratio
        with narrowed(self.optimizer, [s for s, *_ in received]), _gradients(received):
            before = [] if limit is None else [_copy_of_anchor(s, scratch=scratch) for s, *_ in received]
            self.optimizer.step()
            fell_back = limit is not None and self._fall_back(received, before, limit, squared_norm, keys["round_idx"])
        return StepResult(squared_norm + frozen_squared_norm, fell_back)

    def _fall_back(
        self, received: list[ReceivedSlice], before: list[Tensor], limit: float, squared_norm: float, round_idx: int
    ) -> bool:
        """Average instead if the step is not finite or over `limit` times the averaged one, and warn."""
        steps = ((s.parameter.anchor - old).square().sum() for (s, *_), old in zip(received, before, strict=True))
        (squared_step,) = self._total.of(sum(float(step) for step in steps))
        if math.isfinite(squared_step) and squared_step <= limit**2 * squared_norm:
            return False
        for (s, grad, _), old in zip(received, before, strict=True):
            torch.sub(old, grad, out=s.parameter.anchor)
        if not math.isfinite(squared_step):
            self.optimizer.state.clear()
        if self._comm.is_first:
            limited = f"more than {limit:g} times as much is not trusted."
            warnings.warn(
                f"Round {round_idx}: the outer step was refused and the workers were averaged instead. Its "
                f"norm is {math.sqrt(squared_step):.3g}, that of the averaged pseudo-gradient "
                f"{math.sqrt(squared_norm):.3g}; "
                + (limited if math.isfinite(squared_step) else "the outer optimizer starts afresh."),
                stacklevel=2,
            )
        return True


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the settings in a parameter group."""
    return copy.deepcopy({name: value for name, value in group.items() if name not in WRITTEN})


@contextmanager
def narrowed(optimizer: Optimizer, slices: Sequence[ParameterSlice]) -> Iterator[None]:
    """Show an optimizer only the chosen coordinates of its parameters and of their states, as 1-D tensors.

    A state that the optimizer makes meanwhile is 0 at all other coordinates.
    """
    wide: list[tuple[ParameterSlice, Tensor, dict[str, Tensor]]] = []
    for s in slices:
        if s.index is None:
            continue
        anchor, state = s.parameter.anchor, optimizer.state[s.parameter.anchor]
        full = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == anchor.shape}
        wide.append((s, anchor.data, full))
        state.update({k: s.read(v) for k, v in full.items()})
        anchor.data = s.read(anchor.data)
    try:
        yield
    finally:
        for s, values, full in wide:
            anchor, state = s.parameter.anchor, optimizer.state[s.parameter.anchor]
            narrow, anchor.data = anchor.data, values
            s.write(values, narrow)
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == s.shape:
                    state[key] = full.get(key, torch.zeros_like(values, dtype=value.dtype))
                    s.write(state[key], value)


@contextmanager
def _gradients(received: Sequence[ReceivedSlice]) -> Iterator[None]:
    """Let the anchors have their pseudo-gradients for a while."""
    for s, grad, worker_grads in received:
        s.parameter.anchor.grad = grad
        if worker_grads is not None:
            setattr(s.parameter.anchor, WORKER_GRADS, worker_grads)
    try:
        yield
    finally:
        for s, _, worker_grads in received:
            s.parameter.anchor.grad = None
            if worker_grads is not None:
                delattr(s.parameter.anchor, WORKER_GRADS)


def _copy_of_anchor(s: ParameterSlice, *, scratch: bool) -> Tensor:
    """A copy of an anchor, in the parameter itself where that is allowed and fits."""
    p = s.parameter
    if scratch and s.index is None and p.param.dtype == p.dtype:
        return p.param.detach().copy_(p.anchor)
    return p.anchor.clone()
