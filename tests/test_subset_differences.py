"""SIMPLE-F and SIMPLE-B against their formulas, enumeration, and the published toy."""

import itertools

import numpy as np
import pytest
import torch

from topkbench.methods import Simple, SimpleB, SimpleF, Step
from topkbench.methods.noises import sum_of_gammas
from topkbench.operators import hard_mask, subset
from topkbench.randomness import Normals

N, K, TEMPERATURE, STRENGTH = 5, 2, 0.7, 1.3


def states(n, k):
    picks = torch.tensor(list(itertools.combinations(range(n), k)))
    return torch.zeros(len(picks), n, dtype=torch.float64).scatter(1, picks, 1)


def step_of(scores, loss, k=K, seed=0):
    """Rows of scores (B, n) as one replicate."""
    scores = scores[None]
    W, x = scores.new_zeros(1, scores.shape[-1], 3), scores.new_zeros(1, scores.shape[1], 3)
    noise = Normals([seed], dtype=scores.dtype)
    return Step(W, x, scores, k, "mask", lambda part: loss(part, scores), noise)


def enumerated_marginals(s, k, temperature):
    z = states(s.shape[-1], k)
    return (s @ z.T / temperature).softmax(-1) @ z


A, B = torch.randn(2, N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def wild(mask, scores):
    return ((mask * scores) @ B).square().sum(-1) + (mask @ A[0]).exp()


def slopes(z, scores):
    """What flows to the mask, and what flows to the scores beside it."""
    z, scores = z.detach().requires_grad_(), scores.detach().requires_grad_()
    return torch.autograd.grad(wild(z, scores).sum(), (z, scores))


def test_simple_f_is_the_difference_of_two_draws():
    scores, noise = (
        torch.randn(6, N, dtype=torch.float64, requires_grad=True),
        Normals([0], dtype=torch.float64),
    )
    loss = SimpleF(TEMPERATURE, STRENGTH)(step_of(scores, wild))[0]
    s = scores.detach()
    z = subset.sample(s, K, TEMPERATURE, noise("subset", 6, N - 1, law="uniform")[0])
    g, beside = slopes(z, s)
    uniforms = noise("target", 6, N - 1, law="uniform")[0]
    moved = subset.sample(s - STRENGTH * g, K, TEMPERATURE, uniforms)
    torch.testing.assert_close(loss.detach(), wild(z, s))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), scores)[0], beside + (z - moved) / STRENGTH)


def test_simple_b_is_the_difference_of_marginals():
    scores = torch.randn(6, N, dtype=torch.float64, requires_grad=True)
    loss = SimpleB(TEMPERATURE, STRENGTH)(step_of(scores, wild))[0]
    s = scores.detach()
    noise = sum_of_gammas(step_of(scores, wild), "perturbation", 6, N)[0]
    z = hard_mask(s / TEMPERATURE + noise, K)
    g, beside = slopes(z, s)
    mean, target = (enumerated_marginals(at, K, TEMPERATURE) for at in (s, s - STRENGTH * g))
    torch.testing.assert_close(loss.detach(), wild(z, s))
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), scores)[0], beside + (mean - target) / STRENGTH
    )


def test_mean_of_simple_f_by_enumeration():
    """`(mu(s) - E mu(s - lambda g(z))) / lambda`, and the gradient beside it."""
    s = torch.randn(N, dtype=torch.float64)
    z = states(N, K)
    p = (z @ s / TEMPERATURE).softmax(0)
    g, beside = slopes(z, s.expand(len(z), N))
    target = enumerated_marginals(s - STRENGTH * g, K, TEMPERATURE)
    expected = p @ beside + (p @ z - p @ target) / STRENGTH
    many = 40_000
    scores = s.expand(many, N).clone().requires_grad_()
    gradients = torch.autograd.grad(SimpleF(TEMPERATURE, STRENGTH)(step_of(scores, wild)).sum(), scores)[0]
    error = gradients.std(0) / many**0.5
    assert ((gradients.mean(0) - expected) / error).abs().max() < 4
    assert ((gradients.mean(0) - 1.1 * expected) / error).abs().max() > 4


def test_a_short_step_is_simple():
    """For lambda to 0, the covariance times the slope: that of SIMPLE at the same mask."""
    scores = torch.randn(6, N, dtype=torch.float64, requires_grad=True)
    step = step_of(scores, lambda mask, _: mask @ A[0])  # linear: the slope is the same at every mask
    short = torch.autograd.grad(SimpleB(TEMPERATURE, 1e-5)(step).sum(), scores)[0]
    exact = torch.autograd.grad(Simple(TEMPERATURE)(step_of(scores, lambda m, _: m @ A[0])).sum(), scores)[0]
    torch.testing.assert_close(short, exact, rtol=1e-4, atol=1e-5)


# The published toy: 10 scores, 5 taken, the loss |z - b|^2, lambda = 2.5

SEEDS = [1234, 1067, 9198, 9453, 6240, 7044, 1755, 7898, 3131, 1277]
# Bias: 1 - cos of the mean gradient and the true one. Variance: of the cosine of a gradient and the mean one.
# Error: the mean of 1 - cos of a gradient and the true one.
PUBLISHED = {SimpleF: (0.290, 0.0754, 0.678), SimpleB: (0.373, 0.0064, 0.417)}


def toy(seed):
    generator = np.random.RandomState(seed)
    return torch.from_numpy(generator.randn(10)), torch.from_numpy(generator.randn(10)).abs()


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_published_toy(method):
    outcomes = []
    for seed in SEEDS:
        theta, b = toy(seed)
        many = theta.expand(4000, 10).clone().requires_grad_()
        step = step_of(many, lambda mask, _, b=b: (mask - b).square().sum(-1), k=5, seed=seed)
        estimates = torch.autograd.grad(method()(step).sum(), many)[0]
        z = states(10, 5)
        p, f = (z @ theta).softmax(0), (z - b).square().sum(-1)
        truth = (p * f) @ (z - p @ z)
        of_truth = torch.cosine_similarity(estimates, truth, dim=-1)
        mean = estimates.mean(0)
        of_mean = torch.cosine_similarity(estimates, mean, dim=-1)
        outcomes.append([1 - torch.cosine_similarity(mean, truth, dim=0), of_mean.var(), 1 - of_truth.mean()])
    measured = torch.tensor(outcomes).mean(0).tolist()
    assert measured == pytest.approx(PUBLISHED[method], rel=0.05)


# What every method must do


@pytest.mark.parametrize("method", [SimpleF(), SimpleB()])
def test_value_alone_is_the_same(method):
    for dtype in (torch.float32, torch.float64):
        scores = torch.randn(6, N, dtype=dtype)
        value = method(step_of(scores.clone().requires_grad_(), lambda mask, s: mask[..., 0] * s[..., 1]))
        with torch.no_grad():
            alone = method(step_of(scores, lambda mask, s: mask[..., 0] * s[..., 1]))
        torch.testing.assert_close(alone, value.detach())
        assert value.dtype == dtype


def test_a_gradient_of_zero_moves_nothing():
    scores = torch.randn(6, N, dtype=torch.float64, requires_grad=True)
    grad = torch.autograd.grad(SimpleB()(step_of(scores, lambda mask, _: 0 * mask.sum(-1))).sum(), scores)[0]
    assert torch.equal(grad, torch.zeros_like(grad))
    many = scores[:1].detach().expand(20_000, N).clone().requires_grad_()
    grad = torch.autograd.grad(SimpleF()(step_of(many, lambda mask, _: 0 * mask.sum(-1))).sum(), many)[0]
    assert (grad.mean(0) / (grad.std(0) / 20_000**0.5)).abs().max() < 4  # two draws of one law: 0 in the mean


@pytest.mark.parametrize("method", [SimpleF, SimpleB])
def test_bad_arguments_are_refused(method):
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got nan"):
        method(float("nan"))
    with pytest.raises(ValueError, match="strength must be > 0 and finite, got 0"):
        method(strength=0.0)
    scores = torch.zeros(1, 2, N)
    W, x = torch.zeros(1, N, 3), torch.zeros(1, 2, 3)
    step = Step(W, x, scores, K, "values", lambda values: values.sum(-1), Normals([0]))
    with pytest.raises(ValueError, match="needs a task whose loss is a function of the mask, not of values"):
        method()(step)
