"""Rules by which the workers' values of a tensor become one, and the collectives for values that are not averaged.

Parameters that an optimizer steps are averaged, or stay each worker's own. For every other tensor this table has the
rule, unless the user's `sync_rules` have another:

| tensor                                                     | rule        |
|------------------------------------------------------------|-------------|
| named in `_ddp_params_and_buffers_to_ignore`               | `local`     |
| u and v of spectral normalisation, see `spectral_norm`     | `unit_mean` |
| `min_val`, `max_val` of observers of `torch.ao`            | `min`, `max`|
| histograms, `scale`, `zero_point` of `torch.ao`            | `first`     |
| other floating-point and complex tensors                   | `mean`      |
| other integers and booleans                                | `max`       |
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from lightning_lopt.comm import Communicator, jointly
from lightning_lopt.sync import spectral_norm

Rule = Literal["mean", "unit_mean", "max", "min", "sum_of_changes", "first", "local"]

# Classes by name: some are private, some are not imported by every program.
_RULES_BY_CLASS: dict[str, dict[str, Rule]] = {
    "torch.ao.quantization.observer.HistogramObserver": dict.fromkeys(("histogram", "min_val", "max_val"), "first"),
    "torch.ao.quantization.observer.ObserverBase": {"min_val": "min", "max_val": "max"},
    "torch.ao.quantization.fake_quantize.FakeQuantizeBase": {"scale": "first", "zero_point": "first"},
    "torch.nn.modules.batchnorm._NormBase": {"num_batches_tracked": "max"},
}


class HasSubmodules(Protocol):
    """The part of a `torch.nn.Module` that `Rules` need."""

    def get_submodule(self, target: str) -> Any: ...


class Rules:
    """The rule of each tensor of a model.

    Args:
        model: The model.
        patterns: Rules of the user by glob pattern of the tensor's name; the first pattern that fits holds.

    Raises:
        ValueError: A rule is unknown.

    Example:
        >>> rules = Rules(torch.nn.BatchNorm1d(2), {"running_*": "local"})
        >>> rules.of("running_mean", torch.zeros(2)), rules.of("num_batches_tracked", torch.tensor(0))
        ('local', 'max')
    """

    def __init__(self, model: HasSubmodules, patterns: Mapping[str, Rule]) -> None:
        check_rules(patterns)
        self._model, self._patterns = model, patterns
        ignored = getattr(model.get_submodule(""), "_ddp_params_and_buffers_to_ignore", ())  # the name is DDP's
        self._ignored = frozenset(ignored)
        self._stated: dict[str, Rule | None] = {}

    def of(self, name: str, tensor: Tensor) -> Rule:
        """The rule of a tensor.

        Args:
            name: Name of the tensor in the model.
            tensor: The tensor, whose type matters.
        """
        return self.stated(name) or ("mean" if _has_fractions(tensor) else "max")

    def counts(self, name: str, tensor: Tensor) -> bool:
        """Whether the rule of a tensor needs its value at the last sync."""
        return self.of(name, tensor) == "sum_of_changes"

    def stated(self, name: str) -> Rule | None:
        """The rule that the user or the class of the tensor's module gives; None if the tensor's type decides."""
        if name not in self._stated:  # asked for each tensor in each sync
            self._stated[name] = self._by_user(name) or self._by_class(name)
        return self._stated[name]

    def is_local(self, name: str) -> bool:
        """Whether a tensor stays a worker's own."""
        return self._by_user(name) == "local"

    def unused(self, names: Sequence[str]) -> dict[str, str | None]:
        """The user's patterns that match none of the names, each with a name that is near, if there is one."""
        unused = [pattern for pattern in self._patterns if not any(fnmatchcase(name, pattern) for name in names)]
        return {pattern: _near(pattern, names) for pattern in unused}

    def _by_user(self, name: str) -> Rule | None:
        for pattern, rule in self._patterns.items():
            if fnmatchcase(name, pattern):
                return rule
        return "local" if name in self._ignored else None

    def module_of(self, name: str) -> Any:
        """The module that owns a tensor; None if there is none."""
        try:
            return self._model.get_submodule(name.rpartition(".")[0])
        except AttributeError:
            return None

    def _by_class(self, name: str) -> Rule | None:
        module, own_name = self.module_of(name), name.rpartition(".")[2]
        if own_name in spectral_norm.vectors(module):
            return "unit_mean"
        for cls in spectral_norm.class_names(type(module)):
            if rule := _RULES_BY_CLASS.get(cls, {}).get(own_name):
                return rule
        return None


def _near(pattern: str, names: Sequence[str]) -> str | None:
    endings = [name for name in names if fnmatchcase(name, f"*{pattern}")]
    return next(iter(endings or get_close_matches(pattern, names, 1)), None)


def _has_fractions(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def check_rules(patterns: Mapping[str, Rule]) -> None:
    """Refuse rules that do not exist.

    Raises:
        ValueError: A rule is unknown.
    """
    wrong: Any = patterns
    if isinstance(patterns, Mapping):
        wrong = {pattern: rule for pattern, rule in patterns.items() if rule not in get_args(Rule)}
    if wrong:
        raise ValueError(
            f"sync_rules must map patterns of names to {', '.join(map(repr, get_args(Rule)))}, not {wrong!r}."
        )


class Contribution(NamedTuple):
    """One worker's values of a tensor, to be combined with those of the others.

    Attributes:
        rule: The rule.
        value: Present values.
        synced: Values at the last sync, None where there was none.
        is_piece: Whether the worker's other ranks hold other parts of the tensor.
    """

    rule: Rule
    value: Tensor
    synced: Tensor | None = None
    is_piece: bool = False

    @property
    def averaged(self) -> bool:
        """Whether the values can travel in the mean of the parameters."""
        return _has_fractions(self.value) and self.rule in ("mean", "unit_mean")

    def settled(self, mean: Tensor) -> Tensor:
        """The result of the rule, computed from the mean over the workers, in the type of the value.

        Args:
            mean: Mean of `as_real(value)`.
        """
        return as_given(scaled_to_1(mean) if self.rule == "unit_mean" else mean, self.value)


def scaled_to_1(tensor: Tensor) -> Tensor:
    """A floating-point or complex tensor scaled to norm 1."""
    norm = tensor.norm()
    return tensor / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as a real one with one more dimension; any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def as_given(real: Tensor, like: Tensor) -> Tensor:
    """The inverse of `as_real`, in the type of another tensor."""
    if like.is_complex():
        return torch.view_as_complex(real.view(*like.shape, 2).contiguous()).to(like.dtype)
    if not (like.is_floating_point() or real.dtype == torch.int64):
        real = real.round()
    return real.view(like.shape).to(like.dtype)


def wide(tensor: Tensor) -> Tensor:
    """A tensor in a type in which torch can compute: float32, float64, complex or int64."""
    if tensor.is_complex() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)


def combine(items: Sequence[Contribution], comm: Communicator, left_out: Sequence[int] = ()) -> list[Tensor]:
    """Combine the workers' values of tensors by their rules, in at most four small collectives of each rank.

    Args:
        items: Contributions of this worker, of the same rules, shapes and types on all workers.
        comm: Collectives among the workers.
        left_out: Workers whose values do not count.

    Example:
        >>> combine([Contribution("sum_of_changes", torch.tensor(5), torch.tensor(2))], Communicator())
        [tensor(5)]
    """
    kept = [k for k in range(comm.num_workers) if k not in left_out]
    results: dict[int, Tensor] = {}
    for largest, dtype, is_piece in product((True, False), (torch.int64, torch.float64), (False, True)):
        chosen = [i for i, item in enumerate(items) if (*_way(item), item.is_piece) == (largest, dtype, is_piece)]
        if not chosen:
            continue
        sent = [_sent(items[i], comm, kept) for i in chosen]
        received = jointly(sent, partial(comm.max_ if largest else comm.sum_, inside=not is_piece))
        for i, value in zip(chosen, received, strict=True):
            results[i] = _received(items[i], value, len(kept) * (1 if is_piece else comm.inside_size))
    return [results[i] for i in range(len(items))]


def _way(item: Contribution) -> tuple[bool, torch.dtype]:
    """Whether the collective takes the maximum instead of the sum, and the type in which values are sent."""
    return item.rule in ("max", "min"), torch.float64 if _has_fractions(item.value) else torch.int64


def _sent(item: Contribution, comm: Communicator, kept: Sequence[int]) -> Tensor:
    largest, dtype = _way(item)
    rank = comm.rank
    value = as_real(item.value).to(dtype)
    if largest:
        if rank not in kept:
            lowest = -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min
            return torch.full_like(value, lowest)
        return -value if item.rule == "min" else value
    if rank not in kept or (item.rule == "first" and (rank != kept[0] or (comm.inside_rank and not item.is_piece))):
        return torch.zeros_like(value)
    if item.rule == "sum_of_changes" and item.synced is not None:
        return value - as_real(item.synced).to(dtype)
    return value


def _received(item: Contribution, value: Tensor, num_kept: int) -> Tensor:
    if item.rule == "min":
        value = -value
    elif item.rule in ("mean", "unit_mean"):
        value = value.double() / num_kept
    elif item.rule == "sum_of_changes" and item.synced is not None:
        value = value + as_real(item.synced).to(value.dtype)
    return item.settled(value)


def warn_if_spoiled(name: str, own: Contribution, result: Tensor) -> bool:
    """Warn of a tensor that a rule chosen by its type may have spoiled, and name the rules to set.

    Args:
        name: Name of the tensor.
        own: This worker's values, and the rule.
        result: Global values.

    Returns:
        Whether there was something to warn of.
    """
    rule, reason = own.rule, next(_reasons(own.value, own.synced, result), None)
    if reason is None:
        return False
    what, advice = reason
    warnings.warn(
        f"{name} {what}, and the workers' values differed: a sync took their {'mean' if rule == 'mean' else 'maximum'}."
        f" If that is wrong for it, set another rule with sync_rules={{{name!r}: ...}}, {advice}; {rule!r} keeps this "
        "one and silences the warning.",
        stacklevel=2,
    )
    return True


def _reasons(own: Tensor, synced: Tensor | None, result: Tensor) -> Iterator[tuple[str, str]]:
    if own.shape != result.shape or own.numel() == 0 or own.is_complex() or own.dtype == torch.bool:
        return
    own, result = own.double(), result.double()
    if torch.equal(own, result):
        return
    if bool(own.isinf().any()):
        yield "holds infinities", "'max' or 'min'"
    if bool((own == own.round()).all()) and bool((own != 0).any()):
        yield "holds whole numbers", "'sum_of_changes' for counts, 'max' or 'min' for masks, or 'local'"
    if synced is not None and own.ndim > 1:
        written = (own != synced.double()).flatten(1).any(1)
        if bool(written.any()) and not bool(written.all()):
            yield "holds rows of which only some were written, as those of a queue or memory", "'local' or 'first'"
    for dim in {0, own.ndim - 1} if own.ndim and own.numel() > 1 else ():
        filled = own.norm(dim=dim) > 0
        units = (own.norm(dim=dim)[filled] - 1).abs() < 1e-3
        spoiled = ((result.norm(dim=dim)[filled] - 1).abs() > 1e-3).any()
        if own.shape[dim] > 1 and bool(units.all()) and bool(spoiled):
            yield "holds vectors of norm 1", "'local' or 'first'"
