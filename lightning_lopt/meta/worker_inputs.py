"""LAgg-A from LOpt-A: a network that sees every worker's pseudo-gradient, from one that sees their mean."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lopt.functional.ada import RMS_EPS
from lightning_lopt.functional.features import feature_slices
from lightning_lopt.functional.updates import UPDATES
from lightning_lopt.meta.base import Tensors
from lightning_lopt.meta.evaluation import Evaluation
from lightning_lopt.meta.outer import SimulatedOuterStep, SimulatedRound, learned_step
from lightning_lopt.network import AdaMLP


def with_worker_inputs(network: AdaMLP, evaluation: Evaluation) -> AdaMLP:
    r"""Create a network that sees the pseudo-gradients of K workers and steps nearly as one that sees their mean.

    .. math:: w_k = \frac{c}{K}\, w, \qquad
        c = \operatorname{mean} \frac{\sqrt{\varepsilon + \mathrm{rms}(g_k)^2}}{\sqrt{\varepsilon + \mathrm{rms}(g)^2}}

    where w are the first layer's weights of the mean g, and w_k those of worker k's pseudo-gradient. Each of them is
    normalised by its own root mean square, which is larger than the mean's; c makes up for that, on average over the
    tensors, rounds and workers of the evaluation's runs. All other weights are copied. So the meta-training of LAgg-A
    begins at the loss of LOpt-A.

    Args:
        network: Network of the published update that sees the mean, as LOpt-A.
        evaluation: Runs in which c is measured; their K is that of the new network.

    Raises:
        ValueError: The network sees several workers already, or is of another update.

    Source: The networks are those of arXiv 2312.02204; the copy is ours.

    Example:
        >>> from lightning_lopt.meta import ImageMLP, LocalTraining
        >>> task = ImageMLP(torch.rand(50, 4, 4), torch.arange(50) % 5, hidden=(8,), batch_size=10)
        >>> evaluation = Evaluation("small", task, LocalTraining(2, 4, 0.1), num_rounds=6, num_runs=2)
        >>> with_worker_inputs(AdaMLP(seed=0), evaluation).inputs
        2
    """
    if network.inputs != "mean" or network.update != "published":
        raise ValueError(
            f"The network must see the mean of the workers, by the published update, not have inputs="
            f"{network.inputs!r} and update={network.update!r}. Give one of LOpt-A, such as AdaMLP()."
        )
    num_workers = evaluation.training.num_workers
    copy = AdaMLP(**{**network.config, "inputs": num_workers})
    columns = feature_slices(1, UPDATES[network.update].feature_kinds)["grads"]
    state = dict(network.state_dict())
    first = state["layers.0.weight"]
    grads = first[:, columns] * (_mean_rms_ratio(network, evaluation) / num_workers)
    state["layers.0.weight"] = torch.cat([grads.expand(-1, num_workers), first[:, columns.stop :]], 1)
    copy.load_state_dict(state)
    return copy.to(first.dtype)


def _mean_rms_ratio(network: AdaMLP, evaluation: Evaluation) -> float:
    """Average ratio of the divisors by which a worker's pseudo-gradient and the workers' mean become features."""
    ratios: list[Tensor] = []

    def outer(anchor: Tensors) -> SimulatedOuterStep:
        step = learned_step(anchor, [network])

        def recorded(anchor: Tensors, training: SimulatedRound) -> None:
            for name, a in anchor.items():
                grads = (a.unsqueeze(1) - training.workers[name]).flatten(2)
                ratios.append((_divisor(grads) / _divisor(grads.mean(1, keepdim=True))).mean())
            step(anchor, training)

        return recorded

    evaluation.losses_with(outer)
    return torch.stack(ratios).mean().item()


def _divisor(grads: Tensor) -> Tensor:
    """[N, K, n] to [N, K]."""
    return (grads.square().mean(2) + RMS_EPS).sqrt()
