"""The learned optimizer as a `torch.optim.Optimizer`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_lopt.functional import learned
from lightning_lopt.functional.ada import AdaState
from lightning_lopt.functional.learned import Network
from lightning_lopt.functional.model import ModelTensor
from lightning_lopt.functional.updates import FORMER_UPDATES, UPDATES
from lightning_lopt.network import AdaMLP
from lightning_lopt.optim.outer import WORKER_GRADS
from lightning_lopt.optim.whole_model import WholeModelOptimizer


def resolve_network(network: AdaMLP | str | Path | None) -> AdaMLP:
    """Return the network itself, one loaded from a path, a bundled one by name, or (None) the bundled default."""
    if network is None:
        return AdaMLP.bundled()
    if isinstance(network, AdaMLP):
        return network
    if not isinstance(network, (str, Path)):
        raise TypeError(f"network must be an AdaMLP, a path or the name of bundled weights, not {network!r}.")
    if isinstance(network, str) and network in AdaMLP.bundled_names():
        return AdaMLP.bundled(network)
    return AdaMLP.load(network)


class LearnedOptimizer(WholeModelOptimizer):
    r"""A meta-learned outer step: LOpt-A, or LAgg-A when the network has K inputs.

    .. math:: p \leftarrow p - \mathrm{step}(\mathrm{MLP}(\text{Ada features of } p, g))

    There is nothing to tune. ``p.grad`` is the averaged pseudo-gradient; a network with K inputs also needs
    ``p.worker_grads`` [K, *S]. The state is float32 (float64 for float64 parameters) whatever the parameter's type:
    ``momentum`` (3 per coordinate), ``second`` (1), ``row`` and ``col`` (3 per row and column), ``squared_norm``,
    ``norm_limit``, ``local_scale``, ``left_gram`` and ``right_gram`` (the default's Gram matrices) and ``step``.

    With the update ``"masked_blended_nesterov"``, which the default has, a pseudo-gradient that grows by more than half
    is damped (`lightning_lopt.functional.damping`), unless ``local_lr`` times ``local_steps`` has grown as much, and
    what the workers' ``local_momentum`` retains over a round is not remembered again
    (`lightning_lopt.functional.blended`). A sync writes these three into each group. Coordinates whose pseudo-gradient
    is and was exactly 0 do not move, as rows of an embedding that no batch has used yet; with ``"published"`` they do.

    Each parameter group names its ``update``: that of the network, or the version before it, where a state was loaded
    that had been saved with that one.

    Args:
        params: Anchors, or groups of them.
        network: Network as an `AdaMLP`, a path to a weights file, or the name of bundled weights; None for the
            default ones.

    Attributes:
        network: Network that makes the step.
        needs_worker_grads: Whether `p.worker_grads` must be set.
        num_workers: Number of workers K that the network belongs to, or None for any.
        needs_whole_tensors: Whether the step is undefined on random coordinates of a tensor: True.
        total: Function that adds up numbers over all shards of the model; set by a sync with `sharded=True`.
        max_update_ratio: Bound on the step in units of the averaged one, beyond which a sync averages instead.

    Raises:
        ValueError: Sparse or complex parameters, a gradient of another shape, or a missing `worker_grads`.

    Source: arXiv 2312.02204.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(4, 3))
        >>> outer = LearnedOptimizer([p], network=AdaMLP(seed=0))
        >>> p.grad = torch.randn(4, 3)
        >>> outer.step()
        >>> tuple(outer.state[p]["momentum"].shape), tuple(outer.state[p]["row"].shape)
        ((1, 3, 1, 4, 3), (1, 3, 1, 3))
    """

    _state_class = AdaState

    def __init__(self, params: ParamsT, network: AdaMLP | str | Path | None = None) -> None:
        self.network = resolve_network(network)
        self._functional: dict[tuple[torch.device, torch.dtype, str], Network] = {}
        super().__init__(params, {"update": self.network.update})

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "network": self.network, "_functional": {}}

    @property
    def num_workers(self) -> int | None:
        """Number of workers K that the network belongs to, or None for any."""
        return self.network.inputs if isinstance(self.network.inputs, int) else None

    @property
    def needs_worker_grads(self) -> bool:
        """Whether `p.worker_grads` must be set."""
        return self.num_workers is not None

    @property
    def fingerprint(self) -> str:
        """Digest that differs for networks that differ in their configuration or in any weight."""
        digest = hashlib.sha256(repr(self.network.config).encode())
        for p in self.network.parameters():
            digest.update(p.detach().double().cpu().numpy().tobytes())
        return digest.hexdigest()

    @override
    def _new_state(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> AdaState:
        return UPDATES[self.network.update].init_state(shape, 1, dtype, device)

    @override
    def _worker_grads(self, p: Tensor) -> Tensor | None:
        if not self.needs_worker_grads:
            return None
        workers: Tensor | None = getattr(p, WORKER_GRADS, None)
        if workers is None or len(workers) != self.num_workers:
            raise ValueError(
                f"This network belongs to {self.num_workers} workers: set p.worker_grads to their stacked "
                "pseudo-gradients before step(), or use a network with inputs='mean'."
            )
        return workers

    @override
    def _step_model(self, tensors: list[ModelTensor[AdaState]], groups: list[dict[str, Any]]) -> None:
        networks = [
            self._network_for(tensor.grad.device, tensor.grad.dtype, group.get("update", self.network.update))
            for tensor, group in zip(tensors, groups, strict=True)
        ]
        learned.step_model(tensors, networks, UPDATES[self.network.update], self.total)

    def _network_for(self, device: torch.device, dtype: torch.dtype, update: str) -> Network:
        if (device, dtype, update) not in self._functional:
            named = self.network.named_parameters()
            moved = {name: p.detach().to(device, dtype).unsqueeze(0) for name, p in named}
            self._functional[device, dtype, update] = self.network.functional(moved)._replace(update=UPDATES[update])
        return self._functional[device, dtype, update]

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, and go on with the version of the network's update with which it was saved.

        Args:
            state_dict: Result of `state_dict`.

        Raises:
            ValueError: The state is of another version of this optimizer, or of another one.
        """
        super().load_state_dict(state_dict)
        own = self.network.update
        former = FORMER_UPDATES.get(own, own)
        for group in self.param_groups:  # states of the former version do not name their update, or name it
            group["update"] = former if group.get("update", former) == former else own
