"""Training of the controller of the blended Nesterov step, as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lopt.comm import Communicator
from lightning_lopt.controller import Controller
from lightning_lopt.functional.blended import BlendedSettings
from lightning_lopt.functional.control import INPUTS, OUTPUTS, ControlledState, ControllerWeights, LocalPhase
from lightning_lopt.functional.model import ModelTensor
from lightning_lopt.meta.base import AbstractTask, Tensors
from lightning_lopt.meta.evaluation import Evaluation
from lightning_lopt.meta.local import LocalTraining, half_cosine
from lightning_lopt.meta.module import Iterations, check_evaluations, check_same_settings
from lightning_lopt.meta.outer import ControlledStep, SimulatedOuterStep, controlled_step
from lightning_lopt.meta.particles import seeded
from lightning_lopt.meta.whole_unrolls import Horizons, whole_unrolls

SETTINGS_KEY = "lightning_lopt.ControllerTraining.settings"
MEASURED_RUNS = 10  # of each task, for the means and deviations of the inputs
SMALLEST_VARIANCE = 1e-6
NARROW = ("local_steps", "age", "grad_over_param", "aspect", "retained", "momentum_over_grad", "level")
ENDS = torch.tensor([2.0 if name in NARROW else 5.0 for name in INPUTS])  # of the inputs, in standard deviations
LARGEST_DIFFERENCE = 3.0  # that counts for the root mean square
RMS_WEIGHT, RMS_FLOOR = 0.2, 0.02
CLIP = 2.0  # of standardised differences
RIDGE = 0.2  # in units of the mean of the Gram matrix's diagonal
FINAL_LR = 0.1  # in units of the first


class Slopes(NamedTuple):
    """Result of a sweep.

    Attributes:
        slopes: Change of the standardised objective per unit of each weight, [4, 18].
        explained: Share of the differences' variance that the slopes explain; noise alone gives about the number of
            weights over twice that of pairs.
        objective: Mean objective of all unrolls.
    """

    slopes: Tensor
    explained: float
    objective: float


class RowAdam(Optimizer):
    r"""Adam with one second moment for each row of a matrix.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g,\quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2,\quad
        p_i \leftarrow p_i - \gamma\, \frac{m_i / (1 - \beta_1^t)}{\sqrt{\mathrm{mean}_j\, v_{ij} / (1 - \beta_2^t)}
        + 10^{-8}}

    Args:
        params: Matrices.
        lr: Learning rate γ >= 0.
        betas: Decays β.

    Source: Adam-mini, arXiv 2406.16793.

    Example:
        >>> p = nn.Parameter(torch.zeros(1, 2))
        >>> p.grad = torch.tensor([[3.0, 4.0]])
        >>> RowAdam([p], lr=1.0).step()
        >>> [round(x, 3) for x in p.flatten().tolist()]
        [-0.849, -1.131]
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float] = (0.8, 0.95)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step on every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group)
        return loss

    def _step(self, p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, first=torch.zeros_like(p), second=torch.zeros_like(p))
        state["step"] += 1
        first_weight, second_weight = (1 - beta ** state["step"] for beta in group["betas"])
        state["first"].lerp_(grad, 1 - group["betas"][0])
        state["second"].lerp_(grad.square(), 1 - group["betas"][1])
        scale = (state["second"] / second_weight).mean(1, keepdim=True).sqrt() + 1e-8
        p -= group["lr"] * (state["first"] / first_weight) / scale


class ControllerTraining(L.LightningModule):
    r"""Train a linear controller of the blended Nesterov step by antithetic evolution strategies on whole unrolls.

    .. math:: d_i = \operatorname{clip}\Big(\frac{L_i(\theta + \varepsilon_i) - L_i(\theta - \varepsilon_i)}{\rho_i},
        \pm 2\Big),\qquad
        \hat g = \tfrac12\, (E^\top E + \lambda I)^{-1} E^\top d

    with the objective L of `whole_unrolls`. One optimizer step is a sweep: on each task pairs of unrolls that share
    their start, data, γ and its schedule, and differ in the sign of one perturbation ε for the whole unroll, the rows
    of E. Their differences, in units of the running root mean square ρ on their task (at least 0.02), are regressed on
    the perturbations of all tasks, so that no task drowns the others. The weights θ are those of standardised inputs,
    and the slopes go into `RowAdam`, whose rate falls along a cosine to a tenth.

    All that is drawn depends on the seed and the sweep, so a checkpoint of some kB resumes bitwise: it takes the place
    of an `Export`.

    Args:
        tasks: Pairs of a task and its `LocalTraining`. With a `decay_share`, γ falls in this share of the unrolls, by
            one of several schedules.
        controller: Controller to go on from, whose bounds of the inputs are kept; None for one of zeros, whose inputs
            are measured on runs of the base step before the first sweep.
        horizons: Horizons of the unrolls.
        constants: Whether the biases alone are trained: the same settings for all tensors and rounds, but for what the
            controller reads already.
        num_pairs: Number of pairs P >= 1 in each sweep on each task.
        sigma: Standard deviation σ > 0 of the perturbed outputs, at inputs one standard deviation off their mean.
        lr: Learning rate >= 0 of the weights.
        num_averaged: Number of sweeps >= 1 over whose weights `controller` is the mean.
        evaluations: Evaluations by the Trainer's validation loop; each logs the logarithm of its final loss over that
            of the base step.
        seed: Seed of everything drawn.

    Attributes:
        weight: Weights of standardised inputs, and the bias last, [4, 18].

    Raises:
        ValueError: An argument out of its range, two evaluations of the same name, several processes, or a checkpoint
            of a run with other settings.

    Source: Antithetic evolution strategies: Salimans et al. 2017, arXiv 1703.03864; one perturbation for a whole
        unroll: arXiv 2304.11153 and 2304.12180; settings instead of steps: arXiv 2106.00958.

    Example:
        >>> from lightning_lopt.meta import ImageMLP
        >>> task = ImageMLP(torch.rand(64, 8, 8), torch.arange(64) % 4, hidden=(8,), batch_size=8)
        >>> meta = ControllerTraining([(task, LocalTraining(2, 4, 0.1, decay_share=0.5))], Controller.bundled())
        >>> trainer = L.Trainer(max_steps=40, accelerator="cpu")  # doctest: +SKIP
        >>> trainer.fit(meta)  # doctest: +SKIP
        >>> meta.controller.save("mine.safetensors")  # doctest: +SKIP
    """

    mean: Tensor
    std: Tensor
    rms: Tensor
    recent: Tensor
    sweeps: Tensor

    def __init__(
        self,
        tasks: Sequence[tuple[AbstractTask, LocalTraining]],
        controller: Controller | None = None,
        *,
        horizons: Horizons | None = None,
        constants: bool = False,
        num_pairs: int = 16,
        sigma: float = 0.2,
        lr: float = 0.018,
        num_averaged: int = 10,
        evaluations: Sequence[Evaluation] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.horizons = Horizons() if horizons is None else horizons
        self.constants = constants
        self.num_pairs = num_pairs
        self.sigma = sigma
        self.lr = lr
        self.evaluations = list(evaluations)
        self._measures_inputs = controller is None
        self._seed = seed
        self._check_arguments(num_averaged)
        self._settings = {
            "tasks": str(self.tasks),
            "horizons": str(self.horizons),
            "constants": constants,
            "num_pairs": num_pairs,
            "sigma": sigma,
            "num_averaged": num_averaged,
            "seed": seed,
        }
        if controller is None:
            controller = Controller()
        mean = (controller.low + controller.high) / 2
        std = (controller.high - controller.low) / 2 / ENDS
        with torch.no_grad():
            bias = controller.bias + controller.weight @ mean
            self.weight = nn.Parameter(torch.cat([controller.weight * std, bias[:, None]], 1))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.register_buffer("rms", torch.zeros(len(self.tasks)))
        self.register_buffer("recent", torch.zeros(num_averaged, *self.weight.shape))
        self.register_buffer("sweeps", torch.zeros((), dtype=torch.long))

    def _check_arguments(self, num_averaged: int) -> None:
        if not self.tasks:
            raise ValueError("ControllerTraining needs at least one task.")
        if min(self.num_pairs, num_averaged) < 1:
            raise ValueError(f"num_pairs and num_averaged must be at least 1, not {self.num_pairs} and {num_averaged}.")
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma must be positive, not {self.sigma}.")
        if not 0 <= self.lr < math.inf:
            raise ValueError(f"lr must be finite and at least 0, not {self.lr}.")
        check_evaluations(self.evaluations)

    @property
    def controller(self) -> Controller:
        """Controller of the mean weights over the last sweeps; before the first one, that of the start."""
        count = min(int(self.sweeps), len(self.recent))
        weight = self.recent[:count].mean(0) if count else self.weight.detach()
        controller = Controller()
        weights = self._weights(weight.unsqueeze(0))
        controller.load_state_dict({name: each.squeeze(0) for name, each in weights._asdict().items()})
        return controller

    def _weights(self, weight: Tensor) -> ControllerWeights:
        """Meta-parameters for the inputs as they are, from weights of standardised ones, [P, 4, 18]."""
        raw, ends = weight[..., :-1] / self.std, ENDS.to(self.std) * self.std
        low, high = (self.mean + sign * ends for sign in (-1, 1))
        return ControllerWeights(raw, weight[..., -1] - raw @ self.mean, low.unsqueeze(0), high.unsqueeze(0))

    @override
    def setup(self, stage: str) -> None:
        if (count := Communicator().num_workers) > 1:
            raise ValueError(f"ControllerTraining runs in one process, not in {count}. Use Trainer(devices=1).")
        for task in (*(task for task, _ in self.tasks), *(each.task for each in self.evaluations)):
            task.to(self.trainer.strategy.root_device)

    @override
    def train_dataloader(self) -> Iterations:
        return Iterations(self.trainer.max_steps * self.trainer.accumulate_grad_batches)

    @override
    def val_dataloader(self) -> list[range]:
        return [range(len(self.evaluations))] if self.evaluations else []

    @override
    def configure_optimizers(self) -> Any:
        total = self.trainer.max_steps
        if total < 1:
            raise ValueError("The cosine needs to know its length: use Trainer(max_steps=...).")
        optimizer = RowAdam([self.weight], lr=self.lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda sweep: FINAL_LR + (1 - FINAL_LR) * half_cosine(min(sweep, total), total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_train_start(self) -> None:
        if self._measures_inputs and not self.sweeps:
            self.mean, self.std = self.measure_inputs()

    def measure_inputs(self) -> tuple[Tensor, Tensor]:
        """Compute mean and standard deviation of the inputs, [17] each, over runs of the base step on all tasks."""
        generator, seen = seeded(self._seed, "inputs"), []
        zero = self._weights(torch.zeros_like(self.weight).unsqueeze(0))
        for index, (task, training) in enumerate(self.tasks):
            inputs: list[Tensor] = []

            def outer(anchor: Tensors, inputs: list[Tensor] = inputs) -> SimulatedOuterStep:
                return _RecordedStep(anchor, zero, inputs)

            horizon = self.horizons.draw(training, generator)
            local_lr = training.draw_schedules(MEASURED_RUNS, horizon.num_rounds, generator)
            whole_unrolls(task, training, horizon, local_lr, 1, outer, seeded(self._seed, "inputs", index))
            seen.append(torch.cat(inputs).to(self.mean))
        means, squares = (torch.stack([each.pow(power).mean(0) for each in seen]).mean(0) for power in (1, 2))
        return means, (squares - means**2).clamp(min=SMALLEST_VARIANCE).sqrt()

    @torch.no_grad()
    def sweep(self, index: int) -> Slopes:
        """Estimate the slopes of the objective; advances the root mean squares of the differences.

        Args:
            index: Index of the sweep, from 0; what is drawn depends on it and the seed alone.
        """
        generator = seeded(self._seed, index)
        columns = 1 if self.constants else len(INPUTS) + 1  # the bias is the last
        noises, differences, objectives = [], [], []
        for i in torch.randperm(len(self.tasks), generator=generator).tolist():
            task, training = self.tasks[i]
            horizon = self.horizons.draw(training, generator)
            local_lr = training.draw_schedules(self.num_pairs, horizon.num_rounds, generator)
            noise = torch.randn(self.num_pairs, len(OUTPUTS), columns, generator=generator)
            noise = (self.sigma / columns**0.5 * noise).to(self.weight.device)
            padded = F.pad(noise, (len(INPUTS) + 1 - columns, 0))
            weights = self._weights(torch.cat([self.weight + padded, self.weight - padded]))

            def outer(anchor: Tensors, weights: ControllerWeights = weights) -> SimulatedOuterStep:
                return controlled_step(anchor, weights)

            both = whole_unrolls(task, training, horizon, local_lr, 2, outer, seeded(self._seed, index, i)).to(noise)
            noises.append(noise.flatten(1))
            differences.append(self._standardised(i, both[0] - both[1]))
            objectives.append(both)
        slopes, explained = regress(torch.cat(noises), torch.cat(differences))
        slopes = slopes.to(self.weight).view(len(OUTPUTS), columns) / 2
        padded = F.pad(slopes, (len(INPUTS) + 1 - columns, 0))
        return Slopes(padded, explained, torch.cat(objectives, 1).mean().item())

    def _standardised(self, index: int, differences: Tensor) -> Tensor:
        """Differences of the pairs of a task in units of their running root mean square, clipped."""
        now = differences.clamp(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE).square().mean().sqrt()
        before = self.rms[index].clone()
        self.rms[index] = now if before == 0 else (1 - RMS_WEIGHT) * before + RMS_WEIGHT * now
        return (differences / self.rms[index].clamp(min=RMS_FLOOR)).clamp(-CLIP, CLIP)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        result = self.sweep(self.trainer.fit_loop.total_batch_idx)
        self.log("explained", result.explained, prog_bar=True, batch_size=1)
        self.log("objective", result.objective, prog_bar=True, batch_size=1)
        linear = (self.weight * result.slopes).sum()  # as in `MetaTraining`, a surrogate whose gradient is the estimate
        return linear - linear.detach() + result.objective

    @override
    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        super().optimizer_step(*arguments, **keywords)
        self.recent[int(self.sweeps) % len(self.recent)] = self.weight.detach()
        self.sweeps += 1

    @override
    def validation_step(self, batch: int, batch_idx: int) -> None:
        evaluation = self.evaluations[batch]
        weights = self.controller.weights()
        own = evaluation.losses_with(lambda anchor: controlled_step(anchor, weights))
        ratio = (evaluation.finals(own) / evaluation.finals(evaluation.base_step)).log().mean()
        self.log(f"{evaluation.name}/log_over_base_step", ratio, batch_size=1)
        self.log("log_over_base_step", ratio, batch_size=1, prog_bar=True)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[SETTINGS_KEY] = self._settings

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if SETTINGS_KEY not in checkpoint:
            raise ValueError("The checkpoint is of another module than ControllerTraining.")
        check_same_settings(checkpoint[SETTINGS_KEY], self._settings, "go on from its controller with others")


def regress(perturbations: Tensor, differences: Tensor) -> tuple[Tensor, float]:
    r"""Regress differences on perturbations by ridge regression, in float64.

    Args:
        perturbations: Perturbations E, [N, D].
        differences: Differences d, [N].

    Returns:
        Slopes :math:`(E^\top E + \lambda I)^{-1} E^\top d`, [D], and the share of the squared differences that they
        explain.

    Example:
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> slopes, explained = regress(x, x @ torch.tensor([1.0, -2.0]))
        >>> [round(slope, 1) for slope in slopes.tolist()], round(explained, 1)
        ([0.8, -1.7], 1.0)
    """
    x, y = perturbations.double(), differences.double()
    gram = x.T @ x
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    slopes = torch.linalg.solve(gram, x.T @ y)
    explained = 1 - float((y - x @ slopes).square().sum() / y.square().sum().clamp(min=1e-30))
    return slopes, explained


class _RecordedStep(ControlledStep):
    """A step without control that keeps the inputs of a controller."""

    def __init__(self, anchor: Tensors, weights: ControllerWeights, inputs: list[Tensor]) -> None:
        some = next(iter(anchor.values()))
        super().__init__(anchor, BlendedSettings.by_hand(len(some), some), weights)
        self._inputs = inputs

    @override
    def observe(self, tensor: ModelTensor[ControlledState], phase: LocalPhase) -> Tensor:
        self._inputs.append(super().observe(tensor, phase))
        return self._inputs[-1]
