"""Fraction of a round that the guards take: ten layers of 1000 × 1000, batch 32, AdamW, H = 16."""

import statistics
import time

import torch
import torch.distributed as dist
from torch import nn

from lightning_lopt import Rounds

torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group("gloo")
model = nn.Sequential(*(layer for _ in range(10) for layer in (nn.Linear(1000, 1000), nn.ReLU())))
optimizer = torch.optim.AdamW(model.parameters())
rounds = Rounds(model, optimizer, local_steps=16)
x = torch.randn(32, 1000)
times: dict[str, list[float]] = {"round": [], "norm": [], "comparison": []}
for _ in range(6):
    start = time.perf_counter()
    for _ in range(16):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        rounds.step()
    times["round"].append(time.perf_counter() - start)
for _ in range(7):
    start = time.perf_counter()
    sum(p.detach().square().sum() for p in model.parameters())
    times["norm"].append(time.perf_counter() - start)
    start = time.perf_counter()
    rounds.sync._parameters.checksum()
    times["comparison"].append(time.perf_counter() - start)
if dist.get_rank() == 0:
    seconds = {name: statistics.median(values) for name, values in times.items()}
    share = (seconds["norm"] + 0.02 * seconds["comparison"]) / seconds["round"]
    print({name: round(value, 4) for name, value in seconds.items()}, f"of a round: {share:.2%}")
dist.destroy_process_group()
