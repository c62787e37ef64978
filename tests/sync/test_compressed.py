"""Compressed means on real processes: nothing is lost for good, and few bytes travel."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt.comm import Communicator
from lightning_lopt.functional.compression import BF16, Int8, TopK
from lightning_lopt.sync.compressed import compressed_mean
from tests.processes import run_cases

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
    values, mean, residuals, workers, _ = zip(*means[f"{codec} {gather}"], strict=True)
    assert all(torch.equal(other, mean[0]) for other in mean)
    whole = mean[0] + torch.stack(residuals).mean(0)
    torch.testing.assert_close(whole, torch.stack(values).mean(0), rtol=0, atol=1e-6)
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


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_fewer_coordinates_than_workers(means, codec):
    assert all(len(mean) == 2 for _, mean, *_ in means[f"{codec} few"])
