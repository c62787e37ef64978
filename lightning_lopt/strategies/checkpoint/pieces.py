"""Parts of checkpoints of ranks that share a model, converted for a run whose ranks share it in another way.

Each rank saves its pieces of the tensors, and where they lie in the whole ones (`Layout`). The same ranks read their
parts unchanged. For others, `whole_part` joins the parts of one worker to a part with whole tensors, from which
`cut_part` cuts the pieces of each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.islands import Box, Layout

Boxes = Mapping[str, Box]


def whole_part(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put the parts of one worker's ranks together.

    Args:
        parts: Parts of all ranks of the worker, in their order, with a `layout` each; or its only part, without one.

    Returns:
        A part like that of a worker of one rank, without the sync in flight.
    """
    first = dict(parts[0])
    if first.get("layout") is None:
        return first
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

    def tensors() -> dict[str, Tensor]:
        named = [part["local"]["sync"]["unstepped"]["tensors"] for part in parts]
        together = {name: [values[name] for values in named if name in values] for name in named[0]}
        return {
            name: _mean(values) if name not in sizes else join(name, [v.get(name) for v in named], held)
            for name, values in together.items()
        }

    return _with(
        first,
        anchors=join_lists(lambda part: part["rounds"]["sync"]["anchors"]),
        codec_states=join_lists(_codec_states),
        outer=outer_state(),
        params=join_lists(lambda part: part["local"]["sync"]["params"]),
        residuals=join_lists(lambda part: part["local"]["sync"]["residuals"]),
        tensors=tensors(),
        optimizers=list(optimizer_states()),
    )


def cut_part(part: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Cut what one rank holds from the part of a worker of one rank.

    Args:
        part: Part with whole tensors.
        layout: Pieces of the rank.
    """

    def cut(name: str, value: Any, boxes: Boxes) -> Any:
        if isinstance(value, Tensor) and name in boxes and value.shape == torch.Size(layout.sizes[name]):
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

    tensors = part["local"]["sync"]["unstepped"]["tensors"]
    return _with(
        part,
        anchors=cut_list(part["rounds"]["sync"]["anchors"]),
        codec_states=cut_list(_codec_states(part)),
        outer=outer_state(),
        params=cut_list(part["local"]["sync"]["params"]),
        residuals=cut_list(part["local"]["sync"]["residuals"]),
        tensors={name: cut(name, value, layout.boxes) for name, value in tensors.items()},
        optimizers=list(optimizer_states()),
    )


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
    tensors: dict[str, Tensor],
    optimizers: list[dict[str, Any]],
) -> dict[str, Any]:
    """A part with other tensors and nothing in flight."""
    local, rounds = part["local"], part["rounds"]
    own = {
        **local["sync"],
        "params": params,
        "residuals": residuals,
        "unstepped": {**local["sync"]["unstepped"], "tensors": tensors},
        "exchange": None,
    }
    common = {
        **rounds["sync"],
        "anchors": anchors,
        "codec_states": codec_states,
        "outer": outer,
        "exchange": None,
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
