"""The model's tensors that no optimizer steps: buffers, and parameters such as those of an EMA teacher."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_lopt.sync.rules import Contribution, HasSubmodules, Rules
from lightning_lopt.sync.watch import Watch


class NamedTensors(HasSubmodules, Protocol):
    """The part of a `torch.nn.Module` that a `Replica` needs."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...
    def named_buffers(self) -> Iterable[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class Snapshot:
    """One worker's unstepped tensors at the launch of a sync.

    Attributes:
        items: What this worker contributes to each of them.
        changed: Whether the worker changed each of those that all workers follow, which come first.
        names: Names of all that there are.
        described: A line for each of these, and whether it changed for the first time: the same on all workers.
    """

    items: dict[str, Contribution]
    changed: list[bool]
    names: list[str]
    described: list[str]

    def sent(self, changed: Iterable[int]) -> dict[str, Contribution]:
        """The tensors to send: those that some worker changed, and those that are new.

        Args:
            changed: Positions of the tensors that some worker changed.
        """
        names = list(self.items)
        chosen = [names[i] for i in changed] + names[len(self.changed) :]
        return {name: self.items[name] for name in chosen}

    def with_values(self, values: Mapping[str, Tensor], device: torch.device) -> Snapshot:
        """The snapshot with other values.

        Args:
            values: Values of some tensors, by name.
            device: Device for the values.
        """
        items = {n: i._replace(value=values[n].to(device)) if n in values else i for n, i in self.items.items()}
        return replace(self, items=items)


class UnsteppedTensors:
    """Buffers, and parameters that no optimizer steps, as they are at each sync, and their values at the last one.

    They are found by name at each sync, so that some may be replaced, resized or registered late. A sync sends those
    that some worker changed, and combines them by their rules. Values of the last sync are kept of buffers, and of
    parameters from their first change on: frozen weights cost no memory. In the round of its first change the value of
    a parameter at the last sync is not known; what asks for it then gets the worker's own.

    Args:
        model: Model whose tensors they are.
        rules: Rules by which they are combined; those with the rule `local` are left alone.
        is_stepped: Function that says whether an optimizer steps a parameter, now or before.
    """

    def __init__(self, model: NamedTensors, rules: Rules, is_stepped: Callable[[Tensor], bool]) -> None:
        self._model, self._rules, self._is_stepped = model, rules, is_stepped
        self._synced: dict[str, Tensor] = {}
        self._changed: set[str] = set()  # for the first time: those whose value at the last sync is not known
        self._watch = Watch({})

    def __len__(self) -> int:
        """Number of tensors that all workers follow."""
        return len(self._synced)

    def adopt(self) -> None:
        """Take the present values as those of the last sync."""
        present, buffers = self.present(), {name for name, _ in self._model.named_buffers()}
        kept = {n for n, t in present.items() if n in buffers or self._rules.of(n, t) == "sum_of_changes"}
        self._synced = {n: t.detach().clone() for n, t in present.items() if n in kept or n in self._synced}
        self._changed.clear()
        self._watch = Watch({n: t for n, t in present.items() if n not in self._synced})

    def present(self) -> dict[str, Tensor]:
        """All unstepped tensors by name, but those that stay a worker's own."""
        return {n: with_own_memory(n, t) for n, t in self._unstepped() if not self._rules.is_local(n)}

    def _unstepped(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._model.named_buffers()
        for name, parameter in self._model.named_parameters():
            if not self._is_stepped(parameter):
                yield name, parameter

    # -- a sync ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The present values, of which later changes are not seen; what is unchanged is not copied."""
        present = self.present()
        new = self._first_changes(present)
        changed = [n in present and not _same(present[n], synced) for n, synced in self._synced.items()]
        items = {}
        for (name, synced), flag in zip(self._synced.items(), changed, strict=True):
            value = present[name].detach().clone() if flag else synced
            rule = self._rules.of(name, value)
            items[name] = Contribution(rule, value, synced if synced.shape == value.shape else None)
        for name in new:
            value = present[name].detach().clone()
            items[name] = Contribution(self._rules.of(name, value), value)
        described = [f"{n} {tuple(t.shape)} {t.dtype}{', changed' * (n in new)}" for n, t in present.items()]
        return Snapshot(items, changed, list(present), described)

    def _first_changes(self, present: Mapping[str, Tensor]) -> list[str]:
        """Names of the tensors that changed, or came, and are not followed yet."""
        others = {n: t for n, t in present.items() if n not in self._synced}
        self._changed.update(self._watch.changed(others))
        return [n for n in others if n in self._changed]

    def merge(self, launched: Snapshot, arrived: Mapping[str, Tensor]) -> None:
        """Take the values that arrived as those of the last sync, and add the worker's changes since the launch.

        Args:
            launched: Snapshot at the launch of the sync.
            arrived: Global values by name.
        """
        present = self.present()
        for name, value in arrived.items():
            self._synced[name] = value.detach().clone()
            self._changed.discard(name)
            own, old = present.get(name), launched.items[name].value
            if own is None:
                continue
            if not own.shape == value.shape == old.shape:
                own.data = value.to(own.dtype, copy=True)
                continue
            wide = value.to(torch.int64) if value.dtype == torch.bool else value
            own.copy_(torch.where(own == old, wide, wide + (own.to(wide.dtype) - old.to(wide.dtype))))
        self._synced = {n: t for n, t in self._synced.items() if n in launched.names}  # the same on all workers

    # -- global values --------------------------------------------------------------------------------------------

    def pairs(self, values: Mapping[str, Tensor] | None = None) -> list[tuple[Tensor, Tensor]]:
        """Each present tensor with a value of its name.

        Args:
            values: Values by name; by default copies of those at the last sync.
        """
        present = self.present()
        if values is None:
            values = self.synced_state()
        return [(present[name], value) for name, value in values.items() if name in present]

    def restore(self) -> None:
        """Give every tensor that is followed its value at the last sync."""
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
        ValueError: The tensor is sparse or quantised.
    """
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(
            f"{name} is {tensor.dtype} with the layout {tensor.layout}; workers can exchange dense tensors only. "
            f"sync_rules={{{name!r}: 'local'}} keeps it each worker's own."
        )
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        tensor.data = tensor.data.contiguous()
    return tensor


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
