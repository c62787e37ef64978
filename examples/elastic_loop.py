"""Workers that come and go: three processes train an MLP on the digits; kill some, and start them again.

python examples/elastic_loop.py                # starts torchft's lighthouse and workers 0, 1 and 2
kill -9 PID                                    # of a worker, in another terminal: the others go on
kill PID                                       # it leaves after its round
python examples/elastic_loop.py --worker 2     # starts it again: it takes part in the next round

Needs `pip install 'lightning-lopt[elastic]'`. A worker trains on its own share of the data, which rests while it is
away. Everything listens at 127.0.0.1.
"""

import argparse
import multiprocessing
import os
import signal
import time
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_lopt import Elastic, Rounds, SlowMomentum

BATCH_SIZE = 32  # per worker
HEARTBEAT_SECONDS = 2.0  # without a sign of life for so long a worker counts as dead


def train(args: argparse.Namespace) -> None:
    """Train as one of the workers, from whatever round the others are in."""
    torch.set_num_threads(1)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    own_images, own_labels = images[args.worker :: args.workers], labels[args.worker :: args.workers]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    elastic = Elastic(f"http://{args.lighthouse}", args.worker, max_workers=args.workers)
    rounds = Rounds(model, optimizer, args.local_steps, partial(SlowMomentum, momentum=0.5), elastic=elastic)
    signal.signal(signal.SIGTERM, lambda *_: rounds.leave())

    rounds.meet()
    present = rounds.comm.workers
    say(args.worker, f"process {os.getpid()} is in from round {rounds.round_idx} on, with workers {present}")
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

    context = multiprocessing.get_context("fork")  # of a process that has imported everything
    given = [argparse.Namespace(**{**vars(args), "worker": worker}) for worker in range(args.workers)]
    workers = [context.Process(target=train, args=(own,)) for own in given]
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
    parser.add_argument("--workers", type=int, default=3, help="number of workers at most (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of the run (default: %(default)s)")
    parser.add_argument("--local-steps", type=int, default=16, help="local steps per round (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds after each step (default: %(default)s)")
    parser.add_argument("--lighthouse", default="127.0.0.1:29510", help="its address (default: %(default)s)")
    args = parser.parse_args()
    os.environ.setdefault("RUST_LOG", "error")  # the lighthouse is talkative
    start_all(args) if args.worker is None else train(args)


if __name__ == "__main__":
    main()
