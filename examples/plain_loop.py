"""Rounds in a plain PyTorch loop, without Lightning: each worker trains an MLP on its own share of the digits.

torchrun --nproc-per-node 2 examples/plain_loop.py
python examples/plain_loop.py                         # one worker: a round is a Lookahead step
"""

import argparse
import time
from functools import partial

import torch
import torch.distributed as dist
from report import Curve, report, set_up
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import trange

from lightning_lopt import LearnedOptimizer, Rounds, SlowMomentum

BATCH_SIZE = 32  # per worker
OUTER_OPTIMIZERS = {
    "average": None,
    "slow momentum": partial(SlowMomentum, lr=1.0, momentum=0.5),  # or any torch.optim.Optimizer
    "learned": LearnedOptimizer,
}


def train(name: str, args: argparse.Namespace) -> Curve:
    """Train from scratch with the outer optimizer of this name; a point per round."""
    rank, num_workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    own_images, own_labels = images[rank::num_workers], labels[rank::num_workers]
    torch.manual_seed(args.seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    rounds = Rounds(model, optimizer, args.local_steps, OUTER_OPTIMIZERS[name])

    curve: Curve = []
    start = time.perf_counter()
    progress = trange(args.steps, desc=name, leave=False, disable=rank > 0)
    for _ in progress:
        batch = torch.randint(len(own_labels), (BATCH_SIZE,))
        cross_entropy(model(own_images[batch]), own_labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rounds.step():  # all workers have the same weights now
            with torch.no_grad():
                loss = cross_entropy(model(images), labels).item()
            megabytes, seconds = rounds.comm.bytes_sent / 1e6, time.perf_counter() - start
            curve.append({"rounds": rounds.round_idx, "MB sent": megabytes, "seconds": seconds, "train loss": loss})
            if rank == 0:
                progress.write(f"{name}: round {rounds.round_idx}, {megabytes:.3f} MB sent, train loss {loss:.4f}")
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = set_up(parser, steps=320, lr=0.5)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    curves = {name: train(name, args) for name in OUTER_OPTIMIZERS}
    report(curves, ["train loss"], args.out / "plain_loop.png")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
