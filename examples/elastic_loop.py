"""Workers that come and go: three processes train an MLP on the digits; kill some, and start them again.

python examples/elastic_loop.py                # starts torchft's lighthouse and workers 0, 1 and 2
kill -9 PID                                    # of a worker, in another terminal: the others go on
kill PID                                       # it leaves after its round
python examples/elastic_loop.py --worker 2     # starts it again: it takes part in the next round
python examples/elastic_loop.py --trainer      # the same with Lightning's Trainer; to start one again, add --worker 2

To have workers started again by themselves, start the lighthouse once, and each worker by a torchrun of its own:

torchft_lighthouse --bind 127.0.0.1:29510 --min_replicas 1 --heartbeat_timeout_ms 2000 --join_timeout_ms 60000
torchrun --standalone --nproc-per-node 1 --max-restarts 100 examples/elastic_loop.py --trainer --worker 0  # and 1, 2

Needs `pip install '.[examples,elastic]'`. A worker trains on its own share of the data, which rests while it is
away. Everything listens at 127.0.0.1.
"""

import argparse
import multiprocessing
import os
import signal
import time
from functools import partial
from typing import Any

import lightning as L
import torch
from report import need, warn_briefly
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_lopt import Elastic, Rounds, SlowMo, SlowMomentum
from lightning_lopt.costs import count, not_negative

BATCH_SIZE = 32  # per worker
HEARTBEAT_SECONDS = 2.0  # without a sign of life for so long a worker counts as dead


def load_tensors() -> tuple[Tensor, Tensor]:
    pixels, digits = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def make_elastic(args: argparse.Namespace) -> Elastic:
    return Elastic(f"http://{args.lighthouse}", args.worker, max_workers=args.workers)


def train(args: argparse.Namespace) -> None:
    """Train as one of the workers, from whatever round the others are in."""
    torch.set_num_threads(1)
    images, labels = load_tensors()
    own_images, own_labels = images[args.worker :: args.workers], labels[args.worker :: args.workers]
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rounds = Rounds(model, optimizer, args.local_steps, partial(SlowMomentum, momentum=0.5), elastic=make_elastic(args))
    signal.signal(signal.SIGTERM, lambda *_: rounds.leave())

    rounds.meet()
    present = rounds.comm.workers
    say(args.worker, is_in(rounds))
    while rounds.round_idx < args.rounds and not rounds.left:
        batch = torch.randint(len(own_labels), (BATCH_SIZE,))
        cross_entropy(model(own_images[batch]), own_labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(args.pause)
        if rounds.step() and not rounds.left:  # all workers have the same weights now
            before, present = present, rounds.comm.workers
            if args.worker == present[0]:
                report(rounds, before, cross_entropy(model(images), labels).item())
    say(args.worker, "leaves" if rounds.left else f"has trained for {rounds.round_idx} rounds")


class Digits(L.LightningModule):
    """The same for a Trainer: a model, its local optimizer, and a hook that says what happens."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.model, self.args = make_model(), args
        self.present: tuple[int, ...] = ()

    def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
        strategy: Any = self.trainer.strategy
        rounds = strategy.rounds
        if rounds.local_step > 0:
            return
        before, self.present = self.present, rounds.comm.workers
        if not before:
            say(self.args.worker, is_in(rounds))
        elif self.args.worker == self.present[0]:
            images, labels = load_tensors()
            report(rounds, before, cross_entropy(self.model(images), labels).item())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.args.pause)
        images, labels = batch
        return cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def train_by_trainer(args: argparse.Namespace) -> None:
    """Train as `train` does: the Trainer shards the data, and takes SIGTERM for a leave."""
    warn_briefly()
    torch.set_num_threads(1)
    strategy = SlowMo(args.local_steps, momentum=0.5, elastic=make_elastic(args))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_steps=args.rounds * args.local_steps,
        logger=False,  # or one of each worker's own, with a default_root_dir of its own
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(args), DataLoader(TensorDataset(*load_tensors()), BATCH_SIZE, shuffle=True))
    assert strategy.rounds is not None
    say(args.worker, f"has trained for {strategy.rounds.round_idx} rounds")


def is_in(rounds: Rounds) -> str:
    return f"process {os.getpid()} is in from round {rounds.round_idx} on, with workers {rounds.comm.workers}"


def report(rounds: Rounds, before: tuple[int, ...], loss: float) -> None:
    """Say who took part in a round, and who came or went."""
    present, last = rounds.comm.workers, rounds.last_report
    took_part = "a round that others ended" if last is None else f"round {last.round_idx} of workers {last.workers}"
    gone, new = sorted({*before} - {*present}), sorted({*present} - {*before})
    changes = [f"{w} is gone" for w in gone] + [f"{w} joins" for w in new]
    say(present[0], ", ".join([f"{took_part}: train loss {loss:.4f}", *changes]))


def say(worker: int, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} worker {worker}: {text}", flush=True)


def start_all(args: argparse.Namespace) -> None:
    """Run the lighthouse here, and each worker in a process of its own, until all of them have ended."""
    from torchft.coordination import LighthouseServer  # pyright: ignore[reportMissingImports]

    start = train_by_trainer if args.trainer else train
    context = multiprocessing.get_context("fork")  # of a process that has imported everything
    given = [argparse.Namespace(**{**vars(args), "worker": worker}) for worker in range(args.workers)]
    workers = [context.Process(target=start, args=(own,)) for own in given]
    for worker in workers:
        worker.start()
    lighthouse = LighthouseServer(
        bind=args.lighthouse,
        min_replicas=1,
        join_timeout_ms=60_000,  # longer than a round
        heartbeat_timeout_ms=round(1000 * HEARTBEAT_SECONDS),
    )
    try:
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            worker.kill()
        lighthouse.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=int, help="number of this worker; without it, start everything")
    parser.add_argument("--workers", type=count, default=3, help="number of workers at most (default: %(default)s)")
    parser.add_argument("--trainer", action="store_true", help="train by Lightning's Trainer")
    parser.add_argument("--rounds", type=count, default=200, help="rounds of the run (default: %(default)s)")
    parser.add_argument("--local-steps", type=count, default=16, help="local steps per round (default: %(default)s)")
    parser.add_argument("--pause", type=not_negative, default=0.05, help="seconds per step (default: %(default)s)")
    parser.add_argument("--lighthouse", default="127.0.0.1:29510", help="its address (default: %(default)s)")
    args = parser.parse_args()
    if args.worker is not None and not 0 <= args.worker < args.workers:
        parser.error(f"--worker must be from 0 to {args.workers - 1}, not {args.worker}.")
    need("torchft", extra="elastic")
    os.environ.setdefault("RUST_LOG", "error")  # the lighthouse is talkative
    if args.worker is None:
        start_all(args)
    else:
        train_by_trainer(args) if args.trainer else train(args)


if __name__ == "__main__":
    main()
