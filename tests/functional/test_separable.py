"""The separable form equals the plain one: all kinds of shapes, blocks, inputs, updates and thread counts."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_lopt import AdaMLP, BlendedNesterov, LearnedOptimizer
from lightning_lopt.functional import ada, blocks, learned, plain
from lightning_lopt.functional.damping import FORGET, GROWTH
from lightning_lopt.functional.features import ALL_KINDS
from lightning_lopt.functional.orthogonal import orthogonalise
from lightning_lopt.functional.updates import FORMER_UPDATES, UPDATES, PublishedUpdate
from lightning_lopt.functional.whitening import update_grams, whiten

SHAPES = {
    "scalar": (),
    "one": (1,),
    "vector": (13,),
    "matrix": (5, 7),
    "tall": (11, 3),
    "square": (6, 6),
    "flat": (1, 9),
    "conv": (8, 4, 3, 3),
    "depthwise": (10, 1, 3, 3),
    "patches": (4, 3, 8, 8),
    "three": (3, 5, 2),
}


def steps(form, shape, network: AdaMLP, num_particles=1, num_steps=3, dtype=torch.float64):
    """Parameters and accumulators after some steps on random pseudo-gradients."""
    generator = torch.Generator().manual_seed(0)

    def rand(*size):
        return torch.randn(size, generator=generator, dtype=dtype)

    named = {name: p.detach().to(dtype) + 0.1 * rand(num_particles, *p.shape) for name, p in network.named_parameters()}
    theta = network.to(dtype).functional(named)
    param = rand(num_particles, *shape)
    state = theta.update.init_state(shape, num_particles, dtype, param.device)
    for t in range(num_steps):
        workers = rand(num_particles, theta.num_inputs, *shape)
        rounds = torch.arange(num_particles) + t
        damping = torch.rand(num_particles, generator=generator, dtype=dtype)
        retained = torch.rand(num_particles, generator=generator, dtype=dtype)
        form(param, workers.mean(1), state, theta, rounds, workers if theta.num_inputs > 1 else None, damping, retained)
    return param, state


def assert_same(network, shape, **kwargs):
    (ours, our_state), (theirs, their_state) = (steps(form.step, shape, network, **kwargs) for form in (learned, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    torch.testing.assert_close(vars(our_state), vars(their_state), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_separable_equals_plain(shape, update):
    assert_same(AdaMLP(seed=0, step_mult=0.1, exp_mult=0.1, update=update), shape, num_particles=3)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_separable_equals_plain_with_worker_inputs(shape):
    assert_same(AdaMLP(inputs=4, seed=0, step_mult=0.1), shape, num_particles=2)


class GradUpdate(PublishedUpdate):
    """A multiple of the pseudo-gradient, which is the only form of the base step, and a correction."""

    def block_sums(self, grad, momentum, decays):
        return [grad.flatten(1).square().sum(1, keepdim=True)]

    def base_forms(self, grad, state, decays, factors, like):
        return grad.clone()

    def step(self, output, base):
        correction, gate = output.split(1, dim=1)
        return gate.exp() * base.forms + base.rms * correction


class TensorUpdate(PublishedUpdate):
    """The published update with features of the whole tensor, without a base step."""

    feature_kinds = ALL_KINDS

    def block_sums(self, grad, momentum, decays):
        products = torch.cat([grad, momentum], 1).mul(grad).flatten(2).sum(2)
        return [torch.zeros_like(products[:, :1]), products]


@pytest.mark.parametrize("update", [GradUpdate(), TensorUpdate()], ids=["base step", "tensor features"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_rule_of_ones_own_may_choose_each_part_by_itself(monkeypatch, shape, update):
    monkeypatch.setitem(UPDATES, "own", update)
    monkeypatch.setitem(learned.BLOCK_SIZE, "cpu", 40)
    assert_same(AdaMLP(seed=0, step_mult=0.1, exp_mult=0.1, update="own"), shape, num_particles=2)


@pytest.mark.parametrize("size", [1, 2, 5, 7, 12, 40])
@pytest.mark.parametrize("shape", [(13,), (5, 7), (7, 5), (8, 4, 3, 3), (3, 5, 2)], ids=str)
def test_every_block_boundary(monkeypatch, shape, size):
    monkeypatch.setitem(learned.BLOCK_SIZE, "cpu", 64 * size)
    assert_same(AdaMLP(seed=0, step_mult=0.1, update="blended_nesterov"), shape)


@pytest.mark.parametrize("size", [1, 3, 10, 29, 100])
def test_blocks_of_the_factored_sums_do_not_matter(monkeypatch, size):
    factors = ada.factoring((6, 4, 3, 3))
    grad = factors.matrices(torch.randn(2, 6, 4, 3, 3, dtype=torch.float64))
    whole = ada.factored_sums(grad, factors)
    monkeypatch.setattr(ada, "SUM_BLOCK", size)
    torch.testing.assert_close(ada.factored_sums(grad, factors), whole, rtol=1e-14, atol=0)
    torch.testing.assert_close(whole[0].sum(-1), grad.square().sum((1, 3, 4)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3, 3)], ids=str)
def test_empty_tensors_are_left_alone(shape):
    param, _ = steps(learned.step, shape, AdaMLP(seed=0))
    assert param.shape == (1, *shape)


def test_means_over_a_tensor_do_not_depend_on_the_number_of_threads():
    threads, state = torch.get_num_threads(), ada.AdaState.zeros((130_001,), 1, torch.float32, torch.device("cpu"))
    for seed in range(8):
        state.row.copy_(torch.rand(state.row.shape, generator=torch.Generator().manual_seed(seed)))
        results = []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append([ada.row_means(state), *ada.epsilons(state, relative=True)[:3]])
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        torch.testing.assert_close(results[0][0], state.row.double().mean((2, 3)).float())


@pytest.mark.parametrize("update", sorted(UPDATES.keys() - FORMER_UPDATES.values()))
@pytest.mark.parametrize(
    "shape", [(120, 500), (130_000,), (1, 130_000), (90_000, 2), (40, 30, 7, 7), (300, 96)], ids=str
)
def test_the_number_of_threads_does_not_matter(shape, update):
    network, threads, results = AdaMLP(seed=0, update=update), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(steps(learned.step, shape, network, num_steps=2, dtype=torch.float32))
    finally:
        torch.set_num_threads(threads)
    (one, one_state), (two, two_state) = results
    assert torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(vars(one_state).values(), vars(two_state).values(), strict=True))


def test_one_thread_for_all_but_the_jobs():
    threads, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        with blocks.one_thread():
            assert torch.get_num_threads() == 1
            blocks.in_threads(lambda jobs: seen.append(len(jobs)) or [], range(8), torch.device("cpu"))
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == [4, 4]


def test_the_number_of_threads_is_restored():
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        blocks.in_threads(lambda jobs: [1 / job for job in jobs], range(100), torch.device("cpu"))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("size", [1, 4, 7, 30, 1000])
def test_blocks_cover_each_element_once(size):
    grid = (3, 4, 5)
    block = blocks.block_shape(grid, size)
    assert math.prod(block) <= size
    ones = torch.zeros(1, 1, *grid)
    for view in blocks.split_blocks(ones, grid, block):
        view += 1
    assert bool((ones == 1).all())


def with_network(params, lr, momentum, blend):
    return LearnedOptimizer(params, AdaMLP.base_step(lr, momentum, blend))


@pytest.mark.parametrize("make", [with_network, BlendedNesterov])
@pytest.mark.parametrize("shape", [(7,), (5, 6), (6, 5), (4, 3, 3, 3)], ids=str)
def test_a_network_whose_output_is_zero_takes_the_base_step(shape, make):
    """A mean of Nesterov momentum, its polar factor and its whitened form.

    The momentum is over about the last half of the rounds, then exponential, and shrinks with the pseudo-gradient.
    Coordinates without pseudo-gradient stay.
    """
    param, mean = torch.nn.Parameter(torch.zeros(shape)), torch.zeros(shape)
    outer = make([param], lr=0.5, momentum=0.6, blend=(0.2, 0.3, 0.5))
    grams = ada.AdaState.zeros(shape, 1, param.dtype, param.device, grams=True)
    norm, limit = torch.tensor(1.0), 0.0
    for t, share in enumerate((1.0, 2 / 3, 0.5, 0.4, 0.4, 0.4)):
        param.grad = torch.randn(shape)
        param.grad.view(-1)[1::4] = 0
        kept = min(1.0, limit / float(param.grad.norm())) if limit else 1.0
        if t:
            limit = max(GROWTH * kept * float(param.grad.norm()), FORGET * limit)
        grad = kept**2 * param.grad
        mean, norm = mean * min(1, grad.norm() / norm), grad.norm()
        before = param.detach().clone()
        outer.step()
        mean.lerp_(grad, share)
        step, wanted = before - param.detach(), grad + (1 - share) / share * mean
        update_grams(grams, grad.unsqueeze(0))
        whitened, orthogonal = whiten(wanted.unsqueeze(0), grams)[0], wanted
        if len(shape) > 1:
            orthogonal = orthogonalise(wanted.unsqueeze(0))[0]
        blend = 0.2 * wanted + 0.3 * orthogonal + 0.5 * whitened
        torch.testing.assert_close(step, 0.5 * torch.where(wanted == 0, 0, blend))


@pytest.mark.parametrize("scale", [1e-6, 1e3])
@pytest.mark.parametrize("shape", [(7,), (5, 6), (4, 3, 3, 3)], ids=str)
def test_relative_updates_do_not_depend_on_the_scale(shape, scale):
    network = AdaMLP(update="blended_nesterov", step_mult=0.1, exp_mult=0.1, seed=0).double().functional()
    params = []
    for factor in (1.0, scale):
        generator = torch.Generator().manual_seed(0)
        param = factor * torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        state = ada.AdaState.zeros(shape, 1, torch.float64, param.device, grams=True)
        for t in range(4):
            grad = factor * torch.randn(1, *shape, generator=generator, dtype=torch.float64)
            learned.step(param, grad, state, network, torch.tensor([t]))
        params.append(param / factor)
    torch.testing.assert_close(*params, rtol=1e-7, atol=0)
