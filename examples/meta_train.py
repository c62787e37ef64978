"""Meta-train a learned outer optimizer on small images, then compare it with averaging.

python examples/meta_train.py                                              scikit-learn's digits, minutes on a laptop
python examples/meta_train.py --recipe default --data fashion cifar10      the bundled weights, half an hour
python examples/meta_train.py --recipe paper --data fashion                LOpt-A as published, for a GPU
python examples/meta_train.py --recipe lopt_a_short --data fashion         a sixteenth of its work, 500 steps
python examples/meta_train.py --recipe lopt_a_8x8 --data fashion           LOpt-A by a curriculum, first stage; then
    --recipe lopt_a_14x14, lopt_a_28x28, lopt_a_28x28_late and lopt_a, each with --init OUT/export.safetensors of the
    stage before, with --init-scale 0.2 for the step to 28x28 and 0.5 for the late rounds
python examples/meta_train.py --recipe lagg_a_28x28_late --data fashion    LAgg-A from the bundled lopt_a
python examples/meta_train.py --recipe controller --data fashion cifar10   a controller of the blended step, hours
python examples/meta_train.py --recipe own --task FILE.py                  the bundled controller fitted to your
    LightningModule and data in fifteen minutes, and compared with all that it must beat; see examples/own_gpt.py

Kill it whenever you like; --resume goes on with the same numbers. Where no checkpoint is left, --init goes on from
OUT/export.safetensors, which is small, with fresh unrolls.
"""

from __future__ import annotations

import argparse
import copy
import csv
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict, deque
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from controllers import FILE, train_controller, train_own
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from recipes import RECIPES, scale_last_layer
from report import reading, warn_briefly
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from typing_extensions import override

from lightning_lopt import AdaMLP
from lightning_lopt.costs import count, positive
from lightning_lopt.meta import Evaluation, Export, Exporting, MetaTraining

CONTROLLERS = ("controller", "own")
NETWORK, EXPORT, MEAN = "network.safetensors", "export.safetensors", "mean.safetensors"
EVERY = 20  # meta-iterations between checkpoints, exports and evaluations


class MeanWeights(L.Callback):
    """Write the mean of the weights over the last meta-iterations, at each evaluation and at the end.

    Args:
        path: File of the mean; each replaces the one before.
        count: Meta-iterations that the mean covers, or as many as there have been.
    """

    def __init__(self, path: Path, count: int = 200) -> None:
        self.path = path
        self.recent: deque[torch.Tensor] = deque(maxlen=count)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.recent.append(parameters_to_vector(pl_module.network.parameters()).detach().cpu())
            if trainer.global_step % EVERY == 0:
                self.save(pl_module.network)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.save(pl_module.network)

    def save(self, network: AdaMLP) -> None:
        """Write the mean, with the card of `network`."""
        mean = copy.deepcopy(network).cpu()
        vector_to_parameters(torch.stack([*self.recent]).mean(0), mean.parameters())
        mean.save(self.path, overwrite=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"recent": [*self.recent]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recent.extend(state_dict["recent"])


def load_images(folder: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey images: digits; CIFAR-10 as parquet files; or Fashion-MNIST as torchvision keeps it in <folder>."""
    if folder is None:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        return torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    files = sorted(map(str, folder.glob("train*.parquet")))
    if not files and not folder.exists() and "fashion" not in folder.name.lower():
        raise SystemExit(
            f"There is no folder {folder}. Give one with CIFAR-10's train*.parquet or torchvision's FashionMNIST. That "
            "one is downloaded, too, into a folder that exists or has 'fashion' in its name."
        )
    with reading("--data", folder, "a folder with CIFAR-10's train*.parquet, or torchvision's FashionMNIST"):
        if not files:
            from torchvision.datasets import FashionMNIST

            data = FashionMNIST(str(folder), train=True, download=True)
            return data.data, data.targets
        from datasets import load_dataset
        from torchvision.transforms.functional import pil_to_tensor

        data = load_dataset("parquet", data_files={"train": files})["train"]
        return torch.cat([pil_to_tensor(image.convert("L")) for image in data["img"]]), torch.tensor(data["label"])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, nargs="+", default=[None], help="folders of CIFAR-10 or Fashion-MNIST")
    recipes = [*RECIPES, *CONTROLLERS]
    add("--recipe", choices=recipes, default="quick", help="see examples/recipes.py (default: %(default)s)")
    add("--task", type=Path, help="file of a task of yours, for --recipe own")
    add("--constants", action="store_true", help="with --recipe own: fit the constants of the controller alone")
    add("--pairs", type=count, help="pairs of a sweep on each task, of recipe controller (default: 16) or own (8)")
    add("--steps", type=count, help="meta-iterations, those before --init included where the schedule counts them")
    add(
        "--minutes",
        type=positive,
        help="stop after this time, even before --steps; of recipe own: in all (15)",
    )
    add("--resume", type=Path, help="checkpoint to go on from, e.g. OUT/checkpoints/step=40.ckpt")
    add("--init", type=Path, help="export to go on from, with fresh unrolls")
    add("--init-scale", type=float, default=1.0, help="factor of the last layer of that network (default: %(default)s)")
    add("--out", type=Path, help="folder for results (default: outputs/meta_train, or that of the run to --resume)")
    add("--seed", type=int, default=0, help="of everything drawn (default: %(default)s)")
    args = parser.parse_args()
    if args.resume and args.resume.suffix == ".safetensors":
        parser.error(f"{args.resume} is no checkpoint. Use --init to go on from an export, and another --out.")
    resumed = args.resume.resolve().parent.parent if args.resume else None
    args.out = args.out or resumed or Path("outputs/meta_train")
    if args.out.resolve() != resumed and any((args.out / name).exists() for name in (NETWORK, EXPORT, FILE)):
        parser.error(f"{args.out} holds the weights of another run. Choose another --out, or --resume that run.")
    if (args.recipe == "own") != (args.task is not None):
        parser.error("--recipe own needs the file of a task, and no other takes one: --recipe own --task FILE.py.")
    if args.init and args.recipe in CONTROLLERS:
        parser.error(f"--recipe {args.recipe} has no export: its checkpoints are small. Use --resume.")
    if args.init_scale != 1 and not args.init:
        parser.error("--init-scale is of the network of --init, which is not given.")
    for name in ("resume", "init", "task"):
        if (file := getattr(args, name)) and not file.is_file():
            parser.error(f"--{name} takes a file, but there is none at {file}.")
    return args


def provenance(args: argparse.Namespace, iterations: int, hours: float) -> dict[str, object]:
    git = shutil.which("git")
    commit = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout if git else ""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit.strip() or "unknown",
        "meta_iterations": iterations,
        "hours_of_last_start": round(hours, 2),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, lightning {L.__version__}",
        "seed": args.seed,
    }


def ratios(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Logged evaluations, by name: meta-iterations of this run, and final losses over those of a baseline."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for path in sorted(out.glob("log/*/metrics.csv")):  # one for each start
        for row in csv.DictReader(path.open()):
            for name, value in row.items():
                if value and "over_" in name:
                    found[name].append((int(row["step"]) + 1, float(value)))
    return found


def draw(out: Path, evaluation: Evaluation, before: AdaMLP, after: AdaMLP, first: int) -> None:
    """Draw the curves of a task, and how the losses over Local SGD's went down; print the ends of the curves."""
    import matplotlib.pyplot as plt

    found = ratios(out)
    panels = 2 if found else 1  # a run that is shorter than `EVERY` has no evaluation
    figure, (axes,) = plt.subplots(1, panels, figsize=(5.5 * panels, 4.5), squeeze=False, layout="constrained")
    curves = {**evaluation.baselines, "before meta-training": evaluation.losses(before)}
    curves["learned"] = evaluation.losses(after)
    for name, losses in curves.items():
        axes[0].plot(losses.mean(1), label=name)
        print(f"{name:20s} final loss {evaluation.final(losses):.4f}")
    axes[0].set(yscale="log", xlabel="round", ylabel="training loss of the global weights", title=evaluation.name)
    for right in axes[1:]:
        for name, points in found.items():
            steps, values = zip(*((first + step, value) for step, value in points), strict=True)
            if "/" not in name:
                right.plot(steps, values, label=name)
            elif name.endswith("over_averaging"):
                right.plot(steps, values, color="0.8", lw=0.7, zorder=1)
        right.axhline(1, color="black", lw=0.5, label="baseline")
        right.set(yscale="log", xlabel="meta-iteration", title="final loss over the baseline's (grey: by task)")
    for each in axes:
        each.legend()
    figure.savefig(out / "curves.png", dpi=150)


def main_of_controllers(args: argparse.Namespace) -> None:
    began = time.time()

    def card(sweeps: int) -> dict[str, object]:
        return provenance(args, sweeps, (time.time() - began) / 3600)

    args.out.mkdir(parents=True, exist_ok=True)
    if args.recipe == "own":
        return train_own(args, card)
    train_controller([*map(load_images, args.data)], args, card)


def main() -> None:
    args = parse_args()
    warn_briefly()
    torch.set_num_threads(1)  # the tensors are small; and the numbers do not depend on the machine's cores
    if args.recipe in CONTROLLERS:
        return main_of_controllers(args)
    recipe = RECIPES[args.recipe]([*map(load_images, args.data)], args.seed)
    start_weights = copy.deepcopy(recipe.network)
    with reading("--init", args.init, "the export.safetensors of a run"):
        start = Export.load(args.init) if args.init else None
    if start:
        scale_last_layer(start.network, args.init_scale)
    evaluations = [Evaluation(f"task {i}", *pair) for i, pair in enumerate(recipe.tasks)]
    meta = MetaTraining(
        task=recipe.tasks,
        network=recipe.network,
        start=start,
        evaluations=evaluations,
        seed=args.seed,
        **recipe.options,
    )
    steps = (args.steps or recipe.steps) - meta.scheduled_iterations
    if steps < 1:
        raise SystemExit(f"{args.init} has {meta.scheduled_iterations} meta-iterations already: choose more --steps.")
    mean = MeanWeights(args.out / MEAN)
    checkpoint = ModelCheckpoint(args.out / "checkpoints", "{step}", every_n_train_steps=EVERY, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="auto" if args.recipe.startswith("paper") or args.recipe == "lopt_a" else "cpu",
        max_steps=steps,
        accumulate_grad_batches=recipe.windows,
        max_time=timedelta(minutes=args.minutes) if args.minutes else None,
        gradient_clip_val=1.0,  # below the usual norm, so that a diverging unroll weighs no more than the others
        callbacks=[checkpoint, mean, Exporting(args.out / EXPORT, EVERY, overwrite=args.resume is not None)],
        val_check_interval=EVERY * recipe.windows,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=CSVLogger(args.out, name="log"),
        log_every_n_steps=1,
    )
    began = time.time()
    trainer.fit(meta, ckpt_path=args.resume)
    iterations = meta.start_iterations + trainer.global_step
    meta.network.card = provenance(args, iterations, (time.time() - began) / 3600)
    meta.network.save(args.out / NETWORK, overwrite=True)
    mean.save(meta.network)

    draw(args.out, meta.evaluations[0], start_weights, meta.network, meta.start_iterations)
    print(f'Plot: {args.out / "curves.png"}. Use the weights: LearnedLocalSGD(network="{args.out / NETWORK}")')


if __name__ == "__main__":
    main()
