"""Compressed means on real processes: nothing is lost for good, and few bytes travel."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt.comm import Communicator
from lightning_lopt.compression import BF16, Int8, TopK
from lightning_lopt.sync.compressed import compressed_mean
from tests.processes import run_cases
from tests.threads import run_threads

SIZES = [700, 0, 1, 299]
CODECS = [BF16(), Int8(), TopK(0.05)]


def _mean(rank, codec, gather, sizes):
    comm = Communicator()
    values = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(rank))
    return values, *compressed_mean(comm, values, sizes, codec, gather=gather), comm.bytes_sent


@pytest.fixture(scope="module")
def means():
    several = {f"{codec} {gather}": (codec, gather, SIZES) for codec in CODECS for gather in (False, True)}
    many = {f"{codec} many": (codec, False, [300_000]) for codec in CODECS}
    few = {f"{codec} few": (codec, False, [1, 1]) for codec in CODECS}
    return run_cases(_mean, 3, several | many | few)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_the_mean_and_the_mean_residual_are_the_mean(means, codec, gather):
    values, mean, residuals, workers, spreads, _ = zip(*means[f"{codec} {gather}"], strict=True)
    assert all(torch.equal(other, mean[0]) for other in mean)
    whole = mean[0] + torch.stack(residuals).mean(0)
    torch.testing.assert_close(whole, torch.stack(values).mean(0), rtol=0, atol=1e-6)
    if gather or codec.sparse:
        sent = torch.stack(values) - torch.stack(residuals)
        distances = (sent - mean[0]).square().sum(1)
        torch.testing.assert_close(torch.stack(spreads).mean(), distances.mean(), rtol=1e-4, atol=1e-5)
    if gather:
        assert torch.equal(workers[0].mean(0), mean[0])
        torch.testing.assert_close(workers[1], torch.stack(values) - torch.stack(residuals), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("codec", "per_coordinate"),
    [(BF16(), 2 * 2 / 3 * 2), (Int8(), 2 * 2 / 3 * 1), (TopK(0.05), 2 * 0.05 * 6)],
    ids=str,
)
def test_bytes_sent_by_one_of_three_workers(means, codec, per_coordinate):
    for *_, num_bytes in means[f"{codec} many"]:
        assert num_bytes == pytest.approx(300_000 * per_coordinate, rel=0.01)


def _scaled(rank, make_comm, codec, scale):
    """A mean of values that bfloat16 holds, and so of no first error; the last worker is left out."""
    comm = make_comm()
    values = torch.randn(9, generator=torch.Generator().manual_seed(rank)).bfloat16().float() * (rank < 2)
    return values, *compressed_mean(comm, values, [9], codec, scale=scale)


def test_the_error_of_a_scaled_mean_is_kept_as_one():
    """Bfloat16 holds the values exactly, so that the second code alone has an error, that of their mean."""
    values, mean, residuals, _, spreads = zip(*run_threads(_scaled, 3, BF16(), 1.5), strict=True)
    others = torch.stack(values[:2])
    assert (1.5 * mean[0] - others.mean(0)).abs().max() > 1e-3
    torch.testing.assert_close(1.5 * mean[0] + torch.stack(residuals).mean(0), others.mean(0), rtol=0, atol=1e-6)
    drift = 1.5 * torch.stack(spreads).mean()
    torch.testing.assert_close(drift, (others - others.mean(0)).square().sum(1).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_fewer_coordinates_than_workers(means, codec):
    assert all(len(mean) == 2 for _, mean, *_ in means[f"{codec} few"])
