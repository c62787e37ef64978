"""The outer step: averaging, or a torch optimizer on the anchors, with averaging as its guard."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lopt.comm import Communicator, digest
from lightning_lopt.sync.anchors import AnchoredParameter
from lightning_lopt.sync.flat import FlatBuffer, ParameterSlice
from lightning_lopt.sync.sharding import Shards

OuterFactory = Callable[[Any], Optimizer]
Pairs = list[tuple[ParameterSlice, Tensor]]


def average(wires: Iterable[FlatBuffer]) -> float:
    """The anchors become the means that arrived; the squared norm of the pseudo-gradient that this amounts to."""
    square = 0.0
    for wire in wires:
        for part, arrived, _ in wire.arrived():
            anchor = part.of(part.tracked.anchor)
            difference = arrived if wire.differences else anchor - arrived
            square += float(difference.square().sum())
            part.put(part.tracked.anchor, anchor - arrived if wire.differences else arrived)
    return square


class OuterStep:
    """A torch optimizer whose parameters are the anchors and whose gradients the averaged pseudo-gradients.

    Args:
        factory: makes the optimizer from parameter groups.
        groups: the parameters of each group of the local optimizer.
        comm: the collectives.
        shards: which tensors this worker steps; None for all.

    Attributes:
        optimizer: before each step its groups hold `round_idx`, `local_steps`, `local_lr` and `local_momentum`.
        gathers: whether it needs each worker's pseudo-gradient.

    Raises:
        ValueError: it belongs to another number of workers, or its step needs more than dense gradients.
    """

    def __init__(
        self,
        factory: OuterFactory,
        groups: Sequence[Sequence[AnchoredParameter]],
        comm: Communicator,
        shards: Shards | None,
    ) -> None:
        self._comm, self._groups, self._shards = comm, groups, shards
        self.optimizer = factory([{"params": [t.anchor for t in group]} for group in groups])
        _check_step(self.optimizer)
        self.gathers: bool = getattr(self.optimizer, "needs_worker_grads", False)
        if hasattr(self.optimizer, "total"):
            self.optimizer.total = self._totals  # pyright: ignore[reportAttributeAccessIssue]
        needed = getattr(self.optimizer, "num_workers", None)
        if needed not in (None, comm.num_workers):
            raise ValueError(
                f"This outer optimizer's network belongs to {needed} workers, but there are {comm.num_workers}. Use as "
                "many workers, weights meta-trained for this number, or weights with inputs='mean', which take any "
                "number."
            )

    def add_group(self, group: Sequence[AnchoredParameter]) -> None:
        """Follow a new group of the local optimizer."""
        self.optimizer.add_param_group({"params": [t.anchor for t in group]})

    def _total(self, value: float) -> float:
        """Its sum over the workers, each of whom has the value of its own tensors."""
        return float(self._totals(torch.tensor(value, dtype=torch.float64)))

    def _totals(self, values: Tensor) -> Tensor:
        if self._shards is None:
            return values
        total = self._comm.total(values.flatten().tolist(), self.optimizer.param_groups[0]["params"][0].device)
        return values.new_tensor(total).view_as(values)

    def state_dict(self, *, alone: bool) -> dict[str, Any]:
        """The optimizer's; of all tensors on rank 0, of all that it steps on another worker, or if `alone`."""
        state = self.optimizer.state_dict()
        if self._shards is not None and not alone:
            for other in self._comm.gather_objects(state["state"]) or ():
                state["state"].update(other)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, as far as it is of tensors that this worker steps."""
        self.optimizer.load_state_dict(state)
        if self._shards is not None:
            for t in (t for group in self._groups for t in group if not self._shards.owns(t)):
                self.optimizer.state.pop(t.anchor, None)

    def step(
        self,
        wires: Iterable[FlatBuffer],
        keys: dict[str, int],
        rates: Sequence[float],
        momenta: Sequence[float],
        *,
        scratch: bool,
    ) -> tuple[float, bool]:
        """Step the anchors.

        Args:
            wires: as they arrived.
            keys: what to write into the parameter groups.
            rates: the local learning rate of each group, which goes there, too.
            momenta: and its heavy-ball momentum.
            scratch: whether the workers' own parameters may be overwritten.

        Returns:
            The squared norm of the pseudo-gradient, and whether averaging replaced the step.
        """
        pairs: Pairs = []
        workers: list[Tensor | None] = []
        for wire in wires:
            for part, grad, per_worker in wire.arrived():
                if not part.tracked.known:  # from an anchor of 0, minus the pseudo-gradient is the mean
                    part.tracked.anchor.copy_(-grad)
                    continue
                pairs.append((part, grad))
                workers.append(per_worker)
        for group, rate, momentum in zip(self.optimizer.param_groups, rates, momenta, strict=True):
            group.update(keys, local_lr=rate, local_momentum=momentum)
        square = self._total(sum(float(grad.square().sum()) for _, grad in pairs))
        limit: float | None = getattr(self.optimizer, "max_update_ratio", None)
        with narrowed(self.optimizer, [part for part, _ in pairs]), _gradients(pairs, workers):
            before = [] if limit is None else [_kept(part, scratch=scratch) for part, _ in pairs]
            self.optimizer.step()
            refused = limit is not None and self._refuse(pairs, before, limit, square, keys)
        return square, refused

    def _refuse(self, pairs: Pairs, before: list[Tensor], limit: float, square: float, keys: dict[str, int]) -> bool:
        """Average instead if the step is not finite or over `limit` times the averaged one; say so."""
        steps = ((part.tracked.anchor - old).square().sum() for (part, _), old in zip(pairs, before, strict=True))
        update = self._total(sum(float(step) for step in steps))
        if math.isfinite(update) and update <= limit**2 * square:
            return False
        for (part, grad), old in zip(pairs, before, strict=True):
            torch.sub(old, grad, out=part.tracked.anchor)
        if not math.isfinite(update):
            self.optimizer.state.clear()
        if self._comm.rank == 0:
            limited = f"more than {limit:g} times as much is not trusted."
            warnings.warn(
                f"Round {keys['round_idx']}: the outer step was refused and the workers were averaged instead. Its "
                f"norm is {math.sqrt(update):.3g}, that of the averaged pseudo-gradient {math.sqrt(square):.3g}; "
                + (limited if math.isfinite(update) else "the outer optimizer starts afresh."),
                stacklevel=2,
            )
        return True


@contextmanager
def narrowed(optimizer: Optimizer, parts: Sequence[ParameterSlice]) -> Iterator[None]:
    """Show an optimizer only the chosen coordinates of its parameters and of their states, as 1-D tensors.

    A state that the optimizer makes meanwhile is 0 at all other coordinates.
    """
    wide: list[tuple[ParameterSlice, Tensor, dict[str, Tensor]]] = []
    for part in parts:
        if part.index is None:
            continue
        p, state = part.tracked.anchor, optimizer.state[part.tracked.anchor]
        full = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == p.shape}
        wide.append((part, p.data, full))
        state.update({k: part.of(v) for k, v in full.items()})
        p.data = part.of(p.data)
    try:
        yield
    finally:
        for part, values, full in wide:
            p, state = part.tracked.anchor, optimizer.state[part.tracked.anchor]
            narrow, p.data = p.data, values
            part.put(values, narrow)
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == part.shape:
                    state[key] = full.get(key, torch.zeros_like(values, dtype=value.dtype))
                    part.put(state[key], value)


def check_coordinatewise(factory: OuterFactory) -> None:
    """Refuse an outer optimizer that must see whole tensors.

    Raises:
        ValueError: it says so by an attribute `needs_whole_tensors`, or has states of another shape than a parameter.
    """
    probe = torch.zeros(2, 3)
    probe.grad = torch.zeros(2, 3)
    optimizer = factory([{"params": [probe]}])
    if getattr(optimizer, "needs_whole_tensors", False):
        raise ValueError(_whole(optimizer, "its statistics of rows, columns and whole tensors"))
    optimizer.step()
    for key, value in optimizer.state[probe].items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != probe.shape:
            raise ValueError(_whole(optimizer, f"its state {key!r}"))


def _check_step(optimizer: Optimizer) -> None:
    needed = [
        parameter.name
        for parameter in inspect.signature(optimizer.step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if isinstance(optimizer, torch.optim.SparseAdam):
        needed = ["sparse gradients"]
    if needed:
        raise ValueError(
            f"{type(optimizer).__name__} cannot be the outer optimizer: its step needs {', '.join(needed)}, but a sync "
            "has one dense pseudo-gradient to give. Use SGD, SlowMomentum, Adam, or another that needs no more."
        )


def local_settings(groups: Sequence[dict[str, Any]], power: float) -> list[float]:
    """What an outer optimizer must know of the local one's groups: rates, nan where there is none, then momenta.

    Args:
        groups: of the local optimizer.
        power: of the momenta: the turns from one sync of a tensor to the next, or infinite where a sync resets them.

    Example:
        >>> local_settings([{"lr": 0.1, "momentum": 0.9}, {"lr": None}], 1)
        [0.1, nan, 0.9, 0.0]
    """
    rates = [group.get("lr") for group in groups]
    momenta = [_momentum(group.get("momentum")) ** power for group in groups]
    return [*(math.nan if rate is None else float(rate) for rate in rates), *momenta]


def _momentum(value: Any) -> float:
    """In [0, 1]; 0 for what is not a number, as some optimizers have."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return min(max(number, 0.0), 1.0) if math.isfinite(number) else 0.0


def fingerprint(outer: Optimizer | None) -> int:
    """An integer that differs for outer optimizers of another kind, with other settings or another network."""
    settings = [] if outer is None else [{k: v for k, v in g.items() if k != "params"} for g in outer.param_groups]
    return digest(repr((type(outer).__name__, settings, getattr(outer, "fingerprint", None))))


@contextmanager
def _gradients(pairs: Pairs, workers: Sequence[Tensor | None]) -> Iterator[None]:
    for (part, grad), per_worker in zip(pairs, workers, strict=True):
        part.tracked.anchor.grad = grad
        if per_worker is not None:
            part.tracked.anchor.worker_grads = per_worker  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for (part, _), per_worker in zip(pairs, workers, strict=True):
            part.tracked.anchor.grad = None
            if per_worker is not None:
                del part.tracked.anchor.worker_grads  # pyright: ignore[reportAttributeAccessIssue]


def _kept(part: ParameterSlice, *, scratch: bool) -> Tensor:
    """A copy of the anchor, in the parameter itself where that may be and fits."""
    t = part.tracked
    if scratch and part.index is None and t.param.dtype == t.dtype:
        return t.param.detach().copy_(t.anchor)
    return t.anchor.clone()


def _whole(optimizer: Optimizer, what: str) -> str:
    return (
        f"{type(optimizer).__name__} cannot step random coordinates of a tensor: {what} would be undefined. Send whole "
        "tensors (density=1, or selection=Fragments(...)), or use an outer optimizer that treats each coordinate by "
        "itself: averaging, SGD, SlowMomentum, Adam."
    )
