"""The methods that the benchmark `wire` compares: how they travel, and what that is in the model of the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from lightning_lopt.bench.link import Round, all_gather, all_reduce, all_to_all, data_parallel
from lightning_lopt.network import AdaMLP
from lightning_lopt.optim import LearnedOptimizer
from lightning_lopt.travel import Travel

DDP = "DDP"


@dataclass(frozen=True)
class Method:
    """A way to synchronise.

    Attributes:
        options: of `Travel`, but for the overlap.
        overlap: share of the H local steps that run beside the transfer.
        outer: makes the outer optimizer for K workers; None averages.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    overlap: float = 0.0
    outer: Callable[[int], Any] | None = None

    def travel(self, local_steps: int) -> Travel:
        """How parameters travel in rounds of H steps."""
        return Travel(overlap_steps=int(self.overlap * local_steps), **self.options)

    def round(self, local_steps: int, parameters: int, num_workers: int) -> Round:
        """The model of a round."""
        travel = self.travel(local_steps)
        a_round = partial(Round, local_steps, travel.overlap_steps)
        if travel.sharded:
            half = all_to_all(4 * parameters, num_workers)
            return a_round(half, exposed=half)
        if travel.compression == "int8":
            return a_round(all_to_all(parameters, num_workers) + all_gather(parameters / num_workers, num_workers))
        return a_round(all_reduce(4 * travel.density * parameters, num_workers))


def _lopt(num_workers: int) -> Any:
    return partial(LearnedOptimizer, network=AdaMLP.bundled())


def _lagg(num_workers: int) -> Any:
    """A network of K inputs whose last layer is 0, as meta-training begins: a Nesterov step, at LAgg-A's cost."""
    network = AdaMLP(num_workers, hidden=(8, 8), update="orthogonal_nesterov", step_mult=1.0, exp_mult=1.0, seed=0)
    nn.init.zeros_(network.get_parameter("layers.2.weight"))
    return partial(LearnedOptimizer, network=network)


METHODS = {
    "Local SGD": Method(),
    "int8": Method({"compression": "int8"}),
    "overlap": Method(overlap=5 / 8),
    "LOSCAR": Method({"density": 0.25}, overlap=1 / 4),
    "LOSCAR, overwriting": Method({"density": 0.25, "merge": "overwrite"}, overlap=1 / 4),
    "LOpt-A": Method(outer=_lopt),
    "LAgg-A, sharded": Method({"sharded": True}, outer=_lagg),
}
NAMES = [DDP, *METHODS]


def round_of(name: str, local_steps: int, parameters: int, num_workers: int) -> Round:
    """The model of a round of one of `NAMES`; that of DDP is a step.

    Example:
        >>> [round_of(name, 16, 1000, num_workers=2).transfer.bytes_sent for name in ("DDP", "int8", "LOSCAR")]
        [4000.0, 1000.0, 1000.0]
    """
    if name == DDP:
        return data_parallel(4 * parameters, num_workers)
    return METHODS[name].round(local_steps, parameters, num_workers)
