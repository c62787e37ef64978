"""One worker's copy of the model: everything of it that a sync reads or writes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_lopt.islands import Held, Layout, local_shard
from lightning_lopt.selection import Selection
from lightning_lopt.sync import spectral_norm
from lightning_lopt.sync.anchors import AnchoredParameter
from lightning_lopt.sync.flat import ParameterSlice
from lightning_lopt.sync.rules import Rule, Rules
from lightning_lopt.sync.status import LocalSettings
from lightning_lopt.sync.swap import Swap
from lightning_lopt.sync.unstepped import NamedTensors, UnsteppedTensors, with_own_memory

CHECK_EVERY = 100  # syncs
ROUNDING = 4.0  # machine epsilons by which weights may be off that were exchanged for others and back


class OptimizerLike(Protocol):
    """The part of a `torch.optim.Optimizer` that a `Replica` needs."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    @property
    def state(self) -> MutableMapping[Any, Any]: ...


def check_optimizer(model: NamedTensors, optimizer: OptimizerLike) -> None:
    """Refuse a model and a local optimizer that do not belong together.

    Tensors of the optimizer that are not the model's are synchronised, too, as long as it has some of the model's.

    Raises:
        TypeError: One of the two is something else.
        ValueError: The optimizer has parameters, but none of the model's.

    Example:
        >>> model, copy = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> check_optimizer(model, torch.optim.SGD(copy.parameters(), lr=0.1))
        Traceback (most recent call last):
        ValueError: The local optimizer has none of the model's parameters. Make it of those of this very model: ...
    """
    if not hasattr(model, "named_parameters") or not hasattr(optimizer, "param_groups"):
        raise TypeError(
            "Rounds needs a model and its local optimizer, a torch.nn.Module and a torch.optim.Optimizer, not "
            f"{type(model).__name__} and {type(optimizer).__name__}."
        )
    own = {id(p) for _, p in model.named_parameters()}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if held and own.isdisjoint(held):
        raise ValueError(
            "The local optimizer has none of the model's parameters. Make it of those of this very model: "
            "torch.optim.SGD(model.parameters(), ...), after the model was copied or rebuilt."
        )


class Replica:
    """Parameters with their anchors, all other tensors of the model, and states of one worker's local optimizer.

    It alone knows how the worker's tensors are laid out; a sync sees dense tensors.

    Args:
        model: Model whose tensors are synchronised.
        optimizer: Local optimizer whose parameters are synchronised; groups that it is given later are found by
            `add_new_groups`.
        sync_rules: Rules of the user, by glob pattern of a tensor's name.

    Attributes:
        groups: Parameters of each group of the optimizer, with their anchors.
        unstepped: Tensors of the model that no optimizer steps.
        swap: Global values that the model shows for a while in place of the worker's own.
        device: Device of the parameters.

    Raises:
        ValueError: There is nothing to train, tensors are not dense, parameters are complex, or a rule does not suit a
            parameter in training.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> replica.adopt()
        >>> _ = model.weight.data.fill_(7.0)
        >>> replica.restore()
        >>> bool((model.weight == 7.0).any())
        False
    """

    def __init__(
        self, model: NamedTensors, optimizer: OptimizerLike, sync_rules: Mapping[str, Rule] | None = None
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._rules = Rules(model, sync_rules or {})
        self.groups: list[list[AnchoredParameter]] = []
        self._held: dict[int, AnchoredParameter] = {}  # by the identity of the parameter
        self.add_new_groups()
        if isinstance(model, Held):
            self._held_copy: Held | None = model
        else:
            self._held_copy = None
        if self._held_copy is None and not any(p.param.requires_grad for p in self.parameters()):
            raise ValueError(
                "There is nothing to train: the local optimizer holds no parameter with requires_grad=True."
            )
        self.unstepped = UnsteppedTensors(model, self._rules, self._is_stepped)
        copying = self._held_copy is not None and self._held_copy.shares_memory
        self.swap = Swap(copying=copying, after=self.push)
        self.device = self._held_copy.device if self._held_copy else next(p.param.device for p in self.parameters())
        self._were_trained: set[Tensor] = set()  # of a sharded model
        self._compared_from: int | None = None  # the first round whose anchors are compared
        self._versions: list[tuple[int, int]] = []
        self.note_versions()

    def pull(self) -> None:
        """Bring the tensors up to date with a sharded model; others are the model's own."""
        if self._held_copy is not None:
            self._held_copy.pull()

    def push(self) -> None:
        """Write the tensors into a sharded model."""
        if self._held_copy is not None:
            self._held_copy.push()

    def layout(self) -> Layout | None:
        """Pieces of a sharded model on this rank, None if it has all of the model."""
        return None if self._held_copy is None else self._held_copy.layout()

    def parameters(self) -> Iterator[AnchoredParameter]:
        """All parameters of the local optimizer, in its order."""
        for group in self.groups:
            yield from group

    def trained(self) -> list[AnchoredParameter]:
        """Parameters that are or were trained, but those that stay a worker's own."""
        return [p for p in self.parameters() if p.trained and not p.local]

    def anchored(self) -> list[AnchoredParameter]:
        """Parameters that have an anchor."""
        return [p for p in self.parameters() if p.has_anchor]

    def _is_stepped(self, parameter: Tensor) -> bool:
        held = self._held.get(id(parameter))
        return held is not None and held.trained

    def rules(self) -> dict[str, Rule]:
        """The rule of every parameter and buffer of the model, by name."""
        named = [*self._model.named_parameters(), *self._model.named_buffers()]
        return {name: self._rules.of(name, tensor) for name, tensor in named}

    def unused_rules(self) -> dict[str, str | None]:
        """The user's patterns that fit no name, each with a name that is near, if there is one."""
        return self._rules.unused(list(self.rules()))

    def common_tensors(self) -> list[tuple[str, Tensor]]:
        """All tensors that workers begin with in common: of the model by name, then others of the optimizer."""
        named = [*self._model.named_parameters(), *self._model.named_buffers()]
        known = {id(tensor) for _, tensor in named}
        held = enumerate(p.param for p in self.parameters())
        others = [(f"parameter {i} of the optimizer", p) for i, p in held if id(p) not in known]
        return [(n, with_own_memory(n, t)) for n, t in named if not self._rules.is_local(n)] + others

    def adopt(self) -> None:
        """Take the present parameters in training as the global ones."""
        for p in self.trained():
            p.adopt(p.param)
        self.note_versions()

    def add_new_groups(self) -> list[list[AnchoredParameter]]:
        """Take up the groups that the optimizer was given since the last call, and return them.

        Raises:
            ValueError: An earlier group has other parameters than before.
        """
        groups = self._optimizer.param_groups
        if any([id(p.param) for p in a] != [*map(id, b["params"])] for a, b in zip(self.groups, groups, strict=False)):
            raise ValueError(
                "A group of the local optimizer has other parameters than before, which would have no outer step: give "
                "it new ones by optimizer.add_param_group."
            )
        groups = groups[len(self.groups) :]
        names = {id(p): name for name, p in self._model.named_parameters()} if groups else {}
        new = [[self._hold(p, names.get(id(p))) for p in group["params"]] for group in groups]
        self.groups += new
        return new

    def _hold(self, parameter: Tensor, name: str | None) -> AnchoredParameter:
        rule = "mean" if name is None else self._rules.of(name, parameter)
        if rule not in ("mean", "local") and parameter.requires_grad:
            raise ValueError(
                f"{name} is a parameter in training, whose rule can be 'mean' (with the outer step) or 'local', not "
                f"{rule!r}: check sync_rules."
            )
        held = AnchoredParameter(parameter, name or "a parameter", local=rule == "local")
        self._held[id(parameter)] = held
        return held

    def in_training(self) -> list[AnchoredParameter]:
        """The parameters of `trained`, each with an anchor.

        New ones have no common value yet; their anchor is 0 until their first sync, which averages them.
        """
        parameters = self.trained()
        for p in parameters:
            if not p.has_anchor:
                p.anchor.data = torch.zeros_like(p.param, dtype=p.dtype)
        return parameters

    def pick(
        self, parameters: Sequence[AnchoredParameter], selection: Selection, round_idx: int
    ) -> list[bool | Tensor]:
        """Let a selection choose coordinates of parameters: see `Selection.pick`.

        Whole tensors are chosen among all of the worker's model, also where this rank holds only some of them.
        """
        if self._held_copy is None or not selection.whole_tensors:
            return selection.pick([p.param.numel() for p in parameters], round_idx)
        chosen = {id(self._held_copy.held[p]) for p in self._chosen(selection, round_idx) if p in self._held_copy.held}
        return [id(p.param) in chosen for p in parameters]

    def _chosen(self, selection: Selection, round_idx: int) -> list[Tensor]:
        """The parameters of a sharded model that a selection chooses."""
        assert self._held_copy is not None
        optimized = self._held_copy.optimized()
        self._were_trained |= {p for p, name in optimized.items() if p.requires_grad and not self._rules.is_local(name)}
        trained = [p for p in optimized if p in self._were_trained]
        return [
            p
            for p, choice in zip(trained, selection.pick([p.numel() for p in trained], round_idx), strict=True)
            if choice
        ]

    # -- local optimizer ------------------------------------------------------------------------------------------

    def local_settings(self, momentum_power: float) -> LocalSettings:
        """Settings of the local optimizer: see `LocalSettings.of`."""
        return LocalSettings.of(self._optimizer.param_groups, momentum_power)

    def optimized(self, slices: Sequence[ParameterSlice], selection: Selection, round_idx: int) -> list[Tensor]:
        """The local optimizer's parameters that the sync of a round sends, those that other ranks hold included.

        Args:
            slices: Slices that this rank sends.
            selection: Selection of the round.
            round_idx: Index of the round.
        """
        if self._held_copy is None or not selection.whole_tensors:
            return [s.parameter.param for s in slices]
        return self._chosen(selection, round_idx)

    def all_optimized(self) -> list[Tensor]:
        """The local optimizer's parameters that a sync may send, those that other ranks hold included."""
        if self._held_copy is None:
            return [p.param for p in self.parameters()]
        return [*self._held_copy.optimized()]

    def local_states(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """States of the local optimizer that belong to coordinates of these: momenta, second moments."""
        return [
            local_shard(state)
            for p in parameters
            for _, state in sorted(self._optimizer.state.get(p, {}).items())
            if isinstance(state, Tensor) and state.is_floating_point() and state.shape == p.shape
        ]

    def reset_local_states(self, parameters: Iterable[Tensor]) -> None:
        """Forget the states that the local optimizer has of these."""
        for p in parameters:
            self._optimizer.state.get(p, {}).clear()

    # -- global values --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(self) -> None:
        """Give every parameter and buffer its value at the last sync."""
        for p in self.parameters():
            if p.has_anchor:
                p.param.copy_(p.anchor)
        self.unstepped.restore()

    def note_versions(self) -> None:
        """Remember the parameters as they are, for `touched`."""
        self._versions = self._present_versions()

    @torch.no_grad()
    def _present_versions(self) -> list[tuple[int, int]]:
        if self._held_copy is None:
            tensors = [p.param for p in self.trained()]
        else:  # an operation on a DTensor counts as one on it alone, one on its shard as one on that
            tensors = [t for p in self._held_copy.optimized() for t in (p, local_shard(p))]
        return [(t._version, t.data_ptr()) for t in tensors]

    @property
    def touched(self) -> bool:
        """Whether parameters of the model were written on this rank since `note_versions`, but not through `.data`."""
        return self._present_versions() != self._versions

    @torch.no_grad()
    def replaced(self) -> list[AnchoredParameter]:
        """Parameters that differ from their anchors by more than rounding."""
        return [p for p in self.parameters() if p.has_anchor and p.moved(ROUNDING * torch.finfo(p.param.dtype).eps)]

    @torch.no_grad()
    def undo_rounding(self) -> None:
        """Give its anchor's value to each parameter that differs from it by rounding alone.

        An operation and its inverse leave it: `eval()` and `train()` of a schedule-free optimizer.
        """
        self.pull()
        for p in self.parameters():
            anchor = p.anchor.to(p.param.dtype)
            if p.has_anchor and p.param.numel() and not torch.equal(p.param, anchor):
                rounding = 8 * ROUNDING * torch.finfo(anchor.dtype).eps * anchor.abs().max().item()
                if torch.allclose(p.param, anchor, rtol=0, atol=rounding):
                    p.param.copy_(anchor)
        self.push()

    def value_checksum(self) -> int:
        """A checksum of the present values of the parameters in training."""
        return _checksum(p.param for p in self.trained())

    def checksum(self, round_idx: int) -> int | None:
        """A checksum of the anchors in the first two rounds and two of each `CHECK_EVERY`, else None.

        Workers whose anchors differ in any bit have, almost surely, other checksums. Two rounds in a row: one sees the
        anchors that were there, the next the result of an outer step on them.

        Args:
            round_idx: Index of the round that ends, the same on all workers.
        """
        if self._compared_from is None:
            self._compared_from = round_idx
        due = round_idx % CHECK_EVERY < 2 or round_idx < self._compared_from + 2
        return _checksum(p.anchor for p in self.parameters()) if due else None

    def compare_next(self) -> None:
        """Let the next round count as the first one for `checksum`; on all workers."""
        self._compared_from = None

    def renewed(self, arrived: Mapping[str, Tensor], weights: Mapping[AnchoredParameter, Tensor]) -> dict[str, Tensor]:
        """Global values of unstepped tensors of which some depend on the weights: see `spectral_norm`.

        Args:
            arrived: Values as they are combined, by name.
            weights: Global values of parameters, as far as this rank holds them.
        """

        def get_weight(name: str) -> Tensor | None:
            held = self._held.get(id(named[name])) if name in named else None
            own = None if held is None else weights.get(held)
            return own if self._held_copy is None else self._held_copy.whole(name, own)

        if not any(self._rules.stated(name) == "unit_mean" for name in arrived):
            return dict(arrived)
        named = dict(self._model.named_parameters())
        return spectral_norm.renewed(arrived, self._rules.module_of, get_weight)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copies of the values at the last sync, which are the same on all workers."""
        anchors = [p.anchor.clone() if p.has_anchor else None for p in self.parameters()]
        codec_states = [None if p.codec_state is None else p.codec_state.clone() for p in self.parameters()]
        return {"anchors": anchors, "codec_states": codec_states, "unstepped": self.unstepped.synced_state()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`.

        Raises:
            ValueError: A parameter has another shape.
        """
        for i, (p, anchor) in enumerate(zip(self.parameters(), state["anchors"], strict=True)):
            if anchor is None:
                continue
            if anchor.shape != p.param.shape:
                raise ValueError(
                    f"The checkpoint's parameter {i} has the shape {tuple(anchor.shape)}, here it is "
                    f"{tuple(p.param.shape)}: build the model that was saved."
                )
            p.adopt(anchor.to(p.param.device))
        for p, codec_state in zip(self.parameters(), state.get("codec_states", ()), strict=False):
            p.codec_state = None if codec_state is None else codec_state.to(p.param.device)
        self.unstepped.load_synced_state(state["unstepped"])

    def untouched(self) -> dict[str, Tensor]:
        """Common tensors of which `state_dict` holds nothing, since they were neither trained nor changed."""
        followed = self.unstepped.followed()
        anchored = {id(p.param) for p in self.parameters() if p.has_anchor}
        return {n: t.detach() for n, t in self.common_tensors() if n not in followed and id(t) not in anchored}

    @torch.no_grad()
    def restore_with(self, untouched: Mapping[str, Tensor]) -> None:
        """Go to the values of the last sync, and to those of another worker that its `untouched` returned.

        Args:
            untouched: Tensors by name, of the worker whose `state_dict` was loaded.
        """
        present = dict(self.common_tensors())
        for name, value in untouched.items():
            present[name].copy_(value)
        self.restore()
        self.unstepped.adopt()
        self.note_versions()
        for p in self.parameters():
            p.residual = None

    def local_state(self) -> dict[str, Any]:
        """Copies of this worker's own values and residuals."""
        return {
            "params": [p.param.detach().clone() if p.has_anchor or p.local else None for p in self.parameters()],
            "residuals": [None if p.residual is None else p.residual.clone() for p in self.parameters()],
            "unstepped": self.unstepped.own_state(),
        }

    @torch.no_grad()
    def load_local_state(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `local_state`, after `load_state_dict`."""
        values: Sequence[Tensor | None] = state["params"]
        for p, value, residual in zip(self.parameters(), values, state["residuals"], strict=True):
            if value is not None:
                p.param.copy_(value)
            p.residual = None if residual is None else residual.to(p.param.device)
        self.unstepped.load_own_state(state["unstepped"])


def _checksum(tensors: Iterable[Tensor]) -> int:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, value)
    return value
