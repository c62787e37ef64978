"""Norms of healthy workers' pseudo-gradients: who would be left out, by the factor and by the memory of the rule."""

import sys
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from lightning_lopt.functional import outliers
from lightning_lopt.functional.outliers import OutlierFilter

SETTINGS = [(2, 4, False), (8, 4, False), (8, 4, True), (2, 16, False)]  # K, H, whether workers see other digits
FACTORS = (3.0, 5.0, 10.0, 30.0)
FORGETS = (0.0, 0.99, 0.999, 1.0)  # factor of the peak per round: no memory of it, ..., for ever


def train(num_workers: int, local_steps: int, unlike: bool, seed: int, num_rounds: int) -> list[list[float]]:
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
    for _ in range(num_rounds):
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
    """Number of workers that the rule leaves out with these constants, and its peak over the last rounds' median."""
    outliers.FACTOR, outliers.FORGET = factor, forget
    outlier_filter = OutlierFilter()
    for norms in rounds:
        if not forget:
            outlier_filter.norms = outlier_filter.norms._replace(peak=0.0)
        outlier_filter.update(norms, outlier_filter.outliers(norms))
    last = torch.tensor(rounds[-50:]).median().item()
    return outlier_filter.num_left_out, outlier_filter.norms.peak / last


def main(num_rounds: int) -> None:
    """Print a line per setting and seed."""
    torch.set_num_threads(1)
    for setting in SETTINGS:
        for seed in range(2):
            rounds = train(*setting, seed, num_rounds)
            counts = {factor: [left_out(rounds, factor, forget)[0] for forget in FORGETS] for factor in FACTORS}
            peaks = [round(left_out(rounds, 10.0, forget)[1]) for forget in FORGETS[1:]]
            print(*setting, seed, counts, "peak / median:", peaks, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
