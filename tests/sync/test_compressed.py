"""Compressed means: nothing is lost for good, and few bytes travel."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_power_sgd
from torch.nn.parallel import DistributedDataParallel

from lightning_lopt import Fragments, Rounds, SyncOptions
from lightning_lopt.comm import Communicator
from lightning_lopt.compression import BF16, Int8, PowerSGD, Reduction, TopK
from lightning_lopt.sync.compressed import compressed_mean, linear_mean
from tests.processes import run_cases, run_workers
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


class _LargeOnes:
    """As many values as there are above a limit."""

    def __init__(self, sparse, limit):
        self.sparse, self.limit = sparse, limit

    def encode(self, values, sizes):
        return torch.cat([values[values > self.limit], torch.zeros(2 * sum(sizes))]).view(torch.uint8)

    def decode(self, code, sizes):
        return torch.zeros(sum(sizes))


@pytest.mark.parametrize("sparse", [False, True])
def test_codes_whose_length_depends_on_the_values_are_refused(sparse):
    model = nn.Linear(3, 2)
    make = partial(Rounds, model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    with pytest.raises(ValueError, match=r"2048 bytes for zeros and .* the length of a code must depend on the sizes"):
        make(options=SyncOptions(compression=_LargeOnes(sparse, 0.5)))
    make(options=SyncOptions(compression=_LargeOnes(sparse, -2.0)))


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


# -- linear codecs ---------------------------------------------------------------------------------------------------


class EveryOther:
    """A user's codec: every other row, the others in the next call."""

    def reduce(self, tensors, states, mean):
        firsts = [0 if state is None else int(state) for state in states]
        means, sent = ([torch.zeros_like(t) for t in tensors] for _ in range(2))
        rows = [t[first::2] for t, first in zip(tensors, firsts, strict=True)]
        for m, s, first, own, average in zip(means, sent, firsts, rows, mean(rows), strict=True):
            m[first::2], s[first::2] = average, own
        return Reduction(means, sent, [torch.tensor(1 - first) for first in firsts])


SHAPES = [(12, 18), (7,), (20, 3, 5), (2, 2), (0, 5)]
RANK = 3


NUMEL = 12 * 18 + 7 + 20 * 3 * 5 + 2 * 2


def _draws(rank, num_rounds=4):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(num_rounds, NUMEL, generator=generator, dtype=torch.float64)


def _linear(rank, make_comm, codec, left_out, scale):
    """For each round the values, the result of this worker, and its states; then the bytes sent."""
    comm, states, seen = make_comm(), [None] * len(SHAPES), []
    residual = torch.zeros(NUMEL, dtype=torch.float64)
    for draws in _draws(rank):
        values = torch.zeros_like(draws) if rank in left_out else draws + residual
        result, states = linear_mean(comm, values, SHAPES, states, codec, scale=scale)
        residual = result.residual
        seen.append((values, result, states))
    return seen, comm.bytes_sent


@pytest.mark.parametrize("left_out", [(), (1,)])
@pytest.mark.parametrize("codec", [PowerSGD(RANK), EveryOther()], ids=["PowerSGD", "own"])
def test_the_linear_mean_and_the_mean_residual_are_the_mean(codec, left_out):
    scale = 3 / (3 - len(left_out))
    workers = [seen for seen, _ in run_threads(_linear, 3, codec, left_out, scale)]
    for round_idx, seen in enumerate(zip(*workers, strict=True)):
        values, results, states = zip(*seen, strict=True)
        whole, mean = torch.stack(values).mean(0), results[0].mean
        residuals = torch.stack([result.residual for result in results])
        torch.testing.assert_close(mean + residuals.mean(0), whole, rtol=0, atol=1e-12)
        assert (mean - whole).abs().max() > 0.1, round_idx
        assert not residuals[list(left_out)].any()
        for result, own in zip(results, states, strict=True):
            assert torch.equal(result.mean, mean)
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(own, states[0], strict=True))
        kept = [k for k in range(3) if k not in left_out]
        distances = (torch.stack(values)[kept] - residuals[kept] - scale * mean).square().sum(1)
        torch.testing.assert_close(scale * torch.stack([r.spread for r in results]).mean(), distances.mean())


def test_power_sgd_is_its_formula_and_its_bytes():
    """Three workers for four rounds, against algorithms 1 and 2 of arXiv 1905.13727 in numpy."""
    runs = run_threads(_linear, 3, PowerSGD(RANK), (), 1.0)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    bases = [torch.randn(m, RANK, generator=g).double().numpy() for m, g in zip((18, 15), generators, strict=True)]
    errors = np.zeros((3, NUMEL))
    for round_idx in range(4):
        values = np.stack([_draws(k)[round_idx].numpy() for k in range(3)]) + errors
        expected, sent = values.mean(0), values.copy()
        for i, (start, n, m) in enumerate([(0, 12, 18), (12 * 18 + 7, 20, 15)]):
            place = slice(start, start + n * m)
            matrices = values[:, place].reshape(3, n, m)
            left = np.linalg.qr(np.mean([matrix @ bases[i] for matrix in matrices], 0))[0]
            rights = [matrix.T @ left for matrix in matrices]
            bases[i] = np.mean(rights, 0)
            expected[place] = (left @ bases[i].T).ravel()
            sent[:, place] = [(left @ right.T).ravel() for right in rights]
        errors = values - sent
        for rank, (seen, _) in enumerate(runs):
            np.testing.assert_allclose(seen[round_idx][1].mean.numpy(), expected, rtol=0, atol=1e-12)
            np.testing.assert_allclose(seen[round_idx][1].residual.numpy(), errors[rank], rtol=0, atol=1e-12)
    numbers = RANK * (12 + 18) + 7 + RANK * (20 + 15) + 4
    assert [num_bytes for _, num_bytes in runs] == pytest.approx([4 * 2 * 2 / 3 * 8 * numbers] * 3, abs=4)


def _torch_power_sgd(rank):
    """Means of gradients by torch's hook and by ours from the same Q, in two rounds, without error feedback."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(20, 24, bias=False).double())
    state = torch_power_sgd.PowerSGDState(None, RANK, start_powerSGD_iter=2, use_error_feedback=False)
    model.register_comm_hook(state, torch_power_sgd.powerSGD_hook)
    comm, pairs = Communicator(), []
    for step in range(5):
        factors = (torch.from_numpy(np.random.default_rng(10 * step + rank).normal(size=(24, 20))),)
        (weight,) = model.parameters()
        basis = state.q_memory_dict[0].clone() if 0 in state.q_memory_dict else None
        model(torch.eye(20, dtype=torch.float64)).T.mul(factors[0]).sum().backward()
        if basis is not None:
            reduced = PowerSGD(RANK).reduce(factors, [basis.view(20, RANK)], comm.means)
            pairs.append((reduced.means[0], weight.grad.clone()))
        weight.grad = None
    return pairs


def test_power_sgd_equals_torchs():
    for pairs in run_workers(_torch_power_sgd, 2):
        assert len(pairs) >= 2
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def _growing(rank, make_comm, model, selection):
    """Anchors and states after each step of a model in which tensors are unfrozen and added."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(rank)
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(list(model[:2].parameters()), lr=0.05)
    options = SyncOptions(compression=PowerSGD(2), selection=selection)
    rounds, seen = Rounds(model, optimizer, 2, None, comm=make_comm(), options=options), []
    for step in range(16):
        if step == 6:
            model[1].requires_grad_(True)
        if step == 10:
            optimizer.add_param_group({"params": list(model[2].parameters())})
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        rounds.step()
        parameters = list(rounds.sync.replica.parameters())
        states = [None if p.codec_state is None else p.codec_state.clone() for p in parameters]
        seen.append(([p.anchor.clone() for p in parameters], states))
    return seen


@pytest.mark.parametrize("selection", [None, Fragments(2)], ids=["everything", "fragments"])
def test_states_follow_tensors_that_come_late(selection):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 9))
    runs = run_threads(_growing, 2, model, selection)
    for (anchors, states), (others, other_states) in zip(*runs, strict=True):
        assert all(map(torch.equal, anchors, others))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(states, other_states, strict=True))
    kept = [[state is not None for state in states] for _, states in runs[0]]
    assert kept[-1] == [True, False] * 3
    assert not kept[9][2] or kept[5] == [True, False, False, False]


def _loss(rank, make_comm, models, options):
    """Loss of the global weights of a student, after 20 rounds of 4 steps, and the bytes of these rounds."""
    (teacher, model), generator = copy.deepcopy(models), torch.Generator().manual_seed(1 + rank)
    optimizer, comm = torch.optim.SGD(model.parameters(), lr=0.1), make_comm()
    rounds = Rounds(model, optimizer, 4, None, comm=comm, options=options)
    before = comm.bytes_sent
    for _ in range(80):
        x = torch.randn(16, 16, generator=generator)
        optimizer.zero_grad()
        (model(x) - teacher(x).detach()).square().mean().backward()
        optimizer.step()
        rounds.step()
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    return (model(x) - teacher(x)).square().mean().item(), comm.bytes_sent - before


def test_power_sgd_learns_about_as_fast_as_int8():
    """Without error feedback its loss would be three times as large."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)) for _ in range(2)]
    options = [SyncOptions(compression=compression) for compression in ("int8", PowerSGD(1))]
    (loss, num_bytes), (other_loss, other_bytes) = (run_threads(_loss, 2, models, option)[0] for option in options)
    assert other_loss < 1.15 * loss
    assert other_bytes < 0.85 * num_bytes


class _WrongCodec:
    sparse = False

    def __init__(self, encoded, decoded) -> None:
        self.encoded, self.decoded = encoded, decoded

    def encode(self, flat, sizes):
        return self.encoded

    def decode(self, code, sizes):
        return self.decoded


class _WrongLinear:
    def reduce(self, tensors, states, mean):
        return Reduction([t.flatten() for t in tensors], tensors, states)


@pytest.mark.parametrize(
    ("encoded", "decoded", "message"),
    [
        (torch.zeros(8), torch.zeros(4), r"encode of .* torch\.float32 \[8\]"),
        (torch.zeros(8, dtype=torch.uint8), torch.zeros(1), r"decode of .* returned \[1\]; it must be \[4\]"),
    ],
)
def test_what_a_codec_returns_wrongly_is_named(encoded, decoded, message):
    with pytest.raises(ValueError, match=message):
        compressed_mean(Communicator(), torch.ones(4), [4], _WrongCodec(encoded, decoded))
    with pytest.raises(ValueError, match="of the shapes of the tensors"):
        linear_mean(Communicator(), torch.ones(4), [(2, 2)], [None], _WrongLinear())
