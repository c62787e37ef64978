"""Parts of checkpoints of ranks that share a model, converted for a run whose ranks share it in another way.

Each rank saves its pieces of the tensors, and where they lie in the whole ones (`Layout`). The same ranks read their
parts unchanged. For others, `whole_part` joins the parts of one worker to a part with whole tensors, from which
`cut_part` cuts the pieces of each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.functional.precision import state_dtype
from lightning_lopt.islands import Box, Layout

Boxes = Mapping[str, Box]


class InFlight(NamedTuple):
    """A sync in flight that sent whole tensors, all of them or some.

    Attributes:
        tensors: Tensors by kind and name: of each that was sent, the `mean` that arrived, the worker's own value as it
            was `launched`, the `residual` of compression and the `codec_state`.
        squared_norms: Mean squared norm of the workers' pseudo-gradients, by type.
        unstepped: This worker's tensors that no optimizer steps, as they were launched.
        arrived: Global values of those that some worker changed.
        common: Other entries that the workers have in common.
    """

    tensors: dict[str, dict[str, Tensor]]
    squared_norms: dict[torch.dtype, Tensor]
    unstepped: dict[str, Tensor]
    arrived: dict[str, Tensor]
    common: dict[str, Any]

    @classmethod
    def of(cls, part: Mapping[str, Any], names: Sequence[str]) -> InFlight | None:
        """The sync in flight of a part; None if there is none, or one that cannot be put together or cut.

        That is one of random coordinates, which are others for other pieces; of `sharded=True`, of which each worker
        has the mean of its own tensors alone; and one that gathered every worker's values (LAgg-A).

        Args:
            part: Part of a rank, or of a worker of one rank.
            names: Names of the parameters that it holds.
        """
        common, own = part["rounds"]["sync"]["exchange"], part["local"]["sync"]["exchange"]
        if common is None or own is None or own.get("sent") is None or common["flat_buffers"] is None:
            return None
        if any(buffer["worker_payloads"] is not None for buffer in common["flat_buffers"]):
            return None
        launched = dict(zip([names[int(i)] for i in own["sent"]], own["launched"], strict=True))
        tensors: dict[str, dict[str, Tensor]] = {"mean": {}, "launched": launched, "residual": {}, "codec_state": {}}
        for buffer, residual in zip(common["flat_buffers"], own["residuals"], strict=True):
            of_type = {n: y for n, y in launched.items() if state_dtype(y) == buffer["payload"].dtype}
            for kind, flat in (("mean", buffer["payload"]), ("residual", residual)):
                if flat is not None:
                    values = flat.split([y.numel() for y in of_type.values()])
                    tensors[kind] |= {n: v.view(y.shape) for (n, y), v in zip(of_type.items(), values, strict=True)}
            states = zip(of_type, buffer["codec_states"] or (), strict=False)
            tensors["codec_state"] |= {name: state for name, state in states if state is not None}
        norms = {b["payload"].dtype: b["squared_norm"] for b in common["flat_buffers"]}
        rest = {**common, "differences": any(b["differences"] for b in common["flat_buffers"])}
        return cls(tensors, norms, own["unstepped"], common["arrived"], rest)

    def states(self, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The entries `exchange` of `Sync.state_dict` and `Sync.local_state`.

        Args:
            names: Names of all parameters that are held, in their order.
        """
        buffers, residuals, sent = [], [], []
        means = self.tensors["mean"]
        for dtype in sorted(self.squared_norms, key=lambda dtype: dtype.itemsize):  # as an exchange has them
            of_type = [name for name in names if name in means and means[name].dtype == dtype]
            sent += of_type
            codec_states = [self.tensors["codec_state"].get(name) for name in of_type]
            buffers.append(
                {
                    "payload": _flat([means[name] for name in of_type], dtype),
                    "squared_norm": self.squared_norms[dtype],
                    "worker_payloads": None,
                    "codec_states": codec_states if self.tensors["codec_state"] else None,
                    "differences": self.common["differences"],
                    "owned": [None, None],
                }
            )
            lost = self.tensors["residual"]
            residuals.append(_flat([lost[name] for name in of_type], dtype) if lost else None)
        own = {
            "sent": [[*names].index(name) for name in sent],
            "launched": [self.tensors["launched"][name] for name in sent],
            "unstepped": self.unstepped,
            "residuals": residuals,
            "flat_buffers": None,
        }
        return {**self.common, "flat_buffers": buffers, "arrived": self.arrived}, own


def whole_part(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put the parts of one worker's ranks together.

    Args:
        parts: Parts of all ranks of the worker, in their order, with `rounds` each, and a `layout`; or its only part,
            without one.

    Returns:
        A part like that of a worker of one rank, with a sync in flight if that can be cut.
    """
    first = dict(parts[0])
    if first.get("layout") is None:
        names = [str(i) for i in range(len(first["rounds"]["sync"]["anchors"]))]
        return first if InFlight.of(first, names) else without_flight(first)
    layouts = [Layout.from_state(part["layout"]) for part in parts]
    sizes, order = layouts[0].sizes, layouts[0].order

    def join(name: str, values: Sequence[Any], boxes: Sequence[Boxes]) -> Any:
        """The whole tensor from its pieces; for values that are not pieces, the first one that is not None."""
        pieces = [(own[name], v) for own, v in zip(boxes, values, strict=True) if name in own]
        if not pieces or not all(isinstance(v, Tensor) and v.shape == box.shape for box, v in pieces):
            return next((v for v in values if v is not None), None)
        whole = pieces[0][1].new_empty(sizes[name])
        for box, value in pieces:
            box.of_whole(whole).copy_(value)
        return whole

    held = [layout.boxes for layout in layouts]

    def join_lists(get: Callable[[Mapping[str, Any]], Sequence[Any]]) -> list[Any]:
        named = [dict(zip(layout.held, get(part), strict=True)) for layout, part in zip(layouts, parts, strict=True)]
        return [join(name, [values.get(name) for values in named], held) for name in order]

    def join_states(named: Sequence[Mapping[str, Mapping[str, Any]]], boxes: Sequence[Boxes]) -> dict[str, Any]:
        joined = {}
        for name in dict.fromkeys(name for values in named for name in values):
            keys = dict.fromkeys(key for values in named for key in values.get(name, {}))
            joined[name] = {key: join(name, [v.get(name, {}).get(key) for v in named], boxes) for key in keys}
        return joined

    def outer_state() -> dict[str, Any] | None:
        states = [part["rounds"]["sync"]["outer"] for part in parts]
        if states[0] is None:
            return None
        named = [_by_name(s, layout.held) for s, layout in zip(states, layouts, strict=True)]
        return _by_number(join_states(named, held), states[0]["param_groups"], layouts[0].groups)

    def optimizer_states() -> Iterator[dict[str, Any]]:
        groups = iter(layouts[0].groups)
        for states in zip(*(part["checkpoint"]["optimizer_states"] for part in parts), strict=True):
            own = list(islice(groups, len(states[0]["param_groups"])))
            named = [_by_name(state, [name for group in own for name in group]) for state in states]
            joined = join_states(named, [layout.shards for layout in layouts])
            yield _by_number(joined, states[0]["param_groups"], own)

    def join_unstepped(named: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        names = dict.fromkeys(name for values in named for name in values)
        together = {name: [values[name] for values in named if name in values] for name in names}
        return {
            name: _mean(values) if name not in sizes else join(name, [v.get(name) for v in named], held)
            for name, values in together.items()
        }

    def in_flight() -> InFlight | None:
        own = [InFlight.of(part, layout.held) for part, layout in zip(parts, layouts, strict=True)]
        flights = [flight for flight in own if flight is not None]
        if len(flights) < len(own):
            return None
        tensors = {}
        for kind in flights[0].tensors:
            named = [flight.tensors[kind] for flight in flights]
            names = [name for name in order if any(name in values for values in named)]
            tensors[kind] = {name: join(name, [values.get(name) for values in named], held) for name in names}
        norms: dict[torch.dtype, Tensor] = {}
        for dtype, value in (pair for flight in flights for pair in flight.squared_norms.items()):
            norms[dtype] = norms[dtype] + value if dtype in norms else value
        unstepped = join_unstepped([flight.unstepped for flight in flights])
        return InFlight(
            tensors, norms, unstepped, join_unstepped([flight.arrived for flight in flights]), flights[0].common
        )

    return _with(
        first,
        anchors=join_lists(lambda part: part["rounds"]["sync"]["anchors"]),
        codec_states=join_lists(_codec_states),
        outer=outer_state(),
        params=join_lists(lambda part: part["local"]["sync"]["params"]),
        residuals=join_lists(lambda part: part["local"]["sync"]["residuals"]),
        synced=join_unstepped([part["rounds"]["sync"]["unstepped"] for part in parts]),
        tensors=join_unstepped([part["local"]["sync"]["unstepped"]["tensors"] for part in parts]),
        optimizers=list(optimizer_states()),
        in_flight=in_flight(),
        names=order,
    )


def cut_part(part: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Cut what one rank holds from the part of a worker of one rank.

    Args:
        part: Part with whole tensors.
        layout: Pieces of the rank.
    """
    sizes = layout.sizes

    def cut(name: str, value: Any, boxes: Boxes) -> Any:
        if isinstance(value, Tensor) and name in boxes and value.shape == torch.Size(sizes[name]):
            return boxes[name].of_whole(value).clone()
        return value

    def cut_list(values: Sequence[Any]) -> list[Any]:
        named = dict(zip(layout.order, values, strict=True))
        return [cut(name, named[name], layout.boxes) for name in layout.held]

    def cut_states(named: Mapping[str, Mapping[str, Any]], boxes: Boxes) -> dict[str, Any]:
        return {n: {k: cut(n, v, boxes) for k, v in values.items()} for n, values in named.items() if n in boxes}

    def outer_state() -> dict[str, Any] | None:
        state = part["rounds"]["sync"]["outer"]
        if state is None:
            return None
        own = [[name for name in group if name in layout.boxes] for group in layout.groups]
        return _by_number(cut_states(_by_name(state, layout.order), layout.boxes), state["param_groups"], own)

    def optimizer_states() -> Iterator[dict[str, Any]]:
        groups = iter(layout.groups)
        for state in part["checkpoint"]["optimizer_states"]:
            own = list(islice(groups, len(state["param_groups"])))
            named = cut_states(_by_name(state, [name for group in own for name in group]), layout.shards)
            yield _by_number(named, state["param_groups"], own)

    def cut_unstepped(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: cut(n, value, layout.boxes) for n, value in named.items() if n in layout.boxes or n not in sizes}

    def in_flight() -> InFlight | None:
        whole = InFlight.of(part, layout.order)
        if whole is None:
            return None
        tensors = {
            kind: {name: cut(name, value, layout.boxes) for name, value in named.items() if name in layout.boxes}
            for kind, named in whole.tensors.items()
        }
        norms = {  # in shares, which sum to the whole over the ranks
            dtype: norm * _numel(tensors["mean"], dtype) / max(1, _numel(whole.tensors["mean"], dtype))
            for dtype, norm in whole.squared_norms.items()
        }
        return InFlight(tensors, norms, cut_unstepped(whole.unstepped), cut_unstepped(whole.arrived), whole.common)

    return _with(
        part,
        anchors=cut_list(part["rounds"]["sync"]["anchors"]),
        codec_states=cut_list(_codec_states(part)),
        outer=outer_state(),
        params=cut_list(part["local"]["sync"]["params"]),
        residuals=cut_list(part["local"]["sync"]["residuals"]),
        synced=cut_unstepped(part["rounds"]["sync"]["unstepped"]),
        tensors=cut_unstepped(part["local"]["sync"]["unstepped"]["tensors"]),
        optimizers=list(optimizer_states()),
        in_flight=in_flight(),
        names=layout.held,
    )


def without_flight(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part without its sync in flight."""
    return {
        **part,
        **{key: {**part[key], "sync": {**part[key]["sync"], "exchange": None}} for key in ("rounds", "local")},
    }


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]) if tensors else torch.empty(0, dtype=dtype)


def _numel(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    return sum(tensor.numel() for tensor in tensors.values() if tensor.dtype == dtype)


def _mean(buffers: Sequence[Tensor]) -> Tensor:
    """The mean over the ranks of a worker of a floating-point buffer; of any other buffer, the first rank's."""
    return torch.stack(list(buffers)).mean(0) if buffers[0].is_floating_point() else buffers[0]


def _with(
    part: Mapping[str, Any],
    *,
    anchors: list[Any],
    codec_states: list[Any],
    outer: Any,
    params: list[Any],
    residuals: list[Any],
    synced: dict[str, Tensor],
    tensors: dict[str, Tensor],
    optimizers: list[dict[str, Any]],
    in_flight: InFlight | None,
    names: Sequence[str],
) -> dict[str, Any]:
    """A part with other tensors."""
    local, rounds = part["local"], part["rounds"]
    common_exchange, own_exchange = (None, None) if in_flight is None else in_flight.states(names)
    own = {
        **local["sync"],
        "params": params,
        "residuals": residuals,
        "unstepped": {**local["sync"]["unstepped"], "tensors": tensors},
        "exchange": own_exchange,
    }
    common = {
        **rounds["sync"],
        "anchors": anchors,
        "codec_states": codec_states,
        "unstepped": synced,
        "outer": outer,
        "exchange": common_exchange,
    }
    return {
        **part,
        "layout": None,
        "checkpoint": {**part["checkpoint"], "optimizer_states": optimizers},
        "local": {**local, "sync": own},
        "rounds": {**rounds, "sync": common},
    }


def _codec_states(part: Mapping[str, Any]) -> Sequence[Any]:
    """The state of a codec for each parameter, None where there is none."""
    state = part["rounds"]["sync"]
    return state.get("codec_states") or [None] * len(state["anchors"])


def _by_name(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The states of an optimizer's parameters by name instead of number."""
    states: Mapping[int, Any] = state["state"]
    return {names[i]: values for i, values in states.items()}


def _by_number(
    named: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """A state dict from states by name; the groups hold the names of their parameters."""
    numbers = {name: i for i, name in enumerate(name for group in groups for name in group)}
    starts = [sum(map(len, groups[:i])) for i in range(len(groups))]
    return {
        "state": {numbers[name]: values for name, values in named.items()},
        "param_groups": [
            {**options, "params": list(range(start, start + len(own)))}
            for options, own, start in zip(param_groups, groups, starts, strict=True)
        ],
    }
