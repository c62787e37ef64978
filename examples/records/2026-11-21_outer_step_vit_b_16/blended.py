"""Time the bundled default and the paper's network again, without the plain form, which takes minutes."""

import torch
from torchvision.models import get_model

from examples.benchmarks.speed import outer_step

torch.set_num_threads(2)
del outer_step.OPTIMIZERS[outer_step.PLAIN]
with torch.device("meta"):
    shapes = [tuple(p.shape) for p in get_model("vit_b_16").parameters()]
times, peak = outer_step.time_steps(shapes, repeats=2)
print(f"sgemm {peak / 1e9:.0f} GFLOP/s")
for name, (seconds, cpu_seconds) in times.items():
    print(name, [round(x, 2) for x in seconds], "CPU", [round(x, 2) for x in cpu_seconds])
