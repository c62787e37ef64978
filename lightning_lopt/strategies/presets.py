"""The presets: LocalSGD with an outer optimizer of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_lopt.functional.integers import as_number
from lightning_lopt.network import AdaMLP
from lightning_lopt.optim import LearnedOptimizer, SlowMomentum
from lightning_lopt.optim.learned import resolve_network
from lightning_lopt.schedules import RoundInfo
from lightning_lopt.strategies.local_sgd import LocalSGD


class SlowMo(LocalSGD):
    r"""SlowMo: slow momentum over the averaged pseudo-gradient g.

    .. math:: u \leftarrow \beta u + g/\gamma, \qquad a \leftarrow a - \alpha \gamma u

    Args:
        local_steps: H >= 1, or a schedule.
        outer_lr: Step size α > 0; 1 is usual.
        momentum: Decay β in [0, 1); the authors suggest .2 for 4 workers, .5 for 8, .6 for 16.
        **kwargs: Arguments of `LocalSGD`, `sync_rules` among them.

    Raises:
        ValueError: α or β is out of its range.
        TypeError: `outer_optimizer` is given.

    Memory: 4 bytes per parameter on top of `LocalSGD`; the same bytes per round. Fails where β is too
    large for the number of workers: the steps overshoot.

    Source: arXiv 1910.00643, algorithm 1.

    Example:
        >>> SlowMo(local_steps=16, momentum=0.5).strategy_name
        'slowmo'
    """

    strategy_name = "slowmo"

    def __init__(
        self,
        local_steps: int | Callable[[RoundInfo], int] = 16,
        outer_lr: float = 1.0,
        momentum: float = 0.5,
        **kwargs: Any,
    ) -> None:
        _refuse_outer_optimizer(self, kwargs)
        factory = partial(SlowMomentum, lr=outer_lr, momentum=momentum)
        factory([torch.zeros(1)])  # wrong values fail here, not at the first sync
        super().__init__(local_steps=local_steps, outer_optimizer=factory, **kwargs)


class DiLoCo(LocalSGD):
    r"""DiLoCo: SGD with Nesterov momentum on the averaged pseudo-gradient g.

    .. math:: u \leftarrow \mu u + g, \qquad a \leftarrow a - \eta\,(g + \mu u)

    Args:
        local_steps: H >= 1, or a schedule; the paper has 500.
        outer_lr: Step size η > 0; the paper has 0.7.
        momentum: Decay μ in [0, 1); the paper has 0.9, and 0 is plain SGD.
        **kwargs: Arguments of `LocalSGD`, `sync_rules` among them.

    Raises:
        ValueError: η or μ is out of its range.
        TypeError: `outer_optimizer` is given.

    Memory: 4 bytes per parameter on top of `LocalSGD`; the same bytes per round. Fails with momentum in the local
    optimizer at a large rate, where the usual setting can diverge: lower η and μ.

    Source: arXiv 2311.08105.

    Example:
        >>> DiLoCo(local_steps=500).strategy_name
        'diloco'
    """

    strategy_name = "diloco"

    def __init__(
        self,
        local_steps: int | Callable[[RoundInfo], int] = 500,
        outer_lr: float = 0.7,
        momentum: float = 0.9,
        **kwargs: Any,
    ) -> None:
        _refuse_outer_optimizer(self, kwargs)
        if not (0 < as_number(outer_lr) < math.inf and 0 <= as_number(momentum) < 1):
            raise ValueError(f"DiLoCo needs outer_lr > 0 and momentum in [0, 1), not {outer_lr!r} and {momentum!r}.")
        factory = partial(torch.optim.SGD, lr=outer_lr, momentum=momentum, nesterov=momentum > 0)
        super().__init__(local_steps=local_steps, outer_optimizer=factory, **kwargs)


class LOSCAR(LocalSGD):
    r"""LOSCAR-SGD: each sync sends random coordinates S, while the workers go on.

    .. math:: x_{ij} = a_j + (z_{ij} - y_{ij}) \quad (j \in S), \qquad x_{ij} = z_{ij} \quad (j \notin S)

    y are worker i's parameters when the sync is launched, z when it is finished, and a is the mean of y, or any outer
    step from it. There is no common model between syncs; the workers' mean is evaluated, which the merge preserves.
    Workers may take unequal numbers of steps, H_i and Q_i in proportion to `worker_speeds`; they count 1/K each.
    With density 1 this is CoCoD-SGD, with overlap 0 and one local step SPARTA, with density 1 and overlap 0 Local SGD.

    Args:
        local_steps: H >= 1, all local steps of a round, or a schedule; a round of at most Q steps overlaps all but one.
        overlap_steps: Number of steps Q >= 0 in flight, less than H; best as many as the transfer takes.
        density: Share of the coordinates, in (0, 1]; 0.1 is a start.
        **kwargs: Arguments of `LocalSGD`, `sync_rules` among them.

    Raises:
        ValueError: The overlap has no room, or the outer optimizer needs whole tensors.

    Memory: 4 bytes per parameter for the anchor, 8 × density for the next round's coordinates, which are drawn ahead,
    and during a sync 16 × density for its coordinates, y, and the values in flight. Sends density × 2(K-1)/K × 4 bytes
    per parameter and round. Fails when workers drift apart within H / density steps, in which each coordinate is sent
    about once: watch `RoundMonitor`'s drift.

    Source: arXiv 2605.20866.

    Example:
        >>> LOSCAR(local_steps=64, overlap_steps=16, density=0.1).strategy_name  # 48 steps, launch, 16 steps, finish
        'loscar'
    """

    strategy_name = "loscar"

    def __init__(
        self,
        local_steps: int | Callable[[RoundInfo], int] = 64,
        overlap_steps: int = 16,
        density: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(local_steps=local_steps, overlap_steps=overlap_steps, density=density, **kwargs)


class LearnedLocalSGD(LocalSGD):
    r"""Local SGD whose global update is a meta-learned optimizer: LOpt-A, or LAgg-A with a network of K inputs.

    .. math:: a \leftarrow a - \mathrm{step}(\mathrm{MLP}(\text{Ada features of } a, g))

    There is nothing to tune: the bundled weights are the default. For each coordinate the network weighs three forms of
    a Nesterov step s, plain, orthogonalised and whitened (`AdaMLP.base_step`), and gates and corrects their mean:
    :math:`\mathrm{step} = e^m (w_1 s + w_2 O(s) + w_3 W(s)) + d\,\mathrm{rms}(s)`, and 0 where s is 0: what has had no
    gradient on any worker does not move. A step that is not finite, or more than 100 times the averaged one, is
    replaced by averaging, with a warning.

    Args:
        local_steps: H >= 1, or a schedule.
        network: An `AdaMLP`, a path to a weights file, the name of bundled weights, or None for the default ones.
        **kwargs: Arguments of `LocalSGD`, `sync_rules` among them, without `outer_optimizer`.

    Raises:
        FileNotFoundError: There is neither a file nor a bundled network of this name.
        WeightsError: The weights file cannot be used.
        ValueError: The network belongs to another number of workers.
        TypeError: `network` is of another type, or `outer_optimizer` is given.

    Memory: 16 bytes per parameter and a little per row and column on top of `LocalSGD`, and for the default's Gram
    matrices 3 to 16 more in usual models (of a matrix n × m at most 4 min(4, 512/n) + 4 min(4, 512/m)); the same bytes
    per round (LAgg-A: K-1 all-gathered payloads instead of an all-reduce, and K times the memory during a sync; an
    all-reduce's bytes and 1/K of the state with `sharded=True`).

    Fails on convolutions with momentum in the local optimizer and on low-rank factors (LoRA), at a large rate;
    on inputs of very unlike scales; and in runs of fewer than four rounds, where `LocalSGD` ends lower: its first steps
    turn away from the workers' mean, which pays off later.

    Source: arXiv 2312.02204.

    Example:
        >>> LearnedLocalSGD(local_steps=16, network=AdaMLP(seed=0)).strategy_name
        'learned_local_sgd'
    """

    strategy_name = "learned_local_sgd"

    def __init__(
        self,
        local_steps: int | Callable[[RoundInfo], int] = 16,
        network: AdaMLP | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_outer_optimizer(self, kwargs)
        factory = partial(LearnedOptimizer, network=resolve_network(network))
        super().__init__(local_steps=local_steps, outer_optimizer=factory, **kwargs)


def _refuse_outer_optimizer(strategy: LocalSGD, kwargs: dict[str, Any]) -> None:
    if "outer_optimizer" in kwargs:
        raise TypeError(
            f"{type(strategy).__name__} brings its own outer optimizer; for another one use "
            "LocalSGD(outer_optimizer=...)."
        )
