"""The model's tensors that no optimizer steps: buffers, and parameters such as those of an EMA teacher."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_lopt.islands import Held
from lightning_lopt.sync.rules import Contribution, HasSubmodules, Rules, scaled_to_1, warn_if_spoiled, wide
from lightning_lopt.sync.watch import Watch, checksums


class NamedTensors(HasSubmodules, Protocol):
    """The part of a `torch.nn.Module` that a `Replica` needs."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...
    def named_buffers(self) -> Iterable[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class Snapshot:
    """One worker's unstepped tensors at the launch of a sync.

    Attributes:
        items: Contribution of this worker to each tensor that may be sent.
        changed: Whether the worker changed each tensor whose value at the last sync is known, by name; the other items
            are new.
        described: Name, shape and type of every unstepped tensor, the same on all workers.
        num_pieces: Number of the last ones of `changed` of which the worker's other ranks hold other parts.
    """

    items: dict[str, Contribution]
    changed: dict[str, bool]
    described: list[str]
    num_pieces: int = 0

    def sent(self, changed: Iterable[int]) -> dict[str, Contribution]:
        """The tensors to send: those that some worker changed, and those that are new.

        Args:
            changed: Positions of the tensors that some worker changed.
        """
        followed = list(self.changed)
        chosen = [followed[i] for i in changed] + [name for name in self.items if name not in self.changed]
        return {name: self.items[name] for name in chosen}

    def with_values(self, values: Mapping[str, Tensor], device: torch.device) -> Snapshot:
        """Restore the snapshot of a sync in flight from its values, for `UnsteppedTensors.merge`.

        Args:
            values: Values of all items, by name.
            device: Device for the values.
        """
        return replace(self, items={name: Contribution("mean", v.to(device)) for name, v in values.items()})


class UnsteppedTensors:
    """Buffers, and parameters that no optimizer steps, as they are at each sync, and their values at the last one.

    They are looked up by name at each sync, so that some may be replaced, resized or registered late. A sync sends
    those that some worker changed, and combines them by their rules. For buffers the values at the last sync are kept;
    for parameters only from their first change on, so that frozen weights cost no memory. In the round of the first
    change of a parameter its value at the last sync is not known, and the worker's own takes its place.

    Args:
        model: Model whose tensors they are.
        rules: Rules by which they are combined; those with the rule `local` are left alone.
        is_stepped: Function that says whether an optimizer steps a parameter, now or before.
    """

    def __init__(self, model: NamedTensors, rules: Rules, is_stepped: Callable[[Tensor], bool]) -> None:
        self._model, self._rules, self._is_stepped = model, rules, is_stepped
        self._held = model if isinstance(model, Held) else None
        self._synced: dict[str, Tensor] = {}
        self._changed: set[str] = set()  # for the first time: those whose value at the last sync is not known
        self._judged: set[str] = set()  # looked at for a warning
        self._watch = Watch({})

    def _pieces(self) -> set[str]:
        """Names of those of which the worker's other ranks hold other parts: of a sharded model the parameters."""
        return set() if self._held is None else {name for name, _ in self._held.named_parameters()}

    @property
    def num_pieces(self) -> int:
        """Number of those whose value at the last sync is known, and of which other ranks hold other parts."""
        return len(self._pieces() & self._synced.keys())

    def present(self) -> dict[str, Tensor]:
        """All unstepped tensors by name, except those that stay each worker's own."""
        return {n: with_own_memory(n, t) for n, t in self._unstepped() if not self._rules.is_local(n)}

    def _unstepped(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._model.named_buffers()
        for name, parameter in self._model.named_parameters():
            if not self._is_stepped(parameter):
                yield name, parameter

    def followed(self) -> set[str]:
        """Names of those whose value at the last sync is known."""
        return {*self._synced}

    def described(self) -> list[str]:
        """Name, shape and type of each."""
        return _described(self.present())

    def checksums(self) -> tuple[list[int], int]:
        """A checksum of the present value of each, and the number of those, the last ones, that are pieces."""
        present = self.present()
        return checksums(present.values()), len(self._pieces() & present.keys())

    def adopt(self, common: Sequence[bool] | None = None) -> None:
        """Take the present values as those of the last sync.

        Args:
            common: Whether each tensor is the same on all workers; those that are not are sent at the next sync. None
                if all are the same.
        """
        present, buffers = self.present(), {name for name, _ in self._model.named_buffers()}
        differing = {name for name, same in zip(present, common or [], strict=False) if not same}
        followed = [n for n, t in present.items() if n in self._synced or n in buffers or self._rules.counts(n, t)]
        for name in followed:
            if name not in differing:
                self._synced[name] = present[name].detach().clone()
        self._changed = differing - self._synced.keys()
        self._watch = Watch({n: t for n, t in present.items() if n not in self._synced})

    # -- a sync ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """A snapshot of the present values, which later changes do not affect; unchanged ones are not copied."""
        present, pieces = self.present(), self._pieces()
        new = self._first_changes(present)
        followed = sorted(self._synced, key=pieces.__contains__)
        changed = {n: n in present and not _same(present[n], self._synced[n]) for n in followed}
        items = {}
        for name in [n for n in self._synced if n in present] + new:
            synced, own = self._synced.get(name), present[name]
            value = own.detach().clone() if synced is None or changed[name] else synced
            before = synced if synced is not None and synced.shape == own.shape else None
            items[name] = Contribution(self._rules.of(name, own), value, before, name in pieces)
        return Snapshot(items, changed, _described(present, new), len(pieces & changed.keys()))

    def _first_changes(self, present: Mapping[str, Tensor]) -> list[str]:
        """Names of the tensors that changed or were added since the last sync, and have no synced value yet."""
        others = {n: t for n, t in present.items() if n not in self._synced}
        self._changed.update(self._watch.changed(others))
        if self._held is not None and not self._pieces().isdisjoint(present):
            self._changed = self._held.changed_inside(self._changed)
        return [n for n in others if n in self._changed]

    def merge(self, launched: Snapshot, arrived: Mapping[str, Tensor]) -> None:
        """Take the values that arrived as those of the last sync, and add the worker's changes since the launch.

        Args:
            launched: Snapshot at the launch of the sync.
            arrived: Global values by name.
        """
        present = self.present() if arrived else {}
        for name, value in arrived.items():
            self._synced[name] = value.detach().clone()
            self._changed.discard(name)
            own, old = present.get(name), launched.items[name].value
            if own is None or own.shape != old.shape:  # gone or resized since the launch
                continue
            if _same(own, old):
                own.copy_(value)
            else:
                moved = _moved(value, own, old)
                own.copy_(scaled_to_1(moved) if self._rules.of(name, own) == "unit_mean" else moved)
        self._synced = {n: t for n, t in self._synced.items() if n in launched.items}  # the same on all workers

    def warn_of_spoiled(self, launched: Snapshot, arrived: Mapping[str, Tensor]) -> None:
        """Warn of tensors for which the default rule of their type may be wrong, when they are first synced.

        Args:
            launched: Snapshot at the launch of the sync.
            arrived: Global values by name.
        """
        for name in arrived.keys() - self._judged:
            self._judged.add(name)
            if self._rules.stated(name) is None:
                warn_if_spoiled(name, launched.items[name], arrived[name])

    # -- global values --------------------------------------------------------------------------------------------

    def pairs(self, values: Mapping[str, Tensor] | None = None) -> list[tuple[Tensor, Tensor]]:
        """Each present tensor with a value of its name.

        Args:
            values: Values by name; by default copies of those at the last sync, as far as tensors have changed.
        """
        present = self.present()
        if values is None:
            changed = [n for n, synced in self._synced.items() if n in present and not _same(present[n], synced)]
            values = {name: self._synced[name].clone() for name in changed}
        return [(present[name], value) for name, value in values.items() if name in present]

    def restore(self) -> None:
        """Give every tensor whose value at the last sync is known that value."""
        for tensor, synced in self.pairs():
            _overwrite(tensor, synced)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        """Copies of this worker's values, and the names of those that changed for the first time."""
        new = self._first_changes(self.present())
        tensors = {
            name: tensor.detach().clone()
            for name, tensor in self._unstepped()
            if name in self._synced or name in new or self._rules.is_local(name)
        }
        return {"tensors": tensors, "changed": new}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `own_state`; tensors that do not exist yet are named in a warning."""
        tensors = dict(self._unstepped())
        for name, value in state["tensors"].items():
            if name in tensors:
                _overwrite(tensors[name], value)
        self._changed.update(state["changed"])
        if missing := state["tensors"].keys() - tensors.keys():
            warnings.warn(
                f"The checkpoint holds values of {', '.join(sorted(missing))}, which the model does not have yet: they "
                "are lost. Register them before the fit starts, in __init__ or configure_model.",
                stacklevel=2,
            )

    def synced_state(self) -> dict[str, Tensor]:
        """Copies of the values at the last sync."""
        return {name: value.clone() for name, value in self._synced.items()}

    def load_synced_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `synced_state`."""
        present = self.present()
        for name, value in state.items():
            if name in present:
                self._synced[name] = value.to(present[name].device, copy=True)


def with_own_memory(name: str, tensor: Tensor) -> Tensor:
    """Give an expanded tensor, whose elements share memory, a memory of its own, and return it.

    Args:
        name: Name of the tensor.
        tensor: A buffer or a parameter.

    Raises:
        ValueError: The tensor is sparse, quantised, or was made in inference mode.
    """
    if tensor.is_inference():
        raise ValueError(
            f"{name} was made under torch.inference_mode, and nothing may be written into it: make it under "
            "torch.no_grad."
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(
            f"{name} is {tensor.dtype} with the layout {tensor.layout}; workers can exchange dense tensors only. "
            f"sync_rules={{{name!r}: 'local'}} keeps it each worker's own."
        )
    if not tensor.is_contiguous() and any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        tensor.data = tensor.data.contiguous()
    return tensor


def _described(tensors: Mapping[str, Tensor], new: Sequence[str] = ()) -> list[str]:
    changed = dict.fromkeys(new, ", changed")
    return [f"{n} {tuple(t.shape)} {t.dtype}{changed.get(n, '')}" for n, t in tensors.items()]


def _moved(value: Tensor, own: Tensor, old: Tensor) -> Tensor:
    """The value plus the change from `old` to `own`, where equal infinities count as no change."""
    value, own, old = wide(value), wide(own), wide(old)
    return torch.where(own == old, value, value + (own - old))


def _same(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.dtype.itemsize == 1 and first.is_floating_point():  # torch does not compare these
        first, second = first.view(torch.uint8), second.view(torch.uint8)
    return torch.equal(first, second)


def _overwrite(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape == value.shape:
        with_own_memory("", tensor).detach().copy_(value)
    else:
        tensor.data = value.to(tensor, copy=True)
