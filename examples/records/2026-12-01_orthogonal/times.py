"""Time outer steps of the default in several clones, in turn.

python examples/records/2026-12-01_orthogonal/times.py MODEL THREADS REPEATS NAME=CLONE ...     MODEL: tiny_vit, minilm or vit_b_16

Prints for each clone the median seconds and CPU seconds of a step, and their ratio to the first clone's: median and range.
"""

import json
import os
import statistics
import subprocess
import sys
import time

ONE = "ONE_OF_THE_CLONES"


def work(threads, shapes):
    """Take a step for each line of the standard input."""
    import torch

    from lightning_lopt import LearnedOptimizer

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for p in params:
        p.grad = 1e-3 * torch.randn(p.shape, generator=generator)
    outer = LearnedOptimizer(params)
    for _ in sys.stdin:
        start = time.perf_counter(), time.process_time()
        outer.step()
        print(time.perf_counter() - start[0], time.process_time() - start[1], flush=True)


def main(model, threads, repeats, *clones):
    from examples.benchmarks.speed.outer_step import MODELS, _torchvision

    shapes = [list(shape) for shape in (MODELS[model]() if model in MODELS else _torchvision(model))]
    processes = {}
    for name, root in (clone.split("=", 1) for clone in clones):
        env = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": threads, ONE: json.dumps([int(threads), shapes])}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes[name] = subprocess.Popen([sys.executable, __file__], env=env, cwd=root, **pipes)
    times = {name: [] for name in processes}
    for repeat in range(int(repeats) + 1):
        for name, process in processes.items():
            process.stdin.write("step\n")
            process.stdin.flush()
            seconds = tuple(map(float, process.stdout.readline().split()))
            if repeat:  # the first one makes the state
                times[name].append(seconds)
    first = next(iter(times.values()))
    for name, own in times.items():
        for kind, of in (("seconds", 0), ("CPU seconds", 1)):
            ratios = [mine[of] / its[of] for mine, its in zip(own, first, strict=True)]
            median, ratio = statistics.median(each[of] for each in own), statistics.median(ratios)
            print(f"{model}, {name}: {median:.4f} {kind}, {ratio:.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
    for process in processes.values():
        process.stdin.close()


if __name__ == "__main__":
    if ONE in os.environ:
        work(*json.loads(os.environ[ONE]))
    else:
        main(*sys.argv[1:])
