"""Methods that the benchmark `wire` compares: their options, and their rounds in the model of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lightning_lopt import costs
from lightning_lopt.compression import PowerSGD
from lightning_lopt.costs import DDP, Parameters, Round, data_parallel, number_of
from lightning_lopt.network import AdaMLP
from lightning_lopt.optim import LearnedOptimizer
from lightning_lopt.worker_speeds import Speeds, WorkerSpeeds


@dataclass(frozen=True)
class Method(costs.Method):
    """A method with its outer optimizer, for workers of unequal speeds, too.

    Attributes:
        outer: Function that makes the outer optimizer for K workers; None averages.
        pace: Source of the workers' speeds, `"given"` or `"measured"`, to which their numbers of steps are
            proportional; None gives H steps to all.
    """

    outer: Callable[[int], Any] | None = None
    pace: Literal["given", "measured"] | None = None

    def speeds(self, step_seconds: Sequence[float]) -> Speeds:
        """Argument `worker_speeds` of `Rounds`, for workers with these times per local step."""
        return [1 / seconds for seconds in step_seconds] if self.pace == "given" else self.pace

    def round_of_worker(
        self, local_steps: int, parameters: Parameters, step_seconds: Sequence[float], rank: int
    ) -> Round:
        """Model of a round of one worker, given the times of a local step on all workers."""
        num_workers = len(step_seconds)
        pace = WorkerSpeeds(
            self.pace and [1 / seconds for seconds in step_seconds], num_workers, rank, torch.device("cpu")
        )
        own_steps = pace.steps(local_steps)
        a_round = self.round(local_steps, parameters, num_workers)
        return replace(
            a_round, local_steps=own_steps, overlap_steps=pace.overlap(int(a_round.overlap_steps), own_steps)
        )


def _learned(num_workers: int) -> Any:
    return partial(LearnedOptimizer, network=AdaMLP.bundled())


def _lagg(num_workers: int) -> Any:
    """A network of K inputs with a last layer of zeros, as before meta-training: a Nesterov step at LAgg-A's cost."""
    network = AdaMLP(num_workers, hidden=(8, 8), update="masked_blended_nesterov", step_mult=1.0, exp_mult=1.0, seed=0)
    nn.init.zeros_(network.get_parameter("layers.2.weight"))
    return partial(LearnedOptimizer, network=network)


_SPARSE = {"density": 0.25}
METHODS = {
    "Local SGD": Method(),
    "int8": Method({"compression": "int8"}),
    "PowerSGD": Method({"compression": PowerSGD(4)}),
    "overlap": Method(overlap=5 / 8),
    "LOSCAR": Method(_SPARSE, overlap=1 / 4),
    "LearnedLocalSGD": Method(outer=_learned),
    "LAgg-A, sharded": Method({"sharded": True}, worker_grads=True, outer=_lagg),
}
FOR_UNEQUAL_SPEEDS = {
    "Local SGD, paced": Method(pace="given"),
    "overlap, paced": Method(overlap=5 / 8, pace="given"),
    "overlap, paced, overwriting": Method({"merge": "overwrite"}, overlap=5 / 8, pace="given"),
    "LOSCAR, paced": Method(_SPARSE, overlap=1 / 4, pace="given"),
    "LOSCAR, paced, overwriting": Method({**_SPARSE, "merge": "overwrite"}, overlap=1 / 4, pace="given"),
    "LOSCAR, pace measured": Method(_SPARSE, overlap=1 / 4, pace="measured"),
}
USUAL = [DDP, *METHODS]
METHODS |= FOR_UNEQUAL_SPEEDS
NAMES = [DDP, *METHODS]
METHODS["LOpt-A"] = METHODS["LearnedLocalSGD"]  # its name in files of earlier versions


def round_of(
    name: str, local_steps: int, parameters: Parameters, step_seconds: Sequence[float], rank: int = 0
) -> Round:
    """Model of a round of a method; a round of DDP is one step.

    Args:
        name: Name of the method, one of `NAMES`.
        local_steps: Number of local steps of the fastest worker, H >= 1.
        parameters: Number of parameters of the model, or the shapes of their tensors, which PowerSGD needs.
        step_seconds: Seconds of a local step on each worker.
        rank: Rank of the worker.

    Example:
        >>> times = [0.1, 0.3]
        >>> [round(round_of(name, 16, 10**6, times).bytes_sent / 1e6, 2) for name in ("DDP", "int8", "LOSCAR")]
        [4.0, 1.0, 1.0]
        >>> [round_of("LOSCAR, paced", 12, 1000, times, rank).local_steps for rank in range(2)]
        [12, 4]
    """
    if name == DDP:
        return data_parallel(4 * number_of(parameters), len(step_seconds))
    return METHODS[name].round_of_worker(local_steps, parameters, step_seconds, rank)
