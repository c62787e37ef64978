"""Measure time and memory of one outer step: LearnedOptimizer beside SGD, AdamW and its plain form.

The plain form and its counterpart have the network of the paper; the default has smaller layers, and orthogonalises and
whitens. All optimizers take the same pseudo-gradients on the same parameters, in turn, so that disturbances of the
machine affect them alike. The share of sgemm relates the multiplications of the separable form (3.2 kFLOP per
parameter) to the fastest square sgemm of the same run. Extra memory is the peak of the resident set of a fresh process
during its first step, less parameters, gradients and state of the optimizer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from examples.benchmarks.report import UsageError, machine, write_json
from examples.benchmarks.speed.memory import extra_bytes
from lightning_lopt.costs import count, table
from lightning_lopt.functional import plain
from lightning_lopt.functional.ada import AdaState
from lightning_lopt.network import AdaMLP
from lightning_lopt.optim import LearnedOptimizer

OURS, PLAIN = "LearnedOptimizer, paper", "plain form"
FLOP_PER_PARAMETER = 2 * (16 * 32 + 32 * 32 + 32 * 2)
SGEMM_SIDE = 1536
GRAD_STD = 1e-3  # about that of four steps with a learning rate of 0.1 and gradients of 0.003
Shapes = Sequence[tuple[int, ...]]


def tiny_vit() -> Shapes:
    """Shapes of the vision transformer of `examples/finetune_vit.py` for 8×8 digits."""
    from torchvision.models import VisionTransformer  # an extra, and slow to import

    with torch.device("meta"):
        backbone = VisionTransformer(8, 2, 4, 4, hidden_dim=64, mlp_dim=128, num_classes=10)
    return [tuple(p.shape) for p in backbone.parameters()]


def minilm() -> Shapes:
    """Shapes of a BERT of MiniLM's size: 6 layers of width 384, and 30,522 tokens."""
    width, inner = 384, 1536
    norm = [(width,)] * 2
    layer = [*[(width, width), (width,)] * 4, *norm, (inner, width), (inner,), (width, inner), (width,), *norm]
    return [(30_522, width), (512, width), (2, width), *norm, *layer * 6, (width, width), (width,)]


MODELS = {"tiny_vit": tiny_vit, "minilm": minilm}


class PlainForm(Optimizer):
    """The plain form, `functional.plain`, as an optimizer that steps tensor by tensor.

    Args:
        params: Anchors.
        network: Network of the step.
    """

    def __init__(self, params: Sequence[Parameter], network: AdaMLP) -> None:
        super().__init__(params, {})
        self._network = network.functional()
        self._round_idx = torch.zeros(1, dtype=torch.long)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state.update(vars(AdaState.zeros(tuple(p.shape), 1, p.dtype, p.device)))
            plain.step(p.unsqueeze(0), p.grad.unsqueeze(0), AdaState(**state), self._network, self._round_idx)
        self._round_idx += 1


OPTIMIZERS: dict[str, Callable[[Sequence[Parameter]], Optimizer]] = {
    "SGD momentum": lambda params: SGD(params, lr=0.7, momentum=0.9, nesterov=True),
    "AdamW": lambda params: AdamW(params, lr=1e-3),
    "LearnedOptimizer, default": lambda params: LearnedOptimizer(params),
    OURS: lambda params: LearnedOptimizer(params, network=AdaMLP(seed=0)),
    PLAIN: lambda params: PlainForm(params, AdaMLP(seed=0)),
}


def parameters(shapes: Shapes) -> list[Parameter]:
    """Make random parameters with pseudo-gradients as their gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for p in params:
        p.grad = GRAD_STD * torch.randn(p.shape, generator=generator)
    return params


def sgemm_flops() -> float:
    """Measure one square product of float32 matrices, in FLOP per second."""
    a, b, out = (torch.ones(SGEMM_SIDE, SGEMM_SIDE) for _ in range(3))
    torch.mm(a, b, out=out)
    start = time.perf_counter()
    torch.mm(a, b, out=out)
    return 2 * SGEMM_SIDE**3 / (time.perf_counter() - start)


class Times(NamedTuple):
    """Times of the steps of one optimizer.

    Attributes:
        seconds: Wall time of each step.
        cpu_seconds: CPU time of each step on all threads, which other processes hardly disturb.
    """

    seconds: list[float]
    cpu_seconds: list[float]


def time_steps(shapes: Shapes, repeats: int) -> tuple[dict[str, Times], float]:
    """Time the optimizers in turn, after a step each to warm up; also return the peak FLOP per second of sgemm."""
    params = parameters(shapes)
    optimizers = {name: make(params) for name, make in OPTIMIZERS.items()}
    times = {name: Times([], []) for name in optimizers}
    peak = 0.0
    for repeat in range(repeats + 1):
        for name, optimizer in optimizers.items():
            peak = max(peak, sgemm_flops())
            start, cpu_start = time.perf_counter(), time.process_time()
            optimizer.step()
            if repeat:
                times[name].seconds.append(time.perf_counter() - start)
                times[name].cpu_seconds.append(time.process_time() - cpu_start)
    return times, peak


def extra_memory(name: str, shapes: Shapes, threads: int) -> int | None:
    """Measure the extra memory of an optimizer's first step; call it in a fresh process.

    Args:
        name: Name of the optimizer, a key of `OPTIMIZERS`.
        shapes: Shapes of the parameters.
        threads: Number of threads of torch.

    Returns:
        Peak bytes besides parameters, gradients and state; None where the system has no figure (it must be Linux).
    """
    torch.set_num_threads(threads)
    OPTIMIZERS[name](parameters([(256, 1024)])).step()  # loads libraries and allocates buffers that stay
    optimizer = OPTIMIZERS[name](parameters(shapes))
    extra = extra_bytes(optimizer.step)
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return None if extra is None else extra - sum(tensor.nbytes for tensor in tensors)


def measure(shapes: Shapes, repeats: int) -> dict[str, Any]:
    """Measure times and memory of all optimizers on parameters of these shapes.

    Args:
        shapes: Shapes of the parameters.
        repeats: Number of timed steps of each optimizer, >= 1.
    """
    times, peak = time_steps(shapes, repeats)
    memory = {}
    for name in OPTIMIZERS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            memory[name] = process.submit(extra_memory, name, shapes, torch.get_num_threads()).result()
    count = sum(torch.Size(shape).numel() for shape in shapes)
    rows = []
    for name, (seconds, cpu_seconds) in times.items():
        median = statistics.median(seconds)
        learned = name in (OURS, PLAIN)
        rows.append(
            {
                "optimizer": name,
                "seconds": median,
                "fastest": min(seconds),
                "slowest": max(seconds),
                "CPU seconds": statistics.median(cpu_seconds),
                "ns per parameter": median / count * 1e9,
                "of ours": statistics.median(b / a for a, b in zip(times[OURS].seconds, seconds, strict=True)),
                "share of sgemm": FLOP_PER_PARAMETER * count / median / peak if learned else None,
                "extra MB": None if memory[name] is None else memory[name] / 1e6,
            }
        )
    raw = {name: values._asdict() for name, values in times.items()}
    return {"machine": machine(), "parameters": count, "sgemm_flops": peak, "rows": rows, "times": raw}


def _torchvision(name: str) -> Shapes:
    from torchvision.models import get_model  # an extra, and slow to import

    with torch.device("meta"):
        try:
            return [tuple(p.shape) for p in get_model(name).parameters()]
        except ValueError as error:
            raise UsageError(f"--model must be one of {sorted(MODELS)} or a torchvision model: {error}.") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line."""
    parser.add_argument("--model", default="vit_b_16", help=f"one of {sorted(MODELS)}, or a torchvision model")
    parser.add_argument("--threads", type=count, help="threads of torch")
    parser.add_argument("--repeats", type=count, default=5, help="timed steps of each optimizer")
    parser.add_argument("--json", type=Path, help="file for the numbers")


def main(args: argparse.Namespace) -> None:
    """Measure a model and print the table."""
    if args.threads:
        torch.set_num_threads(args.threads)
    shapes = MODELS[args.model]() if args.model in MODELS else _torchvision(args.model)
    result = {"model": args.model, **measure(shapes, args.repeats)}
    print(
        f"{args.model}: {result['parameters']:,} parameters, {torch.get_num_threads()} threads, "
        f"sgemm {result['sgemm_flops'] / 1e9:.0f} GFLOP/s, {args.repeats} steps each\n"
    )
    print(table(result["rows"]))
    if args.json:
        write_json(args.json, result)
