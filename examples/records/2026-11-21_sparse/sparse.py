"""Measure time and memory of choosing and coding coordinates for a sync, beside simpler ways.

Random coordinates are drawn by their gaps, and the largest are sought in chunks; the simpler ways are a mask as large
as the model and a selection from the whole model. Coordinates that are drawn ahead are ready when a sync needs them.
Memory is the peak of the resident set of a fresh process during the first call, results included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.benchmarks.report import machine, table, write_json
from examples.benchmarks.speed.memory import extra_bytes
from lightning_lopt.functional.compression import BF16, Int8, TopK
from lightning_lopt.functional.merge import shared_indices
from lightning_lopt.selection import RandomCoordinates, drawn_ahead

DENSITIES = (0.01, 0.1)
TOP = 0.02
TENSOR = 1 << 20  # the model is made of tensors of this size


def jobs(parameters: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Jobs by name: a preparation that is not measured, and the work that is."""
    values: list[Tensor] = []
    codes: list[Tensor] = []
    sizes = [TENSOR] * (parameters // TENSOR) + [parameters % TENSOR]
    ahead = drawn_ahead(RandomCoordinates(DENSITIES[-1]))

    def make() -> None:
        values[:] = values or [torch.randn(parameters)]

    def wait() -> None:
        ahead.pick(sizes, 0)
        time.sleep(parameters * 3e-8)  # local steps

    found: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    for density in DENSITIES:
        count = round(density * parameters)
        found[f"random {density:.0%}: draw"] = (make, lambda c=count: shared_indices(parameters, c, 0, 0))
        found[f"random {density:.0%}: a mask and its indices"] = (
            make,
            lambda d=density: (torch.rand(parameters) < d).nonzero(),
        )
    found[f"random {DENSITIES[-1]:.0%}: wait for what was drawn ahead"] = (wait, lambda: ahead.pick(sizes, 1))
    found[f"top {TOP:.0%} of the whole model"] = (
        make,
        lambda: values[0].abs().topk(round(TOP * parameters), sorted=False),
    )
    for name, codec in {f"top {TOP:.0%} of chunks": TopK(TOP), "int8": Int8(), "bf16": BF16()}.items():

        def encoded(codec: Any = codec) -> None:
            make()
            codes[:] = [codec.encode(values[0], sizes)]

        found[f"{name}: encode"] = (make, lambda c=codec: c.encode(values[0], sizes))
        found[f"{name}: decode"] = (encoded, lambda c=codec: c.decode(codes[0], sizes))
    return found


def measure_one(name: str, parameters: int, repeats: int, threads: int) -> dict[str, Any]:
    """Measure the times of one job and the memory of its first run; call it in a fresh process."""
    torch.set_num_threads(threads)
    prepare, work = jobs(parameters)[name]
    small_prepare, small_work = jobs(1 << 13)[name]
    small_prepare()
    small_work()  # loads libraries and allocates buffers that stay
    prepare()
    extra, seconds = extra_bytes(work), []
    for _ in range(repeats):
        prepare()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return {
        "what": name,
        "ms": 1e3 * statistics.median(seconds),
        "fastest": 1e3 * min(seconds),
        "slowest": 1e3 * max(seconds),
        "ns per parameter": 1e9 * statistics.median(seconds) / parameters,
        "extra MB": None if extra is None else extra / 1e6,
    }


def main() -> None:
    """Measure every job and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=86_567_656, help="size of the model (default: ViT-B/16)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each job")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    rows = []
    for name in jobs(1):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            rows.append(process.submit(measure_one, name, args.parameters, args.repeats, args.threads).result())
    print(f"{args.parameters:,} parameters, {args.threads} threads, {args.repeats} runs each\n\n{table(rows)}")
    if args.json:
        write_json(args.json, {"machine": machine(), "parameters": args.parameters, "rows": rows})


if __name__ == "__main__":
    main()
