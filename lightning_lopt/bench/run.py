"""Simulate methods with all their settings and append the loss curves to a file of JSON lines."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from lightning_lopt.bench.data import TASKS, load_task
from lightning_lopt.bench.plot import read, tune
from lightning_lopt.bench.report import machine
from lightning_lopt.bench.simulate import GRIDS, Setting, groups, settings, simulate
from lightning_lopt.network import AdaMLP
from lightning_lopt.optim.learned import resolve_network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command line."""
    parser.add_argument("out", type=Path, help="file to append to, one line per run")
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data", type=Path, help="folder with the images of fashion_mnist or cifar10")
    parser.add_argument("--methods", nargs="+", choices=list(GRIDS), default=["local_sgd", "learned"])
    parser.add_argument("--best-of", type=Path, help="take each method's best setting of this file, not its grid")
    parser.add_argument("--local-lr", nargs="+", type=float, default=[1.0, 0.5, 0.3, 0.1], help="grid of gamma")
    parser.add_argument("--num-workers", type=int, default=8)
    parser.add_argument("--local-steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--network", help="name of bundled weights or a file; default: the bundled default")
    parser.add_argument("--threads", type=int, help="threads of torch")


def _best(path: Path) -> dict[str, list[Setting]]:
    return {t.method: [Setting(t.method, t.local_lr, t.options)] for t in tune(read(path))}


def main(args: argparse.Namespace) -> None:
    """Run the simulations of one task."""
    if args.threads:
        torch.set_num_threads(args.threads)
    task = load_task(args.task, args.data)
    network = resolve_network(args.network) if "learned" in args.methods else AdaMLP()
    best = _best(args.best_of) if args.best_of else {}
    common = {"task": args.task, "num_workers": args.num_workers, "local_steps": args.local_steps}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for method in args.methods:
        grid = best.get(method, []) if args.best_of else settings(method, args.local_lr)
        print(f"{task}: {method}, {len(grid)} settings, {len(args.seeds)} seeds", flush=True)
        for group in groups(task, grid, args.num_workers * len(args.seeds)):
            start = time.perf_counter()
            losses = simulate(task, group, args.seeds, args.num_workers, args.local_steps, args.rounds, network)
            seconds = time.perf_counter() - start
            with args.out.open("a") as out:
                for setting, curves in zip(group, losses.tolist(), strict=True):
                    for seed, curve in zip(args.seeds, curves, strict=True):
                        row = {**common, **vars(setting), "seed": seed, "losses": [float(f"{x:.5g}") for x in curve]}
                        out.write(json.dumps(row) + "\n")
            print(f"  {len(group)} settings in {seconds:.1f} s", flush=True)
    print(f"{args.out}: {machine()}")
