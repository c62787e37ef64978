"""Recipes `controller` and `own` of examples/meta_train.py: controllers of the blended Nesterov step."""

from __future__ import annotations

import argparse
import math
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from recipes import Images, controller_tasks
from torch import Tensor
from typing_extensions import override

from lightning_lopt import AdaMLP, Controller
from lightning_lopt.meta import AbstractTask, ControllerTraining, Evaluation, Horizons, LightningTask, LocalTraining
from lightning_lopt.meta.base import Tensors
from lightning_lopt.meta.outer import SimulatedOuterStep, average_anchors, base_step, controlled_step, learned_step

FILE = "controller.safetensors"
SWEEPS, LR, EVERY = 30, 0.036, 10  # of the recipe `controller`; sweeps between its evaluations
ROUNDS, PAIRS, RUNS = 30, 8, 8  # of the recipe `own`: rounds of an unroll, pairs of a sweep, runs of the comparison
FITTING = 0.6  # of the minutes of `own`; the rest is for the comparison
FRESH = 1_000_003  # seed of the comparison, of which the fit knows nothing


class Saving(L.Callback):
    """Write the controller after every sweep, with its provenance."""

    def __init__(self, path: Path, card: Callable[[int], dict[str, Any]]) -> None:
        self.path, self.card = path, card

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        controller = pl_module.controller
        controller.card = self.card(int(pl_module.sweeps))
        controller.save(self.path, overwrite=True)


def fit(meta: ControllerTraining, sweeps: int, args: argparse.Namespace, card: Callable[[int], dict[str, Any]]) -> None:
    """Train a controller, with a checkpoint and a file of the weights after each sweep."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=sweeps,
        max_time=timedelta(minutes=args.minutes) if args.minutes and args.recipe == "controller" else None,
        callbacks=[
            ModelCheckpoint(args.out / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=1, monitor=None),
            Saving(args.out / FILE, card),
        ],
        val_check_interval=EVERY,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=CSVLogger(args.out, name="log"),
        log_every_n_steps=1,
        enable_model_summary=False,
    )
    trainer.fit(meta, ckpt_path=args.resume)


def train_controller(data: list[Images], args: argparse.Namespace, card: Callable[[int], dict[str, Any]]) -> None:
    """Train a controller from 0 on all tasks of the recipe; evaluate it in the middle of the range of γ."""
    if len(data) != 2:
        raise SystemExit(
            f"--recipe controller needs two sets of images, not {len(data)}: --data FASHION_MNIST CIFAR10."
        )
    tasks = controller_tasks(data)
    evaluations = []
    for i, (task, training) in enumerate(tasks):
        low, high = training.local_lr if isinstance(training.local_lr, tuple) else (training.local_lr,) * 2
        for kind, share in (("constant", 0.0), ("decaying", 1.0)):
            fixed = replace(training, local_lr=math.sqrt(low * high), decay_share=share)
            evaluations.append(Evaluation(f"{kind} {i}", task, fixed, num_rounds=50, seed=FRESH))
    meta = ControllerTraining(tasks, num_pairs=args.pairs or 16, lr=LR, evaluations=evaluations, seed=args.seed)
    fit(meta, args.steps or SWEEPS, args, card)
    print(f"The controller is in {args.out / FILE}. Use it: ControlledNesterov(controller=...).")


@dataclass(frozen=True)
class Method:
    """An outer step to compare.

    Attributes:
        strategy: Strategy that has it, as one writes it.
        outer: Function that makes its simulated step.
    """

    strategy: str
    outer: Callable[[Tensors], SimulatedOuterStep]


def methods(fitted: Controller, file: Path) -> dict[str, Method]:
    """The fitted controller, last, and all that it must beat, by name."""
    default, bundled, own = AdaMLP.bundled(), Controller.bundled().weights(), fitted.weights()
    partial = f"LocalSGD(outer_optimizer=partial(ControlledNesterov, controller={str(file)!r}))"
    return {
        "averaging": Method("LocalSGD()", lambda anchor: average_anchors),
        "LearnedOptimizer": Method("LearnedLocalSGD()", lambda anchor: learned_step(anchor, [default])),
        "BlendedNesterov": Method("LocalSGD(outer_optimizer=BlendedNesterov)", base_step),
        "ControlledNesterov": Method(
            "LocalSGD(outer_optimizer=ControlledNesterov)", lambda anchor: controlled_step(anchor, bundled)
        ),
        "fitted": Method(partial, lambda anchor: controlled_step(anchor, own)),
    }


def load_own(file: Path) -> tuple[AbstractTask, LocalTraining]:
    """The task of a user's file, and its local training."""
    sys.path.insert(0, str(file.parent))
    names = runpy.run_path(str(file))
    if not callable(names.get("task")):
        raise SystemExit(f"{file} must define a function task() that returns a task, such as examples/own_gpt.py.")
    task, training = names["task"](), names.get("local")
    if training is None:
        if not isinstance(task, LightningTask):
            raise SystemExit(f"{file} must also define local = LocalTraining(num_workers, local_steps, local_lr, ...).")
        training = task.local_training()
    return task, training


def seconds_per_sweep(meta: ControllerTraining) -> float:
    """CPU-seconds of a sweep, from the cost of six rounds of its unrolls."""
    horizons, rounds = meta.horizons, sum(meta.horizons.num_rounds) / len(meta.horizons.num_rounds)
    meta.horizons = replace(horizons, num_rounds=(6,))
    began = time.process_time()
    meta.sweep(0)
    meta.horizons = horizons
    meta.rms.zero_()
    return (time.process_time() - began) * rounds / 6


def spread(ratios: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return ratios.mean().item(), ratios.std().item() / math.sqrt(len(ratios))


def compare(evaluation: Evaluation, candidates: dict[str, Method]) -> str:
    """Print a table of the final losses, run by run; return the name of the method to use.

    The fitted controller, which is the last, is chosen only if it is ahead of every other by two standard errors.
    """
    logs = {name: evaluation.finals(evaluation.losses_with(each.outer)).log() for name, each in candidates.items()}
    names, fitted = list(logs), [*logs][-1]
    print(f"\n{'':20} final loss   log ratio to averaging   log ratio of fitted to it   fitted ahead")
    for name, log in logs.items():
        row = f"{name:20} {log.exp().mean():10.4f}   "
        row += "" if name == names[0] else "{:+11.4f} ± {:.4f}".format(*spread(log - logs[names[0]])).ljust(22)
        if name != fitted:
            mean, error = spread(logs[fitted] - log)
            wins = int((logs[fitted] < log).sum())
            row = f"{row:58} {mean:+17.4f} ± {error:.4f}   {wins:5} of {len(log)}"
        print(row)
    others = names[:-1]
    if all(mean < -2 * error for mean, error in (spread(logs[fitted] - logs[name]) for name in others)):
        return fitted
    return min(others, key=lambda name: logs[name].mean().item())


def train_own(args: argparse.Namespace, card: Callable[[int], dict[str, Any]]) -> None:
    """Fit the bundled controller to a user's task, compare it on fresh seeds, and say which outer step to use."""
    task, training = load_own(args.task)
    print(f"{task}, {training}")
    minutes, pairs = args.minutes or 15, args.pairs or PAIRS
    meta = ControllerTraining(
        [(task, training)],
        Controller.bundled(),
        horizons=Horizons(num_rounds=(ROUNDS // 2, ROUNDS), step_factors=(1,), num_workers=(), max_steps=10**9),
        constants=args.constants,
        num_pairs=pairs,
        lr=0.1 if args.constants else 0.03,
        seed=args.seed,
    )
    seconds = seconds_per_sweep(meta)
    sweeps = args.steps or int(FITTING * 60 * minutes / seconds)
    if not args.steps and sweeps < 5:
        raise SystemExit(
            f"A sweep takes {seconds:.0f} s, so {minutes:g} minutes hold {sweeps}, and a fit needs five at least. Make "
            f"the model or the batches of {args.task} smaller, or give it more --minutes or fewer --pairs."
        )
    print(f"{sweeps} sweeps of {pairs} pairs, then a comparison over {RUNS} runs of {ROUNDS} rounds on fresh seeds")
    fit(meta, sweeps, args, card)
    candidates = methods(meta.controller, args.out / FILE)
    evaluation = Evaluation("own", task, training, num_rounds=ROUNDS, num_runs=RUNS, seed=args.seed + FRESH)
    best = compare(evaluation, candidates)
    if best == "fitted":
        print(f"\nThe fitted controller is ahead of all others. Use it: {candidates[best].strategy}")
    else:
        print(
            f"\nThe fitted controller is not ahead of all others by two standard errors, so nothing speaks for it.\n"
            f"Use {best}: {candidates[best].strategy}"
        )
