"""Local training between syncs: optimizers batched over replicas, and the settings drawn for each unroll."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from lightning_lopt.functional.blended import momentum_of_adam, retained_momentum
from lightning_lopt.meta.base import AbstractTask, Batch, Tensors, column

OptimizerKind = Literal["sgd", "momentum", "adamw", "muon"]
Number = TypeVar("Number", float, Tensor)
MOMENTUM, MUON_MOMENTUM = 0.9, 0.95
BETAS, EPS = (0.9, 0.999), 1e-8
MUON_COEFFICIENTS, MUON_STEPS, MUON_EPS, MUON_SCALE = (3.4445, -4.7750, 2.0315), 5, 1e-7, 0.2


@dataclass
class LocalOptimizerState:
    """Memory of the optimizers of R replicas; empty dictionaries where a kind needs none.

    Attributes:
        steps: Number of steps taken so far, [R].
        first: Momentum, or Adam's first moment, {[R, *S]}.
        second: Adam's second moment, {[R, *S]}.
    """

    steps: Tensor
    first: Tensors = field(default_factory=dict)
    second: Tensors = field(default_factory=dict)

    def forget(self, replicas: Sequence[int]) -> None:
        """Begin anew for some replicas."""
        for tensor in (self.steps, *self.first.values(), *self.second.values()):
            tensor[list(replicas)] = 0


@dataclass(frozen=True)
class LocalOptimizer:
    """An optimizer of the workers, equal to torch.optim's for each replica.

    Args:
        kind: Name ``"sgd"``, ``"momentum"`` (SGD, momentum 0.9), ``"adamw"`` (betas 0.9 and 0.999, epsilon 1e-8) or
            ``"muon"`` (momentum 0.95 and the rate that matches AdamW's; vectors by ``"adamw"``, convolutions as
            matrices with a row for each output), which iterates in the type of the parameters, torch's in bfloat16.
        weight_decay: Weight decay >= 0; added to the gradient by SGD, decoupled in AdamW and Muon.
        max_grad_norm: Norm > 0 to which the gradient of a replica is clipped; None leaves it.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> from lightning_lopt.meta import ImageMLP
        >>> task = ImageMLP(torch.rand(50, 8, 8), torch.arange(50) % 5, hidden=(16,), batch_size=10)
        >>> generator = torch.Generator().manual_seed(0)
        >>> params, optimizer = task.init(3, generator), LocalOptimizer("adamw")
        >>> state = optimizer.init(params)
        >>> optimizer.step(task, params, task.batch(3, generator), torch.full((3,), 1e-3), state).shape
        torch.Size([3])
        >>> state.steps
        tensor([1, 1, 1])
    """

    kind: OptimizerKind = "sgd"
    weight_decay: float = 0.0
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(OptimizerKind):
            raise ValueError(f"The local optimizer must be one of {get_args(OptimizerKind)}, not {self.kind!r}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be >= 0, not {self.weight_decay}.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, not {self.max_grad_norm}.")

    def init(self, params: Tensors) -> LocalOptimizerState:
        """Create the state before the first step."""
        some = next(iter(params.values()))
        state = LocalOptimizerState(torch.zeros(len(some), dtype=torch.long, device=some.device))
        if self.kind != "sgd":
            state.first = {name: torch.zeros_like(p) for name, p in params.items()}
        if self.kind in ("adamw", "muon"):
            by_adamw = {name: p for name, p in params.items() if self.kind == "adamw" or not _is_matrix(p)}
            state.second = {name: torch.zeros_like(p) for name, p in by_adamw.items()}
        return state

    def retained_momentum(self, local_steps: int) -> float:
        """Compute the share of the momentum that is left of it after a round; 0 for optimizers without."""
        momenta = {"momentum": MOMENTUM, "muon": MUON_MOMENTUM, "adamw": momentum_of_adam(BETAS[0])}
        return retained_momentum(momenta.get(self.kind, 0.0), local_steps)

    @torch.no_grad()
    def step(
        self, task: AbstractTask, params: Tensors, batch: Batch, local_lr: Tensor, state: LocalOptimizerState
    ) -> Tensor:
        """Take one step of every replica, in place on `params` and `state`.

        Args:
            task: Task that gives the gradient.
            params: Parameters, {[R, *S]}.
            batch: Batch of each replica, tensors [R, B, *].
            local_lr: Local learning rate γ >= 0 of each replica, [R].
            state: State of the optimizer, from `init`.

        Returns:
            Loss before the step, [R].
        """
        if self.kind == "sgd" and not self.weight_decay and self.max_grad_norm is None:
            state.steps += 1
            return task.sgd_step(params, batch, local_lr)
        loss, grads = task.loss_and_grad(params, batch)
        self.apply(params, grads, local_lr, state)
        return loss

    @torch.no_grad()
    def apply(self, params: Tensors, grads: Tensors, local_lr: Tensor, state: LocalOptimizerState) -> None:
        """Take one step of every replica from its gradient.

        Args:
            params: Parameters, {[R, *S]}, changed in place.
            grads: Gradients, {[R, *S]}, overwritten.
            local_lr: Local learning rate γ >= 0 of each replica, [R].
            state: State of the optimizer, changed in place.
        """
        state.steps += 1
        if self.max_grad_norm is not None:
            _clip(grads, self.max_grad_norm)
        if self.kind in ("sgd", "momentum"):
            return self._sgd(params, grads, local_lr, state)
        self._adamw({name: params[name] for name in state.second}, grads, local_lr, state)
        self._muon({name: p for name, p in params.items() if name not in state.second}, grads, local_lr, state)

    def _sgd(self, params: Tensors, grads: Tensors, local_lr: Tensor, state: LocalOptimizerState) -> None:
        for name, p in params.items():
            grad = grads[name].add_(p, alpha=self.weight_decay) if self.weight_decay else grads[name]
            if self.kind == "momentum":
                grad = state.first[name].mul_(MOMENTUM).add_(grad)
            p.addcmul_(grad, column(local_lr, p), value=-1)

    def _adamw(self, params: Tensors, grads: Tensors, local_lr: Tensor, state: LocalOptimizerState) -> None:
        first_weight, second_weight = ((1 - beta ** state.steps.double()).to(local_lr) for beta in BETAS)
        rate, eps = local_lr / first_weight * second_weight.sqrt(), EPS * second_weight.sqrt()
        for name, p in params.items():
            grad, first, second = grads[name], state.first[name], state.second[name]
            first.lerp_(grad, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            if self.weight_decay:
                p.mul_(1 - column(local_lr, p) * self.weight_decay)
            step = second.sqrt().add_(column(eps, p))
            p.addcmul_(torch.div(first, step, out=step), column(rate, p), value=-1)

    def _muon(self, params: Tensors, grads: Tensors, local_lr: Tensor, state: LocalOptimizerState) -> None:
        for name, p in params.items():
            first = state.first[name].lerp_(grads[name], 1 - MUON_MOMENTUM)
            update = _orthogonal(grads[name].lerp_(first, MUON_MOMENTUM).flatten(2)).view_as(p)
            if self.weight_decay:
                p.mul_(1 - column(local_lr, p) * self.weight_decay)
            scale = MUON_SCALE * max(p.shape[1], p[0, 0].numel()) ** 0.5
            p.addcmul_(update, column(local_lr, p), value=-scale)


def _is_matrix(p: Tensor) -> bool:
    """Whether Muon steps a parameter [R, *S]."""
    return p.dim() > 2


def _orthogonal(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices [R, a, b] near 1 by the iteration of torch.optim.Muon."""
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=MUON_EPS)
    a, b, c = MUON_COEFFICIENTS
    for _ in range(MUON_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


def _clip(grads: Tensors, max_norm: float) -> None:
    norms = torch.stack([torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads.values()])
    factor = (max_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1)
    for grad in grads.values():
        grad.mul_(column(factor, grad))


def half_cosine(step: Number, length: Number | float) -> Number:
    """Factor that falls from 1 at step 0 to 0 at step `length`, along half a cosine.

    Example:
        >>> [round(half_cosine(step, 4), 2) for step in range(5)]
        [1.0, 0.85, 0.5, 0.15, 0.0]
    """
    angle = math.pi * step / length
    if isinstance(angle, Tensor):
        return 0.5 * (1 + angle.cos())
    return 0.5 * (1 + math.cos(angle))


SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {  # share of γ at each part of an unroll in [0, 1)
    "constant": torch.ones_like,
    "cosine": lambda x: half_cosine(x, 1.0),
    "linear": lambda x: 1 - x,
    "stable, then linear": lambda x: ((1 - x) / 0.3).clamp(max=1),
    "warm-up, cosine": lambda x: torch.where(x < 0.1, (x + 0.02) / 0.12, half_cosine((x - 0.1).clamp(min=0), 0.9)),
}
DECAYS = ("cosine", "linear", "stable, then linear", "cosine", "warm-up, cosine")  # in turn, the cosine twice
TOWARDS_HIGH = 0.6  # exponent of a uniform number, so that γ is more often in the upper part of its range


@dataclass(frozen=True)
class LocalTraining:
    """Local training of the workers of an unroll, and its start: all that a task distribution varies besides the task.

    Args:
        num_workers: Number of workers K >= 1.
        local_steps: Number of local steps H >= 1, or several, of which each window draws one.
        local_lr: Local learning rate γ > 0, or (low, high): each unroll draws one log-uniformly.
        decay_share: Share in [0, 1] of the unrolls whose γ falls to 0 along a cosine, or, of whole unrolls, by one of
            several schedules (`draw_schedules`).
        optimizer: Optimizer of the workers; its state is kept from round to round of an unroll.
        initial_scale: Factor > 0 of initial matrices, or (low, high): each unroll draws one log-uniformly.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> training = LocalTraining(local_steps=[1, 4], local_lr=(1e-4, 1e-2), optimizer=LocalOptimizer("adamw"))
        >>> training.steps
        (1, 4)
    """

    num_workers: int = 8
    local_steps: int | Sequence[int] = 4
    local_lr: float | tuple[float, float] = 0.5
    decay_share: float = 0.0
    optimizer: LocalOptimizer = LocalOptimizer()
    initial_scale: float | tuple[float, float] = 1.0

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, not {self.num_workers}.")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"local_steps must be at least 1, not {self.local_steps}.")
        if not 0 <= self.decay_share <= 1:
            raise ValueError(f"decay_share must lie in [0, 1], not {self.decay_share}.")
        for name in ("local_lr", "initial_scale"):
            bounds = _range(getattr(self, name))
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < math.inf:
                raise ValueError(f"{name} must be positive, or a range (low, high), not {getattr(self, name)}.")

    @property
    def steps(self) -> tuple[int, ...]:
        """Choices of H."""
        return (self.local_steps,) if isinstance(self.local_steps, int) else tuple(self.local_steps)

    def draw_lr(self, generator: torch.Generator) -> tuple[float, bool]:
        """Draw the first γ of an unroll, and whether it decays."""
        lr = _log_uniform(self.local_lr, generator)
        return lr, bool(torch.rand((), generator=generator) < self.decay_share)

    def draw_schedules(self, num_runs: int, num_rounds: int, generator: torch.Generator) -> Tensor:
        """Draw γ of several runs over all of their rounds, [R, T].

        Of every two runs side by side, with the usual share of one half, one has a constant γ and the other decays by
        one of `DECAYS`, each in turn.

        Args:
            num_runs: Number of runs R.
            num_rounds: Number of rounds T.
            generator: Generator on the CPU.
        """
        low, high = _range(self.local_lr)
        rates = low * (high / low) ** (torch.rand(num_runs, generator=generator) ** TOWARDS_HIGH)
        first = int(torch.randint(2 * len(DECAYS), (), generator=generator))
        progress = torch.arange(num_rounds) / num_rounds
        schedules = [SCHEDULES[self._schedule(first + run)] for run in range(num_runs)]
        return torch.stack([rate * schedule(progress) for rate, schedule in zip(rates, schedules, strict=True)])

    def _schedule(self, index: int) -> str:
        """Name of a schedule; a share `decay_share` of the indices decays, evenly spread."""
        before, after = int(index * self.decay_share), int((index + 1) * self.decay_share)
        return "constant" if before == after else DECAYS[before % len(DECAYS)]

    def init(self, task: AbstractTask, generator: torch.Generator) -> Tensors:
        """Draw the parameters that an unroll starts from, {[1, *S]}."""
        scale = _log_uniform(self.initial_scale, generator)
        return {name: p * scale if p.dim() > 2 else p for name, p in task.init(1, generator).items()}


def _range(value: float | tuple[float, float]) -> tuple[float, ...]:
    return (value, value) if isinstance(value, (int, float)) else tuple(value)


def _log_uniform(value: float | tuple[float, float], generator: torch.Generator) -> float:
    low, high = _range(value)
    return low * (high / low) ** torch.rand((), generator=generator, dtype=torch.float64).item()
