"""Compare DiLoCo with torchft's, in turn in the same processes: weights, bytes, seconds per sync and memory.

Both start from one model, with the same local optimizer, the same gradients and the same outer optimizer, SGD with
Nesterov momentum. Gradients are random numbers, so that a local step costs next to nothing; the time of a sync is that
of the last local step of a round, from a barrier on, less that of a step without a sync. The slower worker counts.
`pip install torchft` (Linux on x86_64) in one command: it is used in this benchmark alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from examples.benchmarks.report import append_rows, machine, read_rows
from examples.benchmarks.wire.namespaces import run_linked, run_local, why_not
from lightning_lopt.costs import count, not_negative, positive, table
from lightning_lopt.elastic import Elastic
from lightning_lopt.rounds import Rounds

OURS, TORCHFT = "lightning_lopt", "torchft"
WARM_UP_ROUNDS = 2
LIGHTHOUSE_PORT = 29510
OUTER = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


@dataclass(frozen=True)
class Setup:
    """Settings of a run.

    Attributes:
        mbit: Rate of each worker's link, in 1e6 bits per second; 0 for the loopback interface.
        tensors: Number of equal tensors of the model.
        parameters: Number of parameters, about.
        local_steps: Number of local steps per round, H >= 2.
        rounds: Number of timed rounds.
        out: File that rows are appended to.
        elastic: Whether our workers may come and go, too.
    """

    mbit: float = 100.0
    tensors: int = 10
    parameters: float = 5e6
    local_steps: int = 4
    rounds: int = 10
    out: str = "peers.jsonl"
    elastic: bool = False

    def model(self) -> nn.Module:
        """Model of square matrices, the same on all workers."""
        side = round((self.parameters / self.tensors) ** 0.5)
        generator = torch.Generator().manual_seed(0)
        return nn.ParameterList([torch.randn(side, side, generator=generator) for _ in range(self.tensors)])


class Training:
    """Local steps of a model with random gradients, by which a synchroniser is driven.

    Args:
        setup: Settings of the run.
        rank: Rank of this worker.
    """

    def __init__(self, setup: Setup, rank: int) -> None:
        self.rank = rank
        self.model = setup.model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self._generator = torch.Generator().manual_seed(1 + rank)
        self.after_step: Callable[[], object] = lambda: None
        self.kept: Any = None  # what must live as long as the training

    def step(self) -> float:
        """Take a step, and return its seconds without those of drawing the gradients."""
        for p in self.model.parameters():
            p.grad = torch.randn(p.shape, generator=self._generator)
        dist.barrier()
        start = time.perf_counter()
        self.optimizer.step()
        self.after_step()
        return time.perf_counter() - start


def _use_ours(training: Training, setup: Setup) -> None:
    rounds = partial(Rounds, training.model, training.optimizer, setup.local_steps, OUTER)
    if not setup.elastic:
        training.after_step = rounds().step
        return
    training.kept = _lighthouse(training.rank, port := LIGHTHOUSE_PORT + 1)
    elastic = Elastic(f"http://{_address(0)}:{port}", training.rank, 2, 2, host=_address(training.rank))
    training.after_step = (members := rounds(elastic=elastic)).step
    members.meet()


def _use_torchft(training: Training, setup: Setup) -> None:
    from torchft import Manager, ProcessGroupGloo  # pyright: ignore[reportMissingImports]
    from torchft.local_sgd import DiLoCo  # pyright: ignore[reportMissingImports]

    server = _lighthouse(training.rank, LIGHTHOUSE_PORT)
    address = _address(training.rank)
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=60)),
        load_state_dict=None,
        state_dict=None,
        min_replica_size=2,
        use_async_quorum=False,
        rank=0,
        world_size=1,
        store_addr=address,
        store_port=store.port,
        lighthouse_addr=f"http://{_address(0)}:{LIGHTHOUSE_PORT}",
        replica_id=f"worker{training.rank}_",
        hostname=address,
        init_sync=False,  # with it, the first pseudo-gradient of one worker counts for all
    )
    outer = OUTER(list(training.model.parameters()))
    diloco = DiLoCo(manager, [training.model], training.optimizer, outer, sync_every=setup.local_steps)
    training.kept = server, store, diloco.__enter__()


def _lighthouse(rank: int, port: int) -> Any:
    """A lighthouse on the first worker."""
    from torchft.coordination import LighthouseServer  # pyright: ignore[reportMissingImports]

    bind = f"{_address(0)}:{port}"
    server = LighthouseServer(bind=bind, min_replicas=2, join_timeout_ms=10_000) if rank == 0 else None
    dist.barrier()
    return server


def _address(rank: int) -> str:
    return os.environ["PEERS_ADDRESS"].format(rank + 1)


def _sent() -> int:
    """Bytes that this worker's interface has sent."""
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[8])
    raise LookupError(interface)


def _held() -> int:
    """Bytes of the tensors of this process."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):  # asking a lazy module for its class would import it
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _largest(value: float) -> float:
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def work(setup: Setup) -> None:
    """Train as one of two workers; rank 0 writes the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    trainings, extra = {}, {}
    for name, use in ((OURS, _use_ours), (TORCHFT, _use_torchft)):
        trainings[name] = training = Training(setup, rank)
        before = _held()
        use(training, setup)
        for _ in range(WARM_UP_ROUNDS * setup.local_steps):
            training.step()
        training.optimizer.zero_grad()
        extra[name] = _held() - before
    for index in range(setup.rounds):
        names = [OURS, TORCHFT] if index % 2 else [TORCHFT, OURS]
        row: dict[str, Any] = {"round": index}
        for name in names:
            ordinary = statistics.median([trainings[name].step() for _ in range(setup.local_steps - 1)])
            sent = _sent()
            row[f"{name} seconds"] = _largest(trainings[name].step() - ordinary)
            row[f"{name} bytes"] = _sent() - sent
        pairs = zip(*(t.model.parameters() for t in trainings.values()), strict=True)
        row["equal"] = all(torch.equal(a, b) for a, b in pairs)
        if rank == 0:
            append_rows(setup.out, [row])
    if rank == 0:
        append_rows(setup.out, [{"extra": extra}])
    dist.barrier()
    os._exit(0)  # torchft's threads would wait


def report(path: Path) -> None:
    """Print the table."""
    header, *rows = read_rows(path)
    extra = rows.pop()["extra"]
    setup, parameters = Setup(**header["setup"]), header["parameters"]
    ratios = [row[f"{OURS} seconds"] / row[f"{TORCHFT} seconds"] for row in rows]
    link = f"{setup.mbit:g} Mbit/s" if setup.mbit else "loopback"
    print(f"{parameters / 1e6:.3f} M parameters in {setup.tensors} tensors, K = 2, {link}")
    print(f"weights bitwise equal after {sum(row['equal'] for row in rows)} of {len(rows)} rounds\n")
    lines = []
    for name in (OURS, TORCHFT):
        seconds = [row[f"{name} seconds"] for row in rows]
        lines.append(
            {
                "DiLoCo of": name,
                "s per sync": statistics.median(seconds),
                "lowest": min(seconds),
                "highest": max(seconds),
                "MB sent": statistics.median(row[f"{name} bytes"] for row in rows) / 1e6,
                "extra bytes per parameter": extra[name] / parameters,
            }
        )
    print(table(lines))
    print(f"\nratio of the seconds: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line."""
    default = Setup()
    parser.add_argument("--mbit", type=not_negative, default=default.mbit, help="Mbit/s of each link; 0: loopback")
    parser.add_argument("--tensors", type=count, default=default.tensors, help="number of tensors of the model")
    parser.add_argument("--parameters", type=positive, default=default.parameters, help="number of parameters, about")
    parser.add_argument("--local-steps", type=count, default=default.local_steps)
    parser.add_argument("--rounds", type=count, default=default.rounds, help="timed rounds")
    parser.add_argument("--elastic", action="store_true", help="let our workers come and go, too: Rounds(elastic=...)")
    parser.add_argument("--out", type=Path, default=Path("peers.jsonl"), help="file for the rows")
    parser.add_argument("--report", action="store_true", help="train nothing, and report the rows in the file")


def main(args: argparse.Namespace) -> None:
    """Start the workers, and report their rounds."""
    if not args.report:
        setup = Setup(args.mbit, args.tensors, args.parameters, args.local_steps, args.rounds, str(args.out.resolve()))
        setup = replace(setup, elastic=args.elastic)
        parameters = sum(p.numel() for p in setup.model().parameters())
        args.out.parent.mkdir(parents=True, exist_ok=True)
        header = {"setup": {**asdict(setup), "out": args.out.name}, "parameters": parameters, "machine": machine()}
        args.out.write_text(json.dumps(header) + "\n")
        command = ["-m", "examples.benchmarks.wire.peers", json.dumps(asdict(setup))]
        os.environ.setdefault("RUST_LOG", "error")  # of torchft, which logs every quorum
        os.environ["PEERS_ADDRESS"] = "10.77.0.{}" if args.mbit else "127.0.0.1"
        if args.mbit and (reason := why_not()):
            raise SystemExit(f"No link can be limited here: {reason}. With --mbit 0 the loopback interface is used.")
        if args.mbit:
            run_linked(command, 2, args.mbit)
        else:
            run_local(command, 2)
    report(args.out)


if __name__ == "__main__":
    work(Setup(**json.loads(sys.argv[1])))
