"""PES: golden numbers of the reference code, and the exact gradient of an unrolled scalar quadratic."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_lopt.functional import pes

SIGMA, LR, CURVATURE, START = 0.01, 0.3, 1.0, 1.0


@pytest.mark.parametrize("window", range(5))
def test_published_window_equals_the_reference(vectors, window):
    data = vectors("pes.npz")

    def read(folder):
        return {name: torch.from_numpy(data[f"window{window}/{folder}/{name}"]).double() for name in ("w", "b", "s")}

    losses = [torch.from_numpy(data[f"window{window}/loss_{sign}"]).double() for sign in ("pos", "neg")]
    mask, done = (torch.from_numpy(data[f"window{window}/{name}"]).bool() for name in ("mask", "done"))
    estimate = pes.published_pes_gradient(*losses, mask, done, read("eps"), read("acc_before"), float(data["std"]))
    for ours, folder in ((estimate.gradient, "grad"), (estimate.accumulator, "acc_after")):
        for name, wanted in read(folder).items():
            torch.testing.assert_close(ours[name], wanted, rtol=1e-9, atol=1e-12)


def test_published_estimator_equals_the_reference_end_to_end(vectors):
    data = vectors("pes.npz")
    accumulator = None
    for window in range(6):
        noise = {name: torch.from_numpy(data[f"e2e/eps{window}/{name}"]).double() for name in ("log_lr", "bias")}
        accumulator = accumulator or {name: torch.zeros_like(eps) for name, eps in noise.items()}
        losses = [torch.from_numpy(data[f"e2e/loss_{sign}{window}"]).double() for sign in ("pos", "neg")]
        mask, done = (torch.from_numpy(data[f"e2e/{name}{window}"]).bool() for name in ("mask", "done"))
        gradient, accumulator = pes.published_pes_gradient(*losses, mask, done, noise, accumulator, float(data["std"]))
        for name in noise:
            wanted = torch.from_numpy(data[f"e2e/grad{window}/{name}"]).double()
            torch.testing.assert_close(gradient[name], wanted, rtol=1e-9, atol=1e-12)
            wanted = torch.from_numpy(data[f"e2e/acc{window}/{name}"]).double()
            torch.testing.assert_close(accumulator[name], wanted, rtol=1e-9, atol=1e-12)


def test_perturbations_are_antithetic_and_follow_their_generator():
    theta = {"w": torch.ones(2, 3), "b": torch.zeros(())}
    noise, again = (pes.perturbations(theta, 4, 0.1, torch.Generator().manual_seed(1)) for _ in range(2))
    both = pes.antithetic(theta, noise)
    for name, value in theta.items():
        assert torch.equal(noise[name], again[name])
        assert both[name].shape == (8, *value.shape)
        torch.testing.assert_close(both[name][:4] + both[name][4:], 2 * value.expand(4, *value.shape))


def descend(x: torch.Tensor, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One round on ½ c x² with a learned rate: the loss before it, and the next x."""
    return 0.5 * CURVATURE * x**2, x - (LR + theta) * CURVATURE * x


def exact_gradient(length: int) -> float:
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x, total = torch.tensor(START, dtype=torch.float64), 0.0
    for _ in range(length):
        loss, x = descend(x, theta)
        total = total + loss / length
    total.backward()
    return theta.grad.item()


def estimates(length: int, truncation: int, keep: bool, num_particles: int = 4_000, windows: int = 30) -> torch.Tensor:
    """PES windows over particles that start out of phase; without `keep` the accumulators are dropped: truncated ES."""
    generator = torch.Generator().manual_seed(0)
    theta = {"rate": torch.zeros((), dtype=torch.float64)}
    age = torch.randint(length, (num_particles,), generator=generator)
    x = torch.full((2, num_particles), START, dtype=torch.float64)
    accumulator = {"rate": torch.zeros(num_particles, dtype=torch.float64)}
    means = []
    for window in range(windows):
        noise = pes.perturbations(theta, num_particles, SIGMA, generator)
        both = pes.antithetic(theta, noise)["rate"].view(2, num_particles)
        losses, done = [], []
        for _ in range(truncation):
            loss, x = descend(x, both)
            age = age + 1
            losses.append(loss)
            done.append(age >= length)
            x = torch.where(done[-1], START, x)
            age = torch.where(done[-1], 0, age)
        pos, neg = torch.stack(losses).unbind(1)
        estimate = pes.pes_gradient(pos, neg, torch.stack(done), noise, accumulator, SIGMA)
        if keep:
            accumulator = estimate.accumulator
        if window >= 2 * length // truncation:  # the cut-short first unrolls are over
            means.append(estimate.gradient["rate"])
    return torch.stack(means)


@pytest.mark.parametrize(("length", "truncation"), [(4, 2), (7, 3), (8, 4), (3, 5)])
def test_mean_is_the_exact_gradient_with_resets_inside_windows(length, truncation):
    samples = estimates(length, truncation, keep=True)
    # Windows share particles, so the error is judged from blocks of windows that hardly do.
    blocks = samples[: len(samples) // 5 * 5].view(-1, 5).mean(0)
    error = blocks.std() / len(blocks) ** 0.5
    assert abs(samples.mean() - exact_gradient(length)) < 4 * error


@pytest.mark.parametrize(("length", "truncation"), [(6, 3), (3, 5)])
def test_truncated_es_is_the_exact_gradient_of_windows_alone(length, truncation):
    """Windows from a detached state, in phase, until the pattern of ends repeats."""
    windows = math.lcm(length, truncation) // truncation
    theta, x, exact = torch.zeros((), dtype=torch.float64, requires_grad=True), torch.tensor(START).double(), 0.0
    generator, num_particles, sampled = torch.Generator().manual_seed(0), 20_000, []
    for window in range(windows):
        x, total, pair = x.detach(), torch.zeros(()), x.detach().expand(2, num_particles)
        noise = pes.perturbations({"rate": theta.detach()}, num_particles, SIGMA, generator)
        both, losses = pes.antithetic({"rate": theta.detach()}, noise)["rate"].view(2, num_particles), []
        for j in range(truncation):
            loss, x = descend(x, theta)
            pair_loss, pair = descend(pair, both)
            total = total + loss / truncation
            losses.append(pair_loss)
            if (window * truncation + j + 1) % length == 0:
                x, pair = torch.tensor(START).double(), torch.full_like(pair, START)
        exact += torch.autograd.grad(total, theta)[0].item()
        estimate = pes.truncated_es_gradient(*torch.stack(losses).unbind(1), noise, SIGMA)
        assert not estimate.accumulator["rate"].any()
        sampled.append(estimate.gradient["rate"].item())
    assert sum(sampled) == pytest.approx(exact, rel=0.02)


def test_truncated_es_without_accumulator_is_biased():
    samples = estimates(8, 4, keep=False)
    assert abs(samples.mean() / exact_gradient(8) - 1) > 0.2
