"""Compressed means on real processes: nothing is lost for good, and few bytes travel."""

from __future__ import annotations

import pytest
import torch

from lightning_lopt.comm import Communicator
from lightning_lopt.compression import BF16, Int8, TopK
from lightning_lopt.exchange import Background, compressed_mean
from tests.processes import run_workers

SIZES = [700, 0, 1, 299]
CODECS = [BF16(), Int8(), TopK(0.05)]


def _mean(rank, codec, gather, sizes):
    comm = Communicator()
    values = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(rank))
    return values, *compressed_mean(comm, values, sizes, codec, gather=gather), comm.bytes_sent


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_the_mean_and_the_mean_residual_are_the_mean(codec, gather):
    results = run_workers(_mean, 3, codec, gather, SIZES)
    values, means, residuals, workers, _ = zip(*results, strict=True)
    assert all(torch.equal(mean, means[0]) for mean in means)
    whole = means[0] + torch.stack(residuals).mean(0)
    torch.testing.assert_close(whole, torch.stack(values).mean(0), rtol=0, atol=1e-6)
    if gather:
        assert torch.equal(workers[0].mean(0), means[0])
        torch.testing.assert_close(workers[1], torch.stack(values) - torch.stack(residuals), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("codec", "per_coordinate"),
    [(BF16(), 2 * 2 / 3 * 2), (Int8(), 2 * 2 / 3 * 1), (TopK(0.05), 2 * 0.05 * 6)],
    ids=str,
)
def test_bytes_sent_by_one_of_three_workers(codec, per_coordinate):
    for *_, num_bytes in run_workers(_mean, 3, codec, False, [300_000]):
        assert num_bytes == pytest.approx(300_000 * per_coordinate, rel=0.01)


def test_fewer_coordinates_than_workers():
    for codec in CODECS:
        results = run_workers(_mean, 3, codec, False, [1, 1])
        assert all(len(mean) == 2 for _, mean, *_ in results)


def test_what_is_raised_in_the_background_is_raised_at_the_wait():
    def fail():
        raise ValueError("in the background")

    with pytest.raises(ValueError, match="in the background"):
        Background(fail, torch.device("cpu")).wait()
