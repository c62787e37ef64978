r"""Pre-train a small GPT on workers that share a model each (FSDP2), beside data-parallel training on the same tokens.

    python examples/pretrain_islands.py                  # 2 workers of 2 ranks on a CPU, Python's source code
    python examples/pretrain_islands.py --data FILE.txt  # a text of yours

On several nodes, each of which is a worker (the same command on all of them):

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        examples/pretrain_islands.py --ranks node --width 2048 --depth 24 --num-heads 16

The module shards itself in `configure_model`, as for Lightning's ModelParallelStrategy, with which it trains unchanged:
`self.device_mesh` spans the ranks of one worker. A model larger than one device needs no more than that.
"""

import argparse
import os
import sysconfig
from pathlib import Path

import lightning as L
import torch
from finetune_lm import BATCH_SIZE, EVAL_WINDOWS, GPT, TEXTS, load_text, windows
from report import BRIEF, Curve, CurveRecorder, print_once, reading, report, set_up
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_lopt import DiLoCo, LearnedLocalSGD, LocalSGD, RoundMonitor
from lightning_lopt.costs import count


class ShardedGPT(GPT):
    """The GPT of `finetune_lm.py`, whose blocks lie in shards on the ranks of its worker."""

    def configure_model(self) -> None:
        if self.device_mesh is None or isinstance(self, FSDPModule):  # each rank has all of it, or it is done
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)


def fit(strategy: LocalSGD, splits: list[TensorDataset], args: argparse.Namespace) -> Curve:
    """Train for one epoch on the same tokens as every other strategy; validate the global weights after every round."""
    L.seed_everything(args.seed, verbose=False)
    draws = torch.randint(len(splits[0]), (args.steps * args.devices * args.nodes * BATCH_SIZE,))
    train = DataLoader(Subset(splits[0], draws.tolist()), BATCH_SIZE)  # the Trainer gives each rank its share
    evaluate = [DataLoader(Subset(split, range(min(EVAL_WINDOWS, len(split)))), 64) for split in splits]
    recorder = CurveRecorder()
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cuda" if torch.cuda.device_count() >= args.devices else "cpu",
        devices=args.devices,
        num_nodes=args.nodes,
        max_epochs=1,
        val_check_interval=args.local_steps,
        callbacks=[RoundMonitor(), recorder],
        **BRIEF,
    )
    trainer.fit(ShardedGPT(args.lr, args.width, args.depth, args.num_heads), train, evaluate)
    return recorder.curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help=f"text to train on: {TEXTS} (default: Python's source code)")
    parser.add_argument("--ranks", default="2", help="ranks of a worker, or 'node' (default: %(default)s)")
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", "4"))
    parser.add_argument("--devices", type=count, default=devices, help="ranks per node (default: %(default)s)")
    parser.add_argument("--width", type=count, default=64, help="of the transformer (default: %(default)s)")
    parser.add_argument("--depth", type=count, default=3, help="its blocks (default: %(default)s)")
    parser.add_argument("--num-heads", type=count, default=4, help="of its attention (default: %(default)s)")
    args = set_up(parser, steps=128, lr=3e-3)
    args.nodes = int(os.environ.get("WORLD_SIZE", str(args.devices))) // args.devices
    world_size = args.devices * args.nodes
    ranks = args.devices if args.ranks == "node" else int(args.ranks) if args.ranks.isdigit() else 0
    if ranks < 1 or world_size % ranks:
        parser.error(f"--ranks must be 'node' or divide the {world_size} ranks of all nodes, not {args.ranks}.")
    if args.width % args.num_heads:
        parser.error(f"--num-heads must divide --width {args.width}, not be {args.num_heads}.")
    if args.data is None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        splits = windows("".join(file.read_text(encoding="utf-8") for file in files))
    else:
        with reading("--data", args.data, TEXTS):
            splits = windows(load_text(args.data))

    print_once(f"\n{world_size // ranks} workers of {ranks} ranks")
    curves = {}
    for method in (DiLoCo, LearnedLocalSGD):
        print_once(f"\n{method.__name__}")
        curves[method.__name__] = fit(method(local_steps=args.local_steps, ranks_per_worker=ranks), splits, args)
    print_once("\nData-parallel: one worker of all ranks")
    curves["data-parallel"] = fit(LocalSGD(local_steps=args.local_steps, ranks_per_worker=world_size), splits, args)
    num_parameters = sum(p.numel() for p in GPT(args.lr, args.width, args.depth, args.num_heads).parameters())
    per_step = 2 * (1 - ranks / world_size) * 4 * num_parameters / ranks  # a ring of the same ranks, between workers
    for point in curves["data-parallel"]:
        point["MB sent"] = point["rounds"] * args.local_steps * per_step / 1e6
    report(curves, ["train loss", "val perplexity"], args.out / "pretrain_islands.png")


if __name__ == "__main__":
    main()
