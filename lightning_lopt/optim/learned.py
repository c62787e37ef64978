"""The learned optimizer as a `torch.optim.Optimizer`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_lopt.functional import learned
from lightning_lopt.functional.ada import AdaState
from lightning_lopt.functional.blocks import one_thread
from lightning_lopt.functional.damping import damping
from lightning_lopt.functional.learned import Network
from lightning_lopt.functional.updates import carried
from lightning_lopt.network import AdaMLP


def resolve_network(network: AdaMLP | str | Path | None) -> AdaMLP:
    """The network itself, one loaded from a path, a bundled one by name, or (None) the bundled default."""
    if network is None:
        return AdaMLP.bundled()
    if isinstance(network, AdaMLP):
        return network
    if not isinstance(network, (str, Path)):
        raise TypeError(f"network must be an AdaMLP, a path or the name of bundled weights, not {network!r}.")
    if isinstance(network, str) and network in AdaMLP.bundled_names():
        return AdaMLP.bundled(network)
    return AdaMLP.load(network)


class LearnedOptimizer(Optimizer):
    r"""A meta-learned outer step: LOpt-A, or LAgg-A when the network has K inputs.

    .. math:: p \leftarrow p - \mathrm{step}(\mathrm{MLP}(\text{Ada features of } p, g))

    There is nothing to tune. ``p.grad`` is the averaged pseudo-gradient; a network with K inputs also needs
    ``p.worker_grads`` [K, *S]. The state is float32 (float64 for float64 parameters) whatever the parameter's type:
    ``momentum`` (3 per coordinate), ``second`` (1), ``row`` and ``col`` (3 per row and column), ``square``,
    ``limit``, ``local_scale``, ``left`` and ``right`` (the default's Gram matrices) and ``step``. With an update that
    has a base step, as the default has, a pseudo-gradient that grows by more than half is damped
    (`lightning_lopt.functional.damping`), unless ``local_lr`` times ``local_steps`` has grown as much, and what the
    workers' ``local_momentum`` keeps over a round is not remembered again (`functional.updates.decays_of_round`). The
    strategies write these three into each group.

    Args:
        params: anchors, or groups of them.
        network: an `AdaMLP`, a path to a weights file, the name of bundled weights, or None for the default ones.

    Attributes:
        needs_worker_grads: whether `p.worker_grads` must be set.
        num_workers: the K that the network belongs to, or None for any.
        needs_whole_tensors: its statistics of rows and columns are undefined on random coordinates.
        total: makes sums over the parameters here sums over those of all shards; whoever shards them sets it.
        max_update_ratio: a sync falls back to averaging when a step is more than this many times the averaged one.

    Raises:
        ValueError: sparse or complex parameters, a gradient of another shape, a missing `worker_grads`.

    Source: arXiv 2312.02204.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(4, 3))
        >>> outer = LearnedOptimizer([p], network=AdaMLP(seed=0))
        >>> p.grad = torch.randn(4, 3)
        >>> outer.step()
        >>> sorted(outer.state[p]), tuple(outer.state[p]["row"].shape)
        (['col', 'left', 'limit', 'local_scale', 'momentum', 'right', 'row', 'second', 'square', 'step'], (1, 3, 1, 3))
    """

    needs_whole_tensors = True
    max_update_ratio = 100.0

    def __init__(self, params: ParamsT, network: AdaMLP | str | Path | None = None) -> None:
        self.network = resolve_network(network)
        self._functional: dict[tuple[torch.device, torch.dtype], Network] = {}
        self.total: Callable[[Tensor], Tensor] = _own
        super().__init__(params, {})

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which step for themselves: torch's leaves out what is not its own."""
        return {**super().__getstate__(), "network": self.network, "_functional": {}, "total": _own}

    @property
    def num_workers(self) -> int | None:
        return self.network.inputs if isinstance(self.network.inputs, int) else None

    @property
    def needs_worker_grads(self) -> bool:
        return self.num_workers is not None

    @property
    def fingerprint(self) -> str:
        """Differs for networks that differ in their configuration or in any weight."""
        digest = hashlib.sha256(repr(self.network.config).encode())
        for p in self.network.parameters():
            digest.update(p.detach().double().cpu().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One outer step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        with one_thread():
            factor = self._damping(pairs)
            for p, group in pairs:
                kept = carried(group.get("local_momentum", 0.0), group.get("local_steps", 1))
                self._step_one(p, factor, p.new_tensor([kept]))
        return loss

    def _damping(self, pairs: Sequence[tuple[Tensor, dict[str, Any]]]) -> Tensor | None:
        if not self.network.relative:
            return None
        grads, states, rounds, scales = [], [], [], []
        for p, group in pairs:
            grads.append(_grad(p))
            states.append(self._accumulators(p))
            rounds.append(self.state[p]["step"].to(p.device))
            scales.append(p.new_tensor([group.get("local_lr", 0.0) * group.get("local_steps", 1)]))
        return damping(grads, states, rounds, scales, self.total)

    def _accumulators(self, p: Tensor) -> AdaState:
        state = self.state[p]
        if not state:
            ada_state = AdaState.zeros(tuple(p.shape), 1, _working_dtype(p), p.device, self.network.relative)
            state.update(vars(ada_state), step=torch.zeros(1, dtype=torch.long))
        return AdaState(**{name: state[name] for name in AdaState.__dataclass_fields__})

    def _step_one(self, p: Tensor, factor: Tensor | None, kept: Tensor) -> None:
        workers = getattr(p, "worker_grads", None) if self.needs_worker_grads else None
        if self.needs_worker_grads and (workers is None or len(workers) != self.num_workers):
            raise ValueError(
                f"This network belongs to {self.num_workers} workers: set p.worker_grads to their stacked "
                "pseudo-gradients before step(), or use a network with inputs='mean'."
            )
        grad = _grad(p)
        work, accumulators = p.to(grad.dtype).unsqueeze(0), self._accumulators(p)
        learned.step(
            work,
            grad,
            accumulators,
            self._network_for(p.device, grad.dtype),
            self.state[p]["step"].to(p.device),
            None if workers is None else workers.to(grad.dtype).unsqueeze(0),
            factor,
            kept,
        )
        self.state[p]["step"] += 1
        if work.data_ptr() != p.data_ptr():
            p.copy_(work[0])

    def _network_for(self, device: torch.device, dtype: torch.dtype) -> Network:
        if (device, dtype) not in self._functional:
            named = self.network.named_parameters()
            moved = {name: p.detach().to(device, dtype).unsqueeze(0) for name, p in named}
            self._functional[device, dtype] = self.network.functional(moved)
        return self._functional[device, dtype]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the accumulators keep their own type, where torch casts them to the parameter's.

        Raises:
            ValueError: a state of another version of this optimizer, or of another one.
        """
        for saved in state_dict["state"].values():
            if saved and saved.keys() != (names := {*AdaState.__dataclass_fields__, "step"}):
                raise ValueError(
                    f"This state holds {sorted(saved)} but LearnedOptimizer's now has {sorted(names)}: another version "
                    "wrote it, or another optimizer. Load it with that one, or begin with a fresh state."
                )
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(indices, params, strict=False):
            saved = {name: tuple(v.shape) for name, v in state_dict["state"].get(i, {}).items() if name != "step"}
            own = AdaState.zeros(tuple(p.shape), 1, torch.float32, torch.device("meta"), self.network.relative)
            if saved and saved != (shapes := {name: tuple(v.shape) for name, v in vars(own).items()}):
                raise ValueError(
                    f"This state of a parameter of shape {tuple(p.shape)} has shapes {saved}, but with the update "
                    f"{self.network.update!r} it is {shapes}: another network wrote it, or it is of another model. "
                    "Load it with that network, or begin with a fresh state."
                )
        super().load_state_dict(state_dict)
        for i, p in zip(indices, params, strict=True):
            saved = state_dict["state"].get(i, {})
            self.state[p].update(
                {name: v.to("cpu" if name == "step" else p.device, copy=True) for name, v in saved.items()}
            )


def _own(sums: Tensor) -> Tensor:
    return sums


def _working_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _grad(p: Tensor) -> Tensor:
    """[1, *S], in the type of the accumulators."""
    assert p.grad is not None
    if p.grad.is_sparse or p.is_complex():
        raise ValueError("LearnedOptimizer takes dense real parameters and gradients only.")
    return p.grad.to(_working_dtype(p)).unsqueeze(0)
