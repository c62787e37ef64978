"""Training of the learned optimizer itself, as a LightningModule."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_lopt.comm import Communicator
from lightning_lopt.meta.base import AbstractTask, Tensors
from lightning_lopt.meta.estimator import Estimator, EstimatorKind
from lightning_lopt.meta.evaluation import Evaluation
from lightning_lopt.meta.export import Export
from lightning_lopt.meta.local import LocalOptimizer, LocalTraining, OptimizerKind, half_cosine
from lightning_lopt.meta.particles import MetaLoss, Particles, joined
from lightning_lopt.meta.truncation import LogUniform
from lightning_lopt.network import AdaMLP

LENGTHS = LogUniform(100, 1_000)
STATE_KEY = "lightning_lopt.MetaTraining"
START_KEY = f"{STATE_KEY}.start"
SETTINGS_KEY = f"{STATE_KEY}.settings"


class Iterations:
    """A data loader that only counts, since the tasks hold the data; it can go on from where it was."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._next = 0

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        start, self._next = self._next, 0
        for index in range(start, self._total):
            self._next = index + 1
            yield index
        self._next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


def check_evaluations(evaluations: Sequence[Evaluation]) -> None:
    """Raise a ValueError that names the evaluations whose names are the same."""
    names = [evaluation.name for evaluation in evaluations]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"Several evaluations have the name {sorted(twice)}, under which the log would hold the last one's "
            "numbers alone. Give each a name of its own."
        )


def check_same_settings(found: Mapping[str, Any], ours: Mapping[str, Any], way_out: str) -> None:
    """Raise a ValueError that names what a checkpoint's run had otherwise.

    Args:
        found: Settings of the checkpoint; those that it lacks count as ours.
        ours: Settings of this run.
        way_out: Advice, besides to resume with the same.
    """
    if other := [name for name, value in ours.items() if found.get(name, value) != value]:
        theirs, mine = (", ".join(f"{name}={of[name]}" for name in other) for of in (found, ours))
        raise ValueError(
            f"The checkpoint is of a run with {theirs}, but this one has {mine}. Resume with the arguments of that "
            f"run; or {way_out}."
        )


class MetaTraining(L.LightningModule):
    r"""Train a learned optimizer by persistent evolution strategies on simulated rounds.

    .. math:: \min_\theta\, \mathbb E\, \frac1T \sum_{t<T} \ell_t(\theta)

    where :math:`\ell_t` is the workers' mean training loss in round t of an unroll of T rounds. One optimizer step
    (a meta-iteration) is one window of `truncation` rounds of every particle. Hyperparameters are those of
    arXiv 2312.02204 by default: AdamW, warm-up over 100 meta-iterations, cosine to a third. Several processes
    (``Trainer(strategy="ddp")``) share the particles; a checkpoint holds all of them, for any number of processes.

    Args:
        task: Task to train on; several are taken in turn, one per meta-iteration, each with particles of its own.
            A pair (task, `LocalTraining`) has a local training of its own; the next arguments hold for the others.
        num_workers: Number of simulated workers K >= 1.
        local_steps: Number of local steps H >= 1; of several, each window draws one.
        local_lr: Local learning rate γ > 0; of a range (low, high), each unroll draws one log-uniformly, and half of
            the unrolls let it fall to 0 along a cosine.
        local_optimizer: Name ``"sgd"``, ``"momentum"``, ``"adamw"`` or ``"muon"``.
        meta_loss: Loss that is minimised: the workers' training loss (``"local"``), or that of the updated anchor on
            fresh batches (``"updated"``) or on validation batches (``"validation"``).
        log_floor: Floor > 0 to minimise the mean of log(loss + log_floor), so that late progress counts; None for the
            mean loss.
        network: Network to train; default ``AdaMLP(seed=seed)``.
        start: State of an earlier run, of the same kind of network, to go on from with fresh particles. The Trainer's
            `max_steps` then counts the steps of this run alone, the schedule those of both.
        estimator: Estimator of the meta-gradient: ``"pes"``, the biased ``"published_pes"``, or ``"truncated_es"`` as
            a baseline.
        num_particles: Number of antithetic pairs P >= 1 per task.
        truncation: Number of rounds W >= 1 per window.
        unroll_length: Length T in rounds, fixed or drawn for each unroll.
        sigma: Standard deviation σ > 0 of the perturbations of the meta-parameters.
        max_window_norm: Norm > 0 to which the gradient of every window is clipped before it is accumulated with those
            of other tasks, so that none drowns the others; None leaves it.
        lr: Peak learning rate of the meta-optimizer, >= 0.
        final_lr: Learning rate at the end of the cosine; default a third of `lr`, as published.
        warmup_steps: Number of warm-up steps of the meta-optimizer, >= 0.
        restart_schedule: Whether to begin the warm-up and the cosine anew at `start`, for a curriculum of several
            tasks; the moments of the meta-optimizer are kept.
        decays_lr: Learning rate of the decays, whose offsets act tenfold in the exponent; default `lr`, as published.
        evaluations: Evaluations of the current network by the Trainer's validation loop (every `val_check_interval`
            batches). They log each final loss, its ratios to the baselines', and the ratios' means.
        seed: Seed of everything drawn.

    Raises:
        TypeError: `network` is no `AdaMLP`, or `task` no task.
        ValueError: An argument out of its range, or two evaluations of the same name.

    Source: arXiv 2312.02204, section 4 and appendix; PES: arXiv 2112.13835.

    Example:
        >>> from lightning_lopt.meta import ImageMLP
        >>> task = ImageMLP(torch.rand(64, 8, 8), torch.arange(64) % 4, hidden=(8,), batch_size=8)
        >>> meta = MetaTraining(task=task, num_workers=2, local_steps=1, local_lr=0.1)
        >>> sum(p.numel() for p in meta.parameters())
        2409
        >>> trainer = L.Trainer(max_steps=5_000)  # doctest: +SKIP
        >>> trainer.fit(meta)  # doctest: +SKIP
        >>> meta.network.save("lopt_a.safetensors")  # doctest: +SKIP
    """

    def __init__(
        self,
        task: AbstractTask | Sequence[AbstractTask | tuple[AbstractTask, LocalTraining]],
        num_workers: int = 8,
        local_steps: int | Sequence[int] = 4,
        local_lr: float | tuple[float, float] = 0.5,
        *,
        local_optimizer: OptimizerKind = "sgd",
        meta_loss: MetaLoss = "local",
        log_floor: float | None = None,
        network: AdaMLP | None = None,
        start: Export | None = None,
        estimator: EstimatorKind = "pes",
        num_particles: int = 8,
        truncation: int = 50,
        unroll_length: int | LogUniform = LENGTHS,
        sigma: float = 0.01,
        max_window_norm: float | None = None,
        lr: float = 3e-3,
        final_lr: float | None = None,
        warmup_steps: int = 100,
        restart_schedule: bool = False,
        decays_lr: float | None = None,
        evaluations: Sequence[Evaluation] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        tasks = list(task) if isinstance(task, Sequence) else [task]
        if wrong := [each for each in tasks if not isinstance(each, AbstractTask | tuple)]:
            raise TypeError(
                f"task must be a task, as ImageMLP(images, labels) or ModuleTask(...), or several, not {wrong[0]!r}."
            )
        if not tasks:
            raise ValueError("MetaTraining needs at least one task.")
        decay_share = 0.0 if isinstance(local_lr, (int, float)) else 0.5
        common = LocalTraining(num_workers, local_steps, local_lr, decay_share, LocalOptimizer(local_optimizer))
        pairs = [(each, common) if isinstance(each, AbstractTask) else each for each in tasks]
        self.network = AdaMLP(seed=seed) if network is None else network
        if not isinstance(self.network, AdaMLP):
            raise TypeError(
                f"network must be an AdaMLP, not {network!r}. Give AdaMLP.load(path), of a file that exists, or "
                f"AdaMLP.bundled(name), of {AdaMLP.bundled_names()}."
            )
        self._start = start or Export(self.network, iterations=0, moments={})
        if self._start.network.config != self.network.config:
            raise ValueError(
                f"The start holds a network of another kind than the one to train: {self._start.network.config} "
                f"instead of {self.network.config}."
            )
        self.network.load_state_dict(self._start.network.state_dict())
        self.evaluations = list(evaluations)
        self.max_window_norm = max_window_norm
        self.lr = lr
        self.final_lr = lr / 3 if final_lr is None else final_lr
        self.warmup_steps = warmup_steps
        self.restart_schedule = restart_schedule
        self.decays_lr = lr if decays_lr is None else decays_lr
        self._check_arguments(pairs)
        # Not buffers: those would be overwritten by the broadcasts of distributed strategies.
        lengths = LogUniform(unroll_length, unroll_length) if isinstance(unroll_length, int) else unroll_length
        self._settings = {
            "seed": seed,
            "estimator": estimator,
            "truncation": truncation,
            "unroll_length": str(lengths),
            "sigma": sigma,
            "log_floor": log_floor,
            "max_window_norm": max_window_norm,
        }
        self._estimators = []
        for index, (each, training) in enumerate(pairs):
            task_seed = seed + 1_000_003 * index + 10_007 * self.start_iterations
            particles = Particles(each, training, num_particles, lengths, meta_loss, task_seed, self.network.update)
            self._estimators.append(Estimator(particles, estimator, truncation, sigma, log_floor, task_seed))

    def _check_arguments(self, pairs: Sequence[tuple[AbstractTask, LocalTraining]]) -> None:
        for each, training in pairs:
            if (dtype := next(self.network.parameters()).dtype) != each.dtype:
                raise ValueError(
                    f"{each} computes in {each.dtype} but the network in {dtype}. Convert the data or the module to "
                    "float32, or the network to float64 (network=AdaMLP().double())."
                )
            if self.network.num_inputs not in (1, training.num_workers):
                raise ValueError(
                    f"The network sees {self.network.num_inputs} workers but there are "
                    f"num_workers={training.num_workers}. Use AdaMLP(inputs='mean'), or as many inputs as workers."
                )
        for name in ("lr", "final_lr", "decays_lr", "warmup_steps"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, not {value}.")
        if self.max_window_norm is not None and not self.max_window_norm > 0:
            raise ValueError(f"max_window_norm must be positive or None, not {self.max_window_norm}.")
        check_evaluations(self.evaluations)

    @property
    def start_iterations(self) -> int:
        """Meta-iterations of earlier runs, before the first of this one."""
        return self._start.iterations

    @property
    def scheduled_iterations(self) -> int:
        """Meta-iterations of earlier runs that the schedule of this one counts."""
        return 0 if self.restart_schedule else self.start_iterations

    def export(self) -> Export:
        """Return the state of the run, for `start` of a later one."""
        optimizer = self.trainer.optimizers[0]
        return Export.of(self.network, optimizer, self.start_iterations + self.trainer.global_step)

    @override
    def setup(self, stage: str) -> None:
        self._comm = Communicator()
        device = self.trainer.strategy.root_device
        for estimator in self._estimators:
            particles, count = estimator.particles, self._comm.num_workers
            if particles.task.device != device or len(particles) * count != particles.num_particles:
                particles.task.to(device)
                estimator.particles = particles.part_of(self._comm.rank, count)

        for evaluation in self.evaluations:
            evaluation.task.to(device)

    @override
    def train_dataloader(self) -> Iterations:
        return Iterations(self.trainer.max_steps * self.trainer.accumulate_grad_batches)

    @override
    def val_dataloader(self) -> list[range]:
        return [range(len(self.evaluations))] if self.evaluations else []

    @override
    def configure_optimizers(self) -> Any:
        groups = [
            {"params": list(self.network.layers.parameters()), "lr": self.lr},
            {"params": list(self.network.decays.parameters()), "lr": self.decays_lr},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
        self._start.restore(dict(self.network.named_parameters()), optimizer)
        if self.trainer.max_steps < 1:
            raise ValueError("The cosine needs to know its length: use Trainer(max_steps=...).")
        before = self.scheduled_iterations
        total = before + self.trainer.max_steps
        final = self.final_lr / self.lr if self.lr else 0.0

        def factor(step: int) -> float:
            step += before
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            progress = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
            return final + (1 - final) * half_cosine(progress, 1)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        start = time.perf_counter()
        iteration = self.trainer.fit_loop.total_batch_idx
        index = iteration % len(self._estimators)
        window = self._estimators[index].window(self.network, iteration)
        self.log("task", float(index), batch_size=1)
        rounds = window.rounds * self._comm.num_workers
        self.log("meta_loss", window.loss, prog_bar=True, batch_size=1, sync_dist=True)
        self.log("rounds_per_second", rounds / (time.perf_counter() - start), prog_bar=True, batch_size=1)
        # A surrogate whose gradient is the estimate and whose value is the meta-loss, so that everything of
        # Lightning's automatic optimization applies: averaging over processes, clipping, schedules, checkpoints.
        gradient = window.gradient if self.max_window_norm is None else self._clipped(window.gradient)
        linear = torch.stack([(p * gradient[name]).sum() for name, p in self.network.named_parameters()]).sum()
        return linear - linear.detach() + window.loss

    @override
    def validation_step(self, batch: int, batch_idx: int) -> None:
        evaluation = self.evaluations[batch]
        final = evaluation.final(evaluation.losses(self.network))
        self.log(f"{evaluation.name}/loss", final, batch_size=1, sync_dist=True)
        for name, losses in evaluation.baselines.items():
            ratio = final / evaluation.final(losses)
            self.log(f"{evaluation.name}/over_{name}", ratio, batch_size=1, sync_dist=True)
            self.log(f"over_{name}", ratio, batch_size=1, sync_dist=True, prog_bar=name == "averaging")

    def _clipped(self, gradient: Tensors) -> Tensors:
        """Average over the processes and clip to `max_window_norm`."""
        means = self._comm.means([*gradient.values()])
        norm = float(torch.cat([mean.flatten() for mean in means]).norm())
        assert self.max_window_norm is not None
        factor = min(1.0, self.max_window_norm / max(norm, 1e-12))
        return {name: factor * mean for name, mean in zip(gradient, means, strict=True)}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        parts = self._comm.gather_objects([estimator.state_dict() for estimator in self._estimators])
        checkpoint[START_KEY] = self.start_iterations
        checkpoint[SETTINGS_KEY] = self._settings
        if parts is not None:
            checkpoint[STATE_KEY] = [joined(states) for states in zip(*parts, strict=True)]

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get(STATE_KEY)
        if states is None or len(states) != len(self._estimators):
            found = "no particles" if states is None else f"the particles of {len(states)} tasks"
            raise ValueError(f"The checkpoint holds {found}, but this run has {len(self._estimators)} tasks.")
        if (start := checkpoint.get(START_KEY, 0)) != self.start_iterations:
            raise ValueError(
                f"The checkpoint is of a run that started at meta-iteration {start}, but this one starts at "
                f"{self.start_iterations}. Resume with the same start as that run."
            )
        found = checkpoint.get(SETTINGS_KEY, {})  # older checkpoints do not say
        check_same_settings(found, self._settings, "go on from its Export with others, and fresh particles")
        for estimator, state in zip(self._estimators, states, strict=True):
            estimator.load_state_dict(state)
