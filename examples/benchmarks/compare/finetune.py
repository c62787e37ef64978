"""Fine-tune a pre-trained text encoder with virtual workers: who of four authors wrote a passage.

All methods start from the same weights, and see the same passages in the same order: DDP as batches of all workers.
They are compared on other passages of the books that they train on (`loss`, `accuracy`) and on books of the same
authors that they never see (`unseen loss`, `unseen accuracy`). Settings are searched for by the loss on further
passages of the first kind: learning rates of Local SGD and DDP, and at Local SGD's the options of SlowMo and DiLoCo;
LearnedLocalSGD runs at Local SGD's as it is. The seconds are those of the network model (`lightning_lopt.costs`), from
local and outer steps that are timed in turn.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from examples.benchmarks.compare.data import find
from examples.benchmarks.report import append_rows, machine, read_rows
from examples.report import reading
from lightning_lopt import LearnedOptimizer, LocalSGD, Rounds, SlowMomentum
from lightning_lopt.costs import DDP, Link, Method, count, data_parallel, positive, round_seconds, table

CLASSES = ("Burnett", "Doyle", "Gissing", "Stevenson")  # whose books are in two of the files
AUTHORS = {  # of the books in each file, in order
    "train": "Blackmore Burnett Burnett Brontë Chesterton Corelli Doyle Doyle Galsworthy Gaskell Gissing Hardy Kipling "
    "Meredith Stevenson Collins Woolf",
    "valid": "Burnett Gissing",
    "test": "Doyle Stevenson",
}
TOKENS, CHARACTERS = 64, 450  # of a passage; so many characters are more tokens than that
PASSAGES, HELD_OUT = 400, 50  # of each author, to train on and to evaluate with
BATCH_SIZE = 8  # per worker
RATES = (2e-4, 5e-4)  # learning rates of the search
OUTER: dict[str, tuple[Callable[..., Any] | None, list[dict[str, float]]]] = {  # with options, the usual ones first
    "Local SGD": (None, [{}]),
    "SlowMo": (partial(SlowMomentum, lr=1.0), [{"momentum": momentum} for momentum in (0.5, 0.2)]),
    "DiLoCo": (
        partial(torch.optim.SGD, nesterov=True),
        [{"lr": lr, "momentum": momentum} for lr, momentum in ((0.7, 0.9), (0.7, 0.5))],
    ),
    "LearnedLocalSGD": (LearnedOptimizer, [{}]),
}
METHODS = [DDP, *OUTER]
METRICS = ("loss", "accuracy", "unseen loss", "unseen accuracy")
TUNING_SEED = 1000
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "num_sanity_val_steps": 0,
}


class AuthorClassifier(L.LightningModule):
    """A pre-trained encoder with a new head, AdamW, warm-up over a tenth of the steps and linear decay.

    There is no dropout: the encoder stays in the mode for evaluation, in which transformers loads it.
    """

    def __init__(self, model: str, lr: float, num_steps: int) -> None:
        super().__init__()
        from transformers import AutoModelForSequenceClassification  # an extra

        logging.getLogger("transformers").setLevel(logging.ERROR)  # the head is new, as it should be
        self.model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(CLASSES))
        self.lr, self.num_steps = lr, num_steps

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, mask, labels = batch
        return self.model(input_ids=tokens, attention_mask=mask, labels=labels).loss

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        tokens, mask, labels = batch
        output = self.model(input_ids=tokens, attention_mask=mask, labels=labels)
        accuracy = (output.logits.argmax(-1) == labels).float().mean()
        books = ("", "unseen ")[dataloader_idx]
        self.log_dict({f"{books}loss": output.loss, f"{books}accuracy": accuracy}, add_dataloader_idx=False)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.01, fused=True)
        warm_up = max(1, self.num_steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm_up, (self.num_steps - step) / (self.num_steps - warm_up))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def load_passages(model: str, folder: Path) -> dict[str, TensorDataset]:
    """Tokens, mask and author of passages: to train on, of the same books to search and compare, of unseen books.

    Args:
        model: Name or folder of the tokenizer.
        folder: Folder that holds the novels, train.txt, valid.txt and test.txt, at any depth.

    Returns:
        Passages of the splits `train`, `search`, `compare` and `unseen`.
    """
    from transformers import AutoTokenizer  # an extra

    with reading("--model", model, "the name or folder of a pre-trained encoder of transformers"):
        tokenizer = AutoTokenizer.from_pretrained(model)
    texts: dict[tuple[bool, str], str] = defaultdict(str)
    for file, names in AUTHORS.items():
        books = find(folder, f"{file}.txt")[0].read_text().strip().split("\n\n")
        for book, name in zip(books, names.split(), strict=True):
            texts[file == "train", name] += book[len(book) // 50 :]  # past the title, the author and the contents
    found: dict[str, list[tuple[str, int]]] = defaultdict(list)
    step = PASSAGES // HELD_OUT
    for label, name in enumerate(CLASSES):
        passages = _passages(texts[True, name], 2 * PASSAGES)
        between = passages[1::2]
        splits = {"train": passages[::2], "search": between[::step], "compare": between[step // 2 :: step]}
        splits["unseen"] = _passages(texts[False, name], HELD_OUT)
        for split, chosen in splits.items():
            found[split] += [(passage, label) for passage in chosen]
    datasets = {}
    for split, pairs in found.items():
        chosen, labels = zip(*pairs, strict=True)
        options = {"truncation": True, "max_length": TOKENS, "padding": "max_length", "return_tensors": "pt"}
        encoded = tokenizer(list(chosen), **options)
        datasets[split] = TensorDataset(encoded["input_ids"], encoded["attention_mask"], torch.tensor(labels))
    return datasets


def _passages(text: str, count: int) -> list[str]:
    """Evenly spaced passages, each from the beginning of a word."""
    starts = torch.linspace(0, len(text) - 2 * CHARACTERS, count).long().tolist()
    return [text[start : start + CHARACTERS].split(" ", 1)[1] for start in starts]


def _outer(method: str, options: Mapping[str, float]) -> Callable[..., Any] | None:
    factory = OUTER[method][0]
    return factory and partial(factory, **options)


class Curve(L.Callback):
    """Loss and accuracy of the global weights on held-out passages."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {name: round(float(value), 5) for name, value in trainer.callback_metrics.items()}
        self.points.append({"steps": trainer.global_step, **metrics})


@dataclass(frozen=True)
class Run:
    """Settings of a run.

    Attributes:
        stage: Purpose of the run, `"search"` or `"final"`.
        method: Name of the method, one of `METHODS`.
        local_lr: Learning rate of the workers.
        num_workers: Number of workers, K.
        local_steps: Number of local steps per round, H; 1 for DDP.
        steps: Number of local steps.
        seed: Seed of the head, of the passages' order and of dropout.
        options: Options of the outer optimizer.
    """

    stage: str
    method: str
    local_lr: float
    num_workers: int
    local_steps: int
    steps: int
    seed: int
    options: Mapping[str, float] = field(default_factory=dict)

    def train(self, model: str, data: Mapping[str, TensorDataset], eval_steps: int) -> dict[str, Any]:
        """Train, and return the curve on held-out passages."""
        L.seed_everything(self.seed, verbose=False)
        module = AuthorClassifier(model, self.local_lr, self.steps)
        draws = torch.randint(len(data["train"]), (self.steps * self.num_workers * BATCH_SIZE,))
        passages = Subset(data["train"], draws.tolist())
        if self.method == DDP:
            strategy, train = "auto", DataLoader(passages, BATCH_SIZE * self.num_workers)
        else:
            outer = _outer(self.method, self.options)
            strategy = LocalSGD(self.local_steps, outer, virtual_workers=self.num_workers, sharded=True)
            train = DataLoader(passages, BATCH_SIZE)
        curve = Curve()
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=strategy,
            precision="bf16-mixed",
            max_epochs=1,
            use_distributed_sampler=False,  # which would shuffle; batches go to the workers in turn
            val_check_interval=self.steps if self.stage == "search" else max(self.local_steps, eval_steps),
            callbacks=[curve],
            **QUIET,
        )
        start = time.perf_counter()
        evaluate = ["search"] if self.stage == "search" else ["compare", "unseen"]
        trainer.fit(module, train, [DataLoader(data[split], 64) for split in evaluate])
        seconds = round(time.perf_counter() - start, 1)
        parameters = sum(p.numel() for p in module.parameters())
        del module, trainer, strategy
        gc.collect()  # a Trainer is in reference cycles, with all weights
        return {"parameters": parameters, "run_seconds": seconds, "curve": curve.points}


class Runner:
    """Runs of one model on one machine, a line each in a file; those that the file holds are not repeated.

    Args:
        args: Parsed options of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._data = load_passages(args.model, args.data)
        self._rows = read_rows(args.out, ("stage",)) if args.out.exists() else []

    def _append(self, row: dict[str, Any]) -> dict[str, Any]:
        append_rows(self._args.out, [row])
        self._rows.append(row)
        print(row, flush=True)
        return row

    def run(self, run: Run) -> dict[str, Any]:
        """Return the line of a run, after training if need be."""
        settings = asdict(run)
        done = (row for row in self._rows if settings.items() <= row.items())
        return next(done, None) or self._append(
            {**settings, **run.train(self._args.model, self._data, self._args.eval_steps)}
        )

    def time(self, repeats: int = 5) -> None:
        """Time local steps, and the outer step of each strategy, in turn, in CPU seconds of one worker."""
        if any(row["stage"] == "times" for row in self._rows):
            return
        batch = [t[:BATCH_SIZE] for t in self._data["train"].tensors]
        made = {}
        for name, (_, options) in OUTER.items():
            module = AuthorClassifier(self._args.model, RATES[0], 100)
            optimizer = module.configure_optimizers()["optimizer"]
            made[name] = module, optimizer, Rounds(module, optimizer, 1, _outer(name, options[0]))
        steps, outer = [], defaultdict(list)
        for _, (name, (module, optimizer, rounds)) in product(range(repeats), made.items()):
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16):
                loss = module.training_step(batch, 0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            between = time.process_time()
            rounds.step()
            steps.append(between - start)
            outer[name].append(time.process_time() - between)
        outer_seconds = {name: round(statistics.median(times), 4) for name, times in outer.items()}
        step_seconds = round(statistics.median(steps), 4)
        self._append({"stage": "times", "step_seconds": step_seconds, "outer_seconds": outer_seconds, **machine()})

    def search(self) -> dict[str, Run]:
        """Best run of each method by its loss on the passages for the search."""
        num_workers, local_steps = self._args.num_workers[0], self._args.local_steps[0]
        steps = self._args.passages // (2 * num_workers * BATCH_SIZE)
        first = Run("search", DDP, RATES[0], num_workers, 1, steps, TUNING_SEED)

        def best(runs: Iterable[Run]) -> Run:
            return min(runs, key=lambda run: self.run(run)["curve"][-1]["loss"])

        chosen = {DDP: best(replace(first, local_lr=lr) for lr in RATES)}
        local = replace(first, method="Local SGD", local_steps=local_steps)
        chosen["Local SGD"] = local = best(replace(local, local_lr=lr) for lr in RATES)
        for name in ("SlowMo", "DiLoCo"):
            chosen[name] = best(replace(local, method=name, options=options) for options in OUTER[name][1])
        chosen["LearnedLocalSGD"] = replace(local, method="LearnedLocalSGD")
        return chosen

    def compare(self) -> None:
        """Run the methods at their best settings with all numbers of workers and of local steps, and all seeds."""
        args, chosen = self._args, self.search()
        for num_workers, local_steps, seed, name in product(
            args.num_workers, args.local_steps, args.seeds, args.methods
        ):
            self.run(
                replace(
                    chosen[name],
                    stage="final",
                    num_workers=num_workers,
                    local_steps=1 if name == DDP else local_steps,
                    steps=args.passages // (num_workers * BATCH_SIZE),
                    seed=seed,
                )
            )


def points(row: Mapping[str, Any], times: Mapping[str, Any], mbit: float) -> list[dict[str, float]]:
    """Points of a curve, with the rounds, and bytes and seconds as the network model has them."""
    method, num_workers = row["method"], row["num_workers"]
    if method == DDP:
        a_round = data_parallel(4 * row["parameters"], num_workers)
    else:
        work = times["outer_seconds"][method]
        a_round = Method().round(row["local_steps"], row["parameters"], num_workers, work)
    seconds = round_seconds(a_round, times["step_seconds"], Link(mbit))
    curve = []
    for point in row["curve"]:
        rounds = point["steps"] // row["local_steps"]
        costs = {"rounds": rounds, "MB sent": rounds * a_round.bytes_sent / 1e6, "seconds": rounds * seconds}
        curve.append({**point, **costs})
    return curve


def summary(rows: Sequence[Mapping[str, Any]], mbit: float) -> list[dict[str, Any]]:
    """Last points of all methods: mean, least and largest of the seeds."""
    times = next(row for row in rows if row["stage"] == "times")
    lines = []
    for (num_workers, local_steps), methods in _by_shape(rows).items():
        for method, runs in methods.items():
            last = [points(run, times, mbit)[-1] for run in runs]
            options = " ".join(f"{key}={value:g}" for key, value in runs[0]["options"].items())
            lines.append(
                {
                    "K": num_workers,
                    "H": local_steps,
                    "method": method,
                    "setting": f"local_lr={runs[0]['local_lr']:g} {options}".strip(),
                    "seeds": len(runs),
                    **{name: _show([point[name] for point in last]) for name in METRICS},
                    "rounds": last[0]["rounds"],
                    "MB sent": last[0]["MB sent"],
                    "s, modelled": last[0]["seconds"],
                }
            )
    return lines


def _show(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def _by_shape(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], dict[str, list[Mapping[str, Any]]]]:
    """Runs of the comparison by K and H, then by method; those of DDP belong to every H."""
    final = [row for row in rows if row["stage"] == "final"]
    shapes = sorted({(row["num_workers"], row["local_steps"]) for row in final if row["method"] != DDP})
    found: dict[tuple[int, int], dict[str, list[Mapping[str, Any]]]] = {}
    for shape, method in product(shapes, METHODS):
        at = (shape[0], 1) if method == DDP else shape
        runs = [row for row in final if row["method"] == method and (row["num_workers"], row["local_steps"]) == at]
        if runs:
            found.setdefault(shape, {})[method] = runs
    return found


def draw(rows: Sequence[Mapping[str, Any]], mbit: float, path: Path) -> None:
    """Draw the accuracy over rounds, bytes and seconds: mean and range of the seeds, a row for each K and H."""
    from matplotlib.figure import Figure  # an extra
    from matplotlib.ticker import LogLocator

    times = next(row for row in rows if row["stage"] == "times")
    shapes = _by_shape(rows)
    figure = Figure(figsize=(12, 3.4 * len(shapes)), layout="constrained")
    panels = figure.subplots(len(shapes), 3, squeeze=False)
    for of_shape, ((num_workers, local_steps), methods) in zip(panels, shapes.items(), strict=True):
        for i, method in enumerate(METHODS):
            curves = [points(run, times, mbit) for run in methods.get(method, [])]
            for axes, x in zip(of_shape, ("rounds", "MB sent", "seconds") if curves else (), strict=False):
                ends = list(zip(*curves, strict=True))
                positions = [at[0][x] for at in ends]
                lows, means, highs = (
                    [of([point["accuracy"] for point in at]) for at in ends] for of in (min, statistics.fmean, max)
                )
                axes.plot(positions, means, marker=".", color=f"C{i}", label=method)
                axes.fill_between(positions, lows, highs, color=f"C{i}", alpha=0.2)
                axes.set(xlabel=x, xscale="log")
                axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
                axes.xaxis.set_minor_formatter("")
        of_shape[0].set(title=f"{num_workers} workers, H = {local_steps}", ylabel="accuracy")
        of_shape[1].set_xlabel("MB sent by each worker")
        of_shape[2].set_xlabel(f"seconds at {mbit:g} Mbit/s, modelled")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(METHODS))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line."""
    add = parser.add_argument
    add("out", type=Path, help="file that a line per run is appended to; runs that it holds are not repeated")
    add("--model", help="name or folder of a pre-trained encoder of transformers; none: only report the file")
    add("--data", type=Path, help="folder with the novels: train.txt, valid.txt and test.txt, at any depth")
    add("--num-workers", nargs="+", type=count, default=[2], help="the search takes the first")
    add("--local-steps", nargs="+", type=count, default=[16], help="the search takes the first")
    add("--passages", type=count, default=1024, help="passages of all workers together; half of them in the search")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--eval-steps", type=count, default=32, help="local steps between evaluations, at least H")
    add("--threads", type=count, default=1, help="threads of torch")
    add("--mbit", type=positive, default=100.0, help="rate of the modelled link of each worker, in Mbit/s")
    add("--png", type=Path, help="file for the plot")


def main(args: argparse.Namespace) -> None:
    """Search for settings, compare the methods, and print the table."""
    if args.model:
        if args.data is None:
            raise SystemExit("--model needs --data, the folder with the novels.")
        torch.set_num_threads(args.threads)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", ".*(does not have many workers|in eval mode).*")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        runner = Runner(args)
        runner.time()
        runner.compare()
    rows = read_rows(args.out, ("stage",))
    print(table(summary(rows, args.mbit)))
    if args.png:
        draw(rows, args.mbit, args.png)
