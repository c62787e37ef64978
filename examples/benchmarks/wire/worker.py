"""Worker process of the benchmark `wire`: trains with all methods in turn and times their rounds."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from examples.benchmarks.compare.data import fashion_mnist
from examples.benchmarks.report import append_rows
from examples.benchmarks.wire.methods import DDP, METHODS
from lightning_lopt.comm import Communicator
from lightning_lopt.costs import Collective, Link, data_parallel
from lightning_lopt.rounds import Rounds

EVAL_IMAGES = 1024
PATCHES = 4  # along each side
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Setup:
    """Settings of a run of the benchmark.

    Attributes:
        methods: Names of the methods, from `NAMES`.
        mbit: Rate of each worker's link, in 1e6 bits per second.
        latency: Seconds from one worker to another.
        delayed: Whether collectives sleep as long as their transfers would take, since no link could be limited.
        num_workers: Number of workers, K.
        local_steps: Number of local steps per round, H.
        seconds: Training time of each method and seed; the one that has trained least takes the next round.
        ddp_steps: Number of data-parallel steps that stand for a round.
        batch_size: Examples per worker and local step.
        local_lr: Learning rate of AdamW.
        step_seconds: Least time of a local step, reached by sleeping, as on a device of another speed: one number for
            all workers or one for each; 0 does not stretch.
        seeds: Seeds of weights and data.
        width: Width of the transformer.
        depth: Number of blocks of the transformer.
        data: Folder with Fashion-MNIST's idx.gz files; None for scikit-learn's digits.
        out: File that rows are appended to.
    """

    methods: list[str]
    mbit: float = 100.0
    latency: float = 0.0
    delayed: bool = False
    num_workers: int = 2
    local_steps: int = 16
    seconds: float = 120.0
    ddp_steps: int = 3
    batch_size: int = 8
    local_lr: float = 5e-4
    step_seconds: Sequence[float] = (0.0,)
    seeds: Sequence[int] = (0,)
    width: int = 192
    depth: int = 12
    data: str | None = None
    out: str = "wire.jsonl"

    @property
    def stretched(self) -> list[float]:
        """Least time of a local step on each worker."""
        return [self.step_seconds[rank % len(self.step_seconds)] for rank in range(self.num_workers)]

    @property
    def link(self) -> Link:
        """Link of each worker in the model of the network."""
        return Link(self.mbit, self.latency)

    @property
    def runs(self) -> list[tuple[str, int]]:
        """All pairs of a method and a seed."""
        return [(name, seed) for seed in self.seeds for name in self.methods]


class ViT(nn.Module):
    """Transformer on the 16 patches of an image; 5.4 M parameters by default.

    Args:
        pixels: Number of pixels per patch.
        width: Width of the tokens.
        depth: Number of blocks, of 3 heads each.
    """

    def __init__(self, pixels: int = 4, width: int = 192, depth: int = 12) -> None:
        super().__init__()
        self.embed = nn.Linear(pixels, width)
        self.position = nn.Parameter(0.5 * torch.randn(PATCHES**2, width))
        blocks = [
            nn.TransformerEncoderLayer(width, 3, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(depth)
        ]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.head = nn.Linear(PATCHES**2 * width, 10)

    def forward(self, patches: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(patches) + self.position).flatten(1))


def load(data: str | None) -> tuple[Tensor, Tensor]:
    """Load standardised patches [N, 16, pixels] and labels [N]."""
    if data is None:
        from sklearn.datasets import load_digits  # an extra

        pixels, labels = map(torch.as_tensor, load_digits(return_X_y=True))
        images = pixels.unflatten(1, (8, 8))
    else:
        images, labels = fashion_mnist("train", Path(data))
    side = images.shape[-1] // PATCHES
    patches = images.float().view(-1, PATCHES, side, PATCHES, side).transpose(2, 3).flatten(3).flatten(1, 2)
    return (patches - patches.mean()) / patches.std(), labels.long()


class DelayedCommunicator(Communicator):
    """Communicator that sleeps as long as its messages would take on a link.

    Args:
        link: Link of this worker.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        super().__init__()

    def _count(self, tensor: Tensor, factor: float) -> None:
        before = self.bytes_sent
        super()._count(tensor, factor)
        time.sleep(self._link.seconds([Collective(self.bytes_sent - before)]))


class Training:
    """Model, optimizer and data of one method with one seed.

    Args:
        name: Name of the method.
        setup: Settings of the run.
        seed: Seed of weights and data.
        fabric: Fabric that has been launched.
        data: Patches and labels.
    """

    def __init__(self, name: str, setup: Setup, seed: int, fabric: Fabric, data: tuple[Tensor, Tensor]) -> None:
        self._setup, self._data, self._rank = setup, data, fabric.global_rank
        self._generator = torch.Generator().manual_seed(1000 * seed + self._rank)
        torch.manual_seed(seed)
        self.model = ViT(data[0].shape[-1], setup.width, setup.depth)
        self.rounds: Rounds | None = None
        self._least = setup.stretched[self._rank]
        self._delay = 0.0
        if name == DDP:
            self._forward: nn.Module = fabric.setup_module(self.model)
            self._optimizer: Optimizer = AdamW(self._forward.parameters(), setup.local_lr)
            parameters = sum(p.numel() for p in self.model.parameters())
            step = data_parallel(4 * parameters, setup.num_workers)
            self._sent = step.bytes_sent
            self._delay = setup.link.seconds([*step.transfer, *step.exposed]) if setup.delayed else 0.0
        else:
            self._forward = self.model
            self._optimizer = AdamW(self.model.parameters(), setup.local_lr)
            comm = DelayedCommunicator(setup.link) if setup.delayed else Communicator()
            method, steps = METHODS[name], setup.local_steps
            outer = None if method.outer is None else method.outer(setup.num_workers)
            speeds = method.speeds(setup.stretched)
            self.rounds = Rounds(
                self.model,
                self._optimizer,
                steps,
                outer,
                comm=comm,
                options=method.sync_options(steps),
                worker_speeds=speeds,
            )

    def local_step(self, seconds: float = 0.0) -> float:
        """Take one step: forward and backward pass and optimizer, stretched to the time in the settings.

        Args:
            seconds: Time of the work alone, for data-parallel training, whose own time includes transfers; 0 takes the
                measured time.

        Returns:
            The measured time, in seconds.
        """
        start = time.perf_counter()
        images, labels = self._data
        chosen = torch.randint(len(labels), (self._setup.batch_size,), generator=self._generator)
        F.cross_entropy(self._forward(images[chosen]), labels[chosen]).backward()
        time.sleep(self._delay)
        self._optimizer.step()
        self._optimizer.zero_grad()
        taken = time.perf_counter() - start
        time.sleep(max(0.0, self._least - (seconds or taken)))
        return taken

    def turn(self, step_seconds: float) -> dict[str, Any]:
        """Train for a round, or for some steps of data-parallel training.

        Args:
            step_seconds: Time of the work of a local step, in seconds.

        Returns:
            Steps, rounds, seconds and bytes, and the measurements of the sync.
        """
        start = time.perf_counter()
        if self.rounds is None:
            steps = rounds = self._setup.ddp_steps
            for _ in range(steps):
                self.local_step(step_seconds)
            return {"seconds": time.perf_counter() - start, "steps": steps, "rounds": rounds, "bytes_sent": self._sent}
        before = self.rounds.step_idx
        self.local_step()
        while not self.rounds.step():
            self.local_step()
        seconds, steps = time.perf_counter() - start, self.rounds.step_idx - before
        self.rounds.speeds.forget()  # the evaluation that follows is not training
        assert self.rounds.last_report is not None
        report = asdict(self.rounds.last_report)
        kept = ("bytes_sent", "transfer_seconds", "waited_seconds", "outer_seconds", "sync_seconds", "drift")
        return {"seconds": seconds, "steps": steps, "rounds": 1, **{name: report[name] for name in kept}}

    @torch.no_grad()
    def loss(self, comm: Communicator) -> float:
        """Evaluate the global weights on fixed images."""
        share = slice(self._rank, EVAL_IMAGES, self._setup.num_workers)
        if self.rounds is not None:
            self.rounds.swap_in("mean")
        loss = F.cross_entropy(self.model(self._data[0][share]), self._data[1][share]).item()
        if self.rounds is not None:
            self.rounds.swap_out()
        return comm.total([loss / self._setup.num_workers], torch.device("cpu"))[0]


class UndisturbedSteps(Training):
    """Local steps without any sync: their time on this machine at this moment."""

    def __init__(self, setup: Setup, fabric: Fabric, data: tuple[Tensor, Tensor]) -> None:
        super().__init__("Local SGD", setup, 0, fabric, data)
        self.rounds = None

    def step_seconds(self, comm: Communicator) -> tuple[list[float], float]:
        """Time one local step that all workers take at once, on each worker, and the work of this worker in it."""
        wait_for_all(comm)
        start = time.perf_counter()
        work = self.local_step()
        return gather_values(time.perf_counter() - start, comm), work


def gather_values(value: float, comm: Communicator) -> list[float]:
    """Gather the values of all workers."""
    return comm.gather(torch.tensor([value], dtype=torch.float64)).flatten().tolist()


def wait_for_all(comm: Communicator) -> None:
    """Wait for all workers."""
    gather_values(0.0, comm)


def main(text: str) -> None:
    """Train with all methods; rank 0 appends a row per round to the file.

    Args:
        text: A `Setup` as JSON.
    """
    setup = Setup(**json.loads(text))
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=1, num_nodes=setup.num_workers, strategy="ddp")
    fabric.launch()
    comm, data = Communicator(), load(setup.data)
    undisturbed = UndisturbedSteps(setup, fabric, data)
    trainings = {(name, seed): Training(name, setup, seed, fabric, data) for name, seed in setup.runs}
    clocks = dict.fromkeys(trainings, 0.0)
    for _ in range(WARM_UP_STEPS):
        undisturbed.local_step()
    while (seconds := min(clocks.values())) < setup.seconds:
        run = next(run for run, clock in clocks.items() if clock == seconds)
        step_seconds, work = undisturbed.step_seconds(comm)
        wait_for_all(comm)
        row = trainings[run].turn(work)
        row["seconds"], row["steps"] = max(gather_values(row["seconds"], comm)), gather_values(row["steps"], comm)
        clocks[run] += row["seconds"]
        row["loss"] = trainings[run].loss(comm)
        if fabric.global_rank == 0:
            append_rows(setup.out, [{"method": run[0], "seed": run[1], "step_seconds": step_seconds, **row}])
    dist.destroy_process_group()  # its threads may abort a process that ends without this


if __name__ == "__main__":
    main(sys.argv[1])
