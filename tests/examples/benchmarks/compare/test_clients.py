"""Clients: the data that a worker sees."""

from __future__ import annotations

import pytest
import torch

from examples.benchmarks.compare.clients import Clients
from lightning_lopt.meta import ImageMLP


def make(num_clients=6, alpha=0.1, num_workers=3) -> Clients:
    """Make clients whose images hold their own index, which identifies the owner."""
    labels = torch.arange(400) % 4
    task = ImageMLP(torch.arange(400.0).view(400, 1), labels, hidden=(), batch_size=5)
    return Clients(task, num_clients, alpha, num_workers)


def test_a_worker_sees_one_client_in_a_round_and_others_in_the_next():
    clients, generator = make(), torch.Generator().manual_seed(0)
    owner = torch.full((400,), -1)
    ends = clients.starts + clients.choices + 4
    for client, (start, end) in enumerate(zip(clients.starts, ends, strict=True)):
        owner[clients.task.data[0][start:end, 0].long()] = client
    seen = set()
    for _ in range(30):
        images, _ = clients.task.read(clients.draw(4, 3, generator).flatten())
        owners = owner[images.long()].view(4, 3, 5)
        assert (owners >= 0).all()
        assert (owners == owners[:1, :, :1]).all()
        assert len(set(owners[0, :, 0].tolist())) == 3
        seen |= set(owners[0, :, 0].tolist())
    assert len(seen) == len(clients.starts)


def test_a_small_alpha_is_uneven_and_a_large_one_is_not():
    def largest_share(alpha: float) -> float:
        clients = make(alpha=alpha)
        shares = []
        for start, choices in zip(clients.starts, clients.choices, strict=True):
            counts = clients.task.data[1][start : start + choices + 4].bincount(minlength=4)
            shares.append((counts.max() / counts.sum()).item())
        return sum(shares) / len(shares)

    assert largest_share(0.1) > 0.6
    assert largest_share(1000.0) < 0.4


def test_labels_stay_with_their_images_and_the_sample_is_of_everyone():
    clients = make()
    images, labels = clients.task.data
    assert torch.equal(images[:, 0].long() % 4, labels)
    assert len(set(clients.whole.data[1][:40].tolist())) == 4


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="num_clients must be at least 1"):
        make(num_clients=0)
    with pytest.raises(ValueError, match=r"Only [12] clients have a batch of 5 examples, fewer than 3 workers"):
        make(num_clients=2)
