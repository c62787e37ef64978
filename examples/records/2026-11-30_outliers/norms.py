"""Norms of healthy workers' pseudo-gradients: who would be left out, by the factor and by the memory of the rule."""

import math
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

ROUNDS = 600
SETTINGS = [(2, 4, False), (8, 4, False), (8, 4, True), (2, 16, False)]  # K, H, whether workers see other digits
FACTORS = (3, 5, 10, 30)
MEMORIES = {"no peak": 0.0, "0.99 per round": 0.99, "for ever": 1.0}


def train(num_workers: int, local_steps: int, unlike: bool, seed: int) -> list[list[float]]:
    """Norm of each worker's pseudo-gradient in each round of local SGD at a rate of 0.5, 16 images per step."""
    pixels, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    images = pixels.float() / 16
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    anchor = nn.utils.parameters_to_vector(model.parameters()).detach()
    own = [torch.randint(len(images), (len(images),), generator=generator) for _ in range(num_workers)]
    if unlike:
        own = list(labels.argsort().chunk(num_workers))
    norms = []
    for _ in range(ROUNDS):
        pseudo_grads = []
        for k in range(num_workers):
            nn.utils.vector_to_parameters(anchor.clone(), model.parameters())
            optimizer = torch.optim.SGD(model.parameters(), 0.5)
            for _ in range(local_steps):
                chosen = own[k][torch.randint(len(own[k]), (16,), generator=generator)]
                optimizer.zero_grad()
                F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
            pseudo_grads.append(anchor - nn.utils.parameters_to_vector(model.parameters()).detach())
        norms.append([float(g.norm()) for g in pseudo_grads])
        anchor = anchor - torch.stack(pseudo_grads).mean(0)
    return norms


def left_out(rounds: Sequence[Sequence[float]], factor: float, forget: float) -> tuple[int, float]:
    """Number of workers left out, and the largest norm as a multiple of the median that it is compared with."""
    last: list[float] = []
    peak, number, largest = 0.0, 0, 0.0
    for norms in rounds:
        now = [n for n in norms if n > 0]
        pool = sorted(now + sorted((n for n in last if n > 0), reverse=True)[: len(now)])
        median = pool[len(pool) // 2] if pool else math.inf
        limit = max(factor * median, peak)
        number, largest = number + sum(n > limit for n in norms), max(largest, max(norms) / median)
        last = [0.0 if n > limit else n for n in norms]
        peak = max(forget * peak, *last) if forget else 0.0
    return number, largest


def main() -> None:
    """Print a line per setting and seed."""
    torch.set_num_threads(1)
    for setting in SETTINGS:
        for seed in range(2):
            rounds = train(*setting, seed)
            counts = {f: [left_out(rounds, f, forget)[0] for forget in MEMORIES.values()] for f in FACTORS}
            print(*setting, seed, f"{left_out(rounds, math.inf, 0.0)[1]:.1f}", counts, flush=True)


if __name__ == "__main__":
    main()
