"""Parts that the examples share: arguments, a curve per method, and a table and a plot of the curves."""

import argparse
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only

from lightning_lopt.costs import count, positive
from lightning_lopt.strategies import LocalSGD

NUM_WORKERS = int(os.environ.get("LOCAL_WORLD_SIZE", 2))  # torchrun says how many it has started
BRIEF = {  # for a Trainer that shows its progress, and writes nothing
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}
save_once = rank_zero_only(torch.save)
print_once = rank_zero_only(print)
Curve = list[dict[str, float]]  # a point per evaluation: "rounds", "MB sent", "seconds" and metrics


def set_up(
    parser: argparse.ArgumentParser, steps: int, lr: float, pretrained_lr: float | None = None
) -> argparse.Namespace:
    """Parse an example's own arguments and those that all have, with these defaults; seed; make the output folder."""
    with_model = "" if pretrained_lr is None else f"; with --model {pretrained_lr}"
    parser.add_argument("--steps", type=count, default=steps, help="local steps, whole rounds (default: %(default)s)")
    parser.add_argument("--local-steps", type=count, default=16, help="local steps per round (default: %(default)s)")
    parser.add_argument("--lr", type=positive, help=f"learning rate of the workers (default: {lr}{with_model})")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for results (default: %(default)s)")
    args = parser.parse_args()
    args.steps = math.ceil(args.steps / args.local_steps) * args.local_steps
    if args.lr is None:
        args.lr = lr if getattr(args, "model", None) is None else pretrained_lr
    args.out.mkdir(parents=True, exist_ok=True)
    L.seed_everything(args.seed, verbose=False)
    warn_briefly()
    return args


def warn_briefly() -> None:
    """Silence remarks of Lightning that concern no example."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no remarks on the hardware
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data are in memory
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # torch deprecates what Lightning calls


def need(*packages: str, extra: str = "pretrained") -> None:
    """Exit where packages of an extra are missing."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise SystemExit(f"This needs {' and '.join(missing)}: pip install 'lightning-lopt[{extra}]'.")


need("datasets", "matplotlib", "sklearn", "torchmetrics", "torchvision", extra="examples")  # before they import these


@contextmanager
def reading(option: str, value: object, expected: str) -> Iterator[None]:
    """Exit where the value of an option cannot be read, naming both, with what was expected and the library's reason.

    Args:
        option: Name of the option, like `--data`.
        value: Value that the user gave; None for a default, whose errors are no user's.
        expected: Kind of value that the option takes.
    """
    try:
        yield
    except Exception as error:  # every library has errors of its own
        if value is None:
            raise
        raise SystemExit(
            f"{option} {value} could not be read. It takes {expected}.\n{type(error).__name__}: {error}"
        ) from error


class CurveRecorder(L.Callback):
    """Record the metrics of the global weights at each validation, and what they have cost so far."""

    def __init__(self) -> None:
        self.curve: Curve = []
        self._seconds = 0.0
        self._resumed_at = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._resumed_at = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seconds += time.perf_counter() - self._resumed_at  # the clock stands still during validation

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(trainer.strategy, LocalSGD)
        assert trainer.strategy.rounds is not None
        rounds = trainer.strategy.rounds
        costs = {"rounds": rounds.round_idx, "MB sent": rounds.comm.bytes_sent / 1e6, "seconds": self._seconds}
        self.curve.append({**costs, **{name: float(value) for name, value in trainer.callback_metrics.items()}})
        self._resumed_at = time.perf_counter()


@rank_zero_only
def report(curves: dict[str, Curve], metrics: Sequence[str], file: Path) -> None:
    """Print the last point of each curve as a table; plot all curves.

    Args:
        curves: Curve of each method, by name.
        metrics: Metrics in the table; all are plotted over rounds, the first over megabytes, too, if any were sent.
        file: Path of the plot.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter, MaxNLocator

    class PlainNumbers(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    columns = ["rounds", "MB sent", "seconds", *metrics]
    rows = [["method", *columns], *([name, *(f"{c[-1][k]:.4g}" for k in columns)] for name, c in curves.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for name, *cells in rows:
        print("  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))]))

    panels = [("rounds", metric) for metric in metrics]
    if any(curve[-1]["MB sent"] for curve in curves.values()):  # one worker sends nothing
        panels.insert(1, ("MB sent", metrics[0]))
    figure, (axes,) = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for ax, (x, y) in zip(axes, panels, strict=True):
        for name, curve in curves.items():
            ax.plot([point[x] for point in curve], [point[y] for point in curve], marker=".", label=name)
        ax.set(xlabel="MB sent per worker" if x == "MB sent" else x, ylabel=y)
        if "loss" in y:
            ax.set_yscale("log")
            ax.yaxis.set(major_formatter=PlainNumbers(), minor_formatter=PlainNumbers())
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=x == "rounds"))
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)
    print(f"\nPlot: {file}")
