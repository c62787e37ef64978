"""Data of the workers: the same for all, or split among clients with unequal shares of the classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from examples.benchmarks.report import UsageError
from lightning_lopt.meta.base import DataTask


class Shared:
    """Data that all workers share.

    Args:
        task: Task with the data.

    Attributes:
        task: Task that the workers read from.
        whole: Task with the data in an order that does not depend on the workers.
    """

    def __init__(self, task: DataTask) -> None:
        self.task = self.whole = task

    def draw(self, local_steps: int, num_workers: int, generator: torch.Generator) -> Tensor:
        """Draw the positions at which the batches of a round start, [H, K]."""
        return self.task.draw(local_steps * num_workers, generator).view(local_steps, num_workers)


class Clients(Shared):
    r"""Clients whose shares of each class are drawn from a Dirichlet distribution; each round samples K of them.

    .. math:: (q_{c1}, \dots, q_{cC}) \sim \mathrm{Dir}(\alpha) \text{ for each class } c

    Clients with less than a batch of data are left out.

    Args:
        task: Task with the data, whose last tensor holds the classes.
        num_clients: Number of clients, C >= 1.
        alpha: Concentration α > 0; a small one makes unequal shares.
        num_workers: Number of clients in a round, K.
        seed: Seed of the split.

    Raises:
        ValueError: An argument is out of its range, or fewer than K clients have a batch of data.

    Source: Hsu et al. 2019 (arXiv 1909.06335).

    Example:
        >>> from lightning_lopt.meta import ImageMLP
        >>> task = ImageMLP(torch.rand(200, 3), torch.arange(200) % 4, hidden=(), batch_size=5)
        >>> clients = Clients(task, num_clients=4, alpha=0.1, num_workers=2)
        >>> clients.draw(3, 2, torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2])
    """

    def __init__(self, task: DataTask, num_clients: int, alpha: float, num_workers: int, seed: int = 0) -> None:
        if num_clients < 1 or not alpha > 0:
            raise UsageError(f"num_clients must be at least 1 and alpha positive, not {num_clients} and {alpha}.")
        generator = torch.Generator().manual_seed(seed)
        parts = _split(task.data[-1].cpu(), num_clients, alpha, generator)
        parts = [part for part in parts if len(part) >= task.batch_size]
        if len(parts) < num_workers:
            raise UsageError(
                f"Only {len(parts)} clients have a batch of {task.batch_size} examples, fewer than {num_workers} "
                "workers. Take fewer clients, a larger alpha or a smaller batch."
            )
        order = torch.cat(parts).to(task.device)
        super().__init__(task)
        self.task = task.on([tensor[order] for tensor in task.data])
        sizes = torch.tensor([len(part) for part in parts])
        self.starts = sizes.cumsum(0) - sizes
        self.choices = sizes - task.batch_size + 1

    def draw(self, local_steps: int, num_workers: int, generator: torch.Generator) -> Tensor:
        clients = torch.randperm(len(self.starts), generator=generator)[:num_workers]
        uniform = torch.rand(local_steps, num_workers, generator=generator, dtype=torch.float64)
        return self.starts[clients] + (uniform * self.choices[clients]).long()


def _split(labels: Tensor, num_clients: int, alpha: float, generator: torch.Generator) -> Sequence[Tensor]:
    """Split the examples: the indices of each client, shuffled."""
    owners = torch.empty_like(labels)
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()
        # A Dirichlet draw is a normalised one from Gamma(alpha); torch draws that from its global generator only.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            shares = torch.distributions.Dirichlet(torch.full((num_clients,), alpha, dtype=torch.float64)).sample()
        owners[own] = torch.multinomial(shares, len(own), replacement=True, generator=generator)
    shuffled = torch.randperm(len(labels), generator=generator)
    return [shuffled[owners[shuffled] == client] for client in range(num_clients)]
