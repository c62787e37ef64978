"""What one worker of the benchmark `wire` does: train with every method in turn, and time it."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from lightning_lopt.bench.link import Link, Traffic
from lightning_lopt.bench.wire_methods import DDP, METHODS, round_of
from lightning_lopt.comm import Communicator
from lightning_lopt.rounds import Rounds

EVAL_IMAGES = 256
CALIBRATION_STEPS = 2
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Setup:
    """A run of the benchmark.

    Attributes:
        methods: some of `NAMES`.
        mbit: rate of each worker's link, in 1e6 bits per second.
        delayed: sleep as long as transfers would take, because the rate of the link could not be limited.
        num_workers: K.
        local_steps: H.
        turns: rounds of each method, in turn with the others.
        ddp_steps: of data-parallel training in the place of a round.
        batch_size: per worker.
        local_lr: of AdamW.
        step_seconds: stretch local steps to this time by sleeping, as on a device of another speed, one number for all
            workers or one for each; 0 leaves them as they are.
        seed: of weights and data.
        width, depth: of the model.
        out: file to append rows to.
    """

    methods: list[str]
    mbit: float = 100.0
    delayed: bool = False
    num_workers: int = 2
    local_steps: int = 16
    turns: int = 16
    ddp_steps: int = 3
    batch_size: int = 8
    local_lr: float = 5e-4
    step_seconds: Sequence[float] = (0.0,)
    seed: int = 0
    width: int = 192
    depth: int = 12
    out: str = "wire.jsonl"


class ViT(nn.Module):
    """A transformer on the 16 patches of 2 x 2 pixels of scikit-learn's digits; 5.4 M parameters as it is.

    Args:
        width: of the tokens.
        depth: blocks, with 3 heads each.
    """

    def __init__(self, width: int = 192, depth: int = 12) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(0.5 * torch.randn(16, width))
        blocks = [
            nn.TransformerEncoderLayer(width, 3, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(depth)
        ]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.head = nn.Linear(16 * width, 10)

    def forward(self, patches: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(patches) + self.position).flatten(1))


def digits() -> tuple[Tensor, Tensor]:
    """Standardised patches [N, 16, 4] and labels [N]."""
    from sklearn.datasets import load_digits  # an extra

    pixels, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels).float().view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
    return (images - images.mean()) / images.std(), torch.as_tensor(labels)


class DelayedCommunicator(Communicator):
    """Sleeps as long as its messages would take on a link.

    Args:
        link: of this worker.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        super().__init__()

    def _count(self, tensor: Tensor, factor: float) -> None:
        before = self.bytes_sent
        super()._count(tensor, factor)
        time.sleep(self._link.seconds(Traffic(self.bytes_sent - before)))


class Training:
    """One method's model, optimizer and data.

    Args:
        name: of the method.
        setup: of the benchmark.
        fabric: launched.
        data: patches and labels.
    """

    def __init__(self, name: str, setup: Setup, fabric: Fabric, data: tuple[Tensor, Tensor]) -> None:
        link = Link(setup.mbit)
        self._setup, self._data, self._rank = setup, data, fabric.global_rank
        self._generator = torch.Generator().manual_seed(1000 * setup.seed + self._rank)
        torch.manual_seed(setup.seed)
        self.model = ViT(setup.width, setup.depth)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.round = round_of(name, setup.local_steps, self.parameters, setup.num_workers)
        self.rounds: Rounds | None = None
        self._least = setup.step_seconds[self._rank % len(setup.step_seconds)]
        self._delay = 0.0
        if name == DDP:
            self._delay = link.seconds(self.round.transfer) if setup.delayed else 0.0
            self._forward: nn.Module = fabric.setup_module(self.model)
            self._optimizer: Optimizer = AdamW(self._forward.parameters(), setup.local_lr)
        else:
            self._forward = self.model
            self._optimizer = AdamW(self.model.parameters(), setup.local_lr)
            comm = DelayedCommunicator(link) if setup.delayed else Communicator()
            method, steps = METHODS[name], setup.local_steps
            outer = None if method.outer is None else method.outer(setup.num_workers)
            self.rounds = Rounds(self.model, self._optimizer, steps, outer, comm=comm, travel=method.travel(steps))

    def local_step(self, seconds: float = 0.0) -> float:
        """Forward, backward and optimizer, stretched.

        Args:
            seconds: that the work takes, for data-parallel training: its own clock shows transfers too.

        Returns:
            Seconds of the work.
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
        """A round, or some steps of data-parallel training; what they did and cost.

        Args:
            step_seconds: of a local step's work.
        """
        start = time.perf_counter()
        steps = self._setup.ddp_steps if self.rounds is None else self._setup.local_steps
        for _ in range(steps):
            self.local_step(step_seconds if self.rounds is None else 0.0)
            if self.rounds is not None:
                self.rounds.step()
        row = {"steps": steps, "seconds": time.perf_counter() - start}
        if self.rounds is None or self.rounds.last_report is None:
            return {**row, "bytes_sent": steps * self.round.transfer.bytes_sent}
        report = asdict(self.rounds.last_report)
        kept = ("bytes_sent", "transfer_seconds", "waited_seconds", "outer_seconds", "sync_seconds", "drift")
        return {**row, **{name: report[name] for name in kept}}

    @torch.no_grad()
    def loss(self, comm: Communicator) -> float:
        """Of the global weights, on images that stay the same."""
        share = slice(self._rank, EVAL_IMAGES, self._setup.num_workers)
        if self.rounds is not None:
            self.rounds.swap_in("mean")
        loss = F.cross_entropy(self.model(self._data[0][share]), self._data[1][share]).item()
        if self.rounds is not None:
            self.rounds.swap_out()
        return comm.total([loss / self._setup.num_workers], torch.device("cpu"))[0]


class Alone(Training):
    """Local steps that no method disturbs: how long they take on this machine, at this moment."""

    def __init__(self, setup: Setup, fabric: Fabric, data: tuple[Tensor, Tensor]) -> None:
        super().__init__("Local SGD", setup, fabric, data)
        self.rounds = None

    def step_seconds(self, comm: Communicator) -> tuple[float, float]:
        """The slowest worker's time of a local step, while all of them take some; that of this worker's work."""
        comm.total([0.0], torch.device("cpu"))  # begin together
        start = time.perf_counter()
        work = statistics.fmean(self.local_step() for _ in range(CALIBRATION_STEPS))
        return slowest((time.perf_counter() - start) / CALIBRATION_STEPS, comm), work


def slowest(seconds: float, comm: Communicator) -> float:
    """The largest over the workers."""
    microseconds = torch.tensor([round(1e6 * seconds)])
    comm.max_(microseconds)
    return microseconds.item() / 1e6


def main(text: str) -> None:
    """Train with all methods; rank 0 appends a row for each turn to the file.

    Args:
        text: a `Setup` as JSON.
    """
    setup = Setup(**json.loads(text))
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=1, num_nodes=setup.num_workers, strategy="ddp")
    fabric.launch()
    comm, data = Communicator(), digits()
    alone = Alone(setup, fabric, data)
    trainings = {name: Training(name, setup, fabric, data) for name in setup.methods}
    for _ in range(WARM_UP_STEPS):
        alone.local_step()
    for turn in range(setup.turns):
        for name, training in trainings.items():
            step_seconds, work = alone.step_seconds(comm)
            comm.total([0.0], torch.device("cpu"))
            row = {"method": name, "turn": turn, "step_seconds": step_seconds, **training.turn(work)}
            row["seconds"] = slowest(row["seconds"], comm)
            row["loss"] = training.loss(comm)
            if fabric.global_rank == 0:
                with Path(setup.out).open("a") as out:
                    out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
