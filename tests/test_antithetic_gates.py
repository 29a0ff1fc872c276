"""ARMS: by enumeration of what the noise can do to all masks at once, against DisARM, on its authors' toy."""

import itertools
import math

import numpy as np
import pytest
import torch
from gates import TEMPERATURE, K, close, expected_loss, given, rows, step_on, wild
from scipy.stats import multivariate_normal, norm
from torch.func import grad

import topkbench.methods.antithetic_gates as antithetic
import topkbench.methods.bernoulli_gates as bernoulli
from topkbench.methods import ARMS, DisARM, ScoreFunction
from topkbench.operators import entropic

COPULAS = ["dirichlet", "gaussian"]


def all_rare(copula, q, samples, count):
    """The chance that a gate is in the rarer of its states, of chance q, in `count` given masks."""
    if copula == "dirichlet":  # d_m > c for each: the rest of the simplex is one of edge 1 - count c
        return max(1 - count * (1 - q ** (1 / (samples - 1))), 0) ** (samples - 1)
    if samples == 2:
        return (1, q, max(2 * q - 1, 0))[count]
    pair = multivariate_normal([0, 0], [[1, -1 / 2], [-1 / 2, 1]])
    # Three normals that sum to 0 are not all below a number < 0.
    return (1, q, float(pair.cdf([norm.ppf(q)] * 2)), 0)[count]


def draw_of(copula, q, samples, rare):
    """Noise of one gate such that it is in its rarer state in these masks and no others."""
    count = sum(rare)
    if copula == "dirichlet":
        few = 1e-3 if 0 < count < samples else 0
        return [(1 - few) / count if r else (few or 1) / (samples - count) for r in rare]
    low = (norm.ppf(q) - 1e-3) if count else 0.0
    size = math.sqrt((samples - 1) / samples)
    return [size * (low if r else -low * count / (samples - count)) for r in rare]


def noises(p, copula, samples):
    """Everything that the noise can do: draws `(samples, outcomes, n)` and their chances."""
    draws, chances = [], []
    for q in torch.minimum(p, 1 - p).tolist():
        here = []
        for rare in itertools.product([False, True], repeat=samples):
            m = sum(rare)
            chance = sum(
                (-1) ** j * math.comb(samples - m, j) * all_rare(copula, q, samples, m + j)
                for j in range(samples - m + 1)
            )
            if chance > 1e-13:
                here.append((draw_of(copula, q, samples, rare), chance))
        draws.append([draw for draw, _ in here])
        chances.append([chance for _, chance in here])
    every = np.array(list(itertools.product(*draws))).transpose(2, 0, 1)
    return torch.tensor(every), torch.tensor(list(itertools.product(*chances)), dtype=torch.float64).prod(-1)


def gradients(method, scores, draws, loss=wild, k=K):
    """One for each outcome of the noise, and the value of each."""
    each = scores.expand(draws.shape[1], -1).clone().requires_grad_()
    value = method(step_on(each, loss, k=k, noise=lambda *_, **__: draws[None]))[0]
    return torch.autograd.grad(value.sum(), each)[0], value.detach()


@pytest.mark.parametrize(("n", "k"), [(2, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("copula", COPULAS)
def test_unbiased(copula, samples, n, k):
    scores = rows(n, seed=4)
    draws, chance = noises(entropic(scores, k, TEMPERATURE), copula, samples)
    g, value = gradients(ARMS(TEMPERATURE, samples, copula), scores, draws, k=k)
    assert chance.sum().item() == pytest.approx(1, abs=1e-12)
    # SciPy's bivariate cdf is good to 1e-8.
    tol = 1e-10 if copula == "dirichlet" or samples == 2 else 1e-5
    close((chance * value).sum(), expected_loss(scores, k), tol)
    close((chance[:, None] * g).sum(0), grad(expected_loss)(scores, k), tol)


@pytest.mark.parametrize("spread_out", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("samples", [4, 6])
def test_unbiased_with_more(samples, spread_out):
    """Where two of the masks can both have the rarer state, and where they cannot."""
    scores = spread_out * rows(2, seed=4)
    draws, chance = noises(entropic(scores, 1, TEMPERATURE), "dirichlet", samples)
    g, _ = gradients(ARMS(TEMPERATURE, samples), scores, draws, k=1)
    close((chance[:, None] * g).sum(0), grad(expected_loss)(scores, 1))


@pytest.mark.parametrize("copula", COPULAS)
@pytest.mark.parametrize("samples", [2, 5])
def test_draws_come_from_the_noise(copula, samples):
    """The mean of many real draws is the gradient, within 4 standard errors; 1.2 times it is not."""
    scores = rows(3, seed=4)
    each = scores.expand(40_000, 3).clone().requires_grad_()
    method = ARMS(TEMPERATURE, samples, copula)
    g = torch.autograd.grad(method(step_on(each, wild)).sum(), each)[0]
    truth, error = grad(expected_loss)(scores), g.std(0) / len(each) ** 0.5
    assert ((g.mean(0) - truth) / error).abs().max() < 4
    assert ((g.mean(0) - 1.2 * truth) / error).abs().max() > 4


@pytest.mark.parametrize("copula", COPULAS)
def test_two_are_disarm_draw_for_draw(copula):
    scores = rows(500, 4)
    p = entropic(scores, K, TEMPERATURE)
    if copula == "dirichlet":
        draws = rows(2, 500, 4, seed=5).exp()
        u = 1 - draws[0] / draws.sum(0)
    else:
        draws = rows(2, 500, 4, seed=5)
        u = torch.special.ndtr((draws[0] - draws[1]) / 2**0.5)
    found = []
    for method, noise in (
        (ARMS(TEMPERATURE, 2, copula), lambda *_, **__: draws[None]),
        (DisARM(TEMPERATURE), given(torch.where(p < 0.5, 1 - u, u))),
    ):
        leaf = scores.clone().requires_grad_()
        value = method(step_on(leaf, wild, noise=noise))
        found += [value.detach(), torch.autograd.grad(value.sum(), leaf)[0]]
    close(found[0], found[2])
    close(found[1], found[3])
    assert (found[1] != 0).any(-1).double().mean() > 0.5


# The toy of the published script: (z - .49)^2 of one gate


def toy(mask, _):
    return (mask[..., 0] - 0.49).square()


def logit(p):
    return torch.tensor([math.log(p / (1 - p))], dtype=torch.float64)


def free(monkeypatch):
    """The log-odds are the scores."""
    for module in (antithetic, bernoulli):
        monkeypatch.setattr(module, "levels", lambda scores, *_: scores)


PUBLISHED = {  # variance at p = .1, .3, .5 of 200,000 draws
    ("dirichlet", 2): (1.30e-5, 1.18e-5, 0.0),
    ("dirichlet", 10): (1.13e-6, 5.2e-7, 1.3e-7),
    ("gaussian", 10): (1.7e-6, 6.9e-7, 6.7e-8),
}


@pytest.mark.parametrize(("p", "column"), [(0.1, 0), (0.3, 1), (0.5, 2)])
@pytest.mark.parametrize(("copula", "samples"), PUBLISHED)
def test_the_toy_has_the_published_variance(copula, samples, p, column, monkeypatch):
    """To the digits given, and 5 standard errors of the variance of either's draws."""
    free(monkeypatch)
    each = logit(p).expand(100_000, 1).clone().requires_grad_()
    value = ARMS(1.0, samples, copula)(step_on(each, toy, k=1))
    g = torch.autograd.grad(value.sum(), each)[0][:, 0]
    squares = (g - g.mean()).square()
    error = squares.std() * (1 / len(g) + 1 / 200_000) ** 0.5
    published = PUBLISHED[copula, samples][column]
    digit = 10.0 ** (math.floor(math.log10(published)) - 1) if published else 1e-12
    assert abs(squares.mean() - published) < digit + 5 * error
    assert (g.mean() - (1 - 2 * 0.49) * p * (1 - p)).abs() <= 5 * g.std() / len(g) ** 0.5 + 1e-12


def spread(g, chance):
    mean = (chance * g).sum()
    return (chance * (g - mean).square()).sum().item()


def of_arms(p, samples):
    draws, chance = noises(torch.tensor([p], dtype=torch.float64), "dirichlet", samples)
    return spread(gradients(ARMS(1.0, samples), logit(p), draws, toy, 1)[0][:, 0], chance)


def of_disarm(p, samples):
    """samples / 2 pairs: two pieces of (0, 1), each at once in both of what a pair does."""
    cuts = sorted({0.0, p, 1 - p, 1.0})
    middle = torch.tensor([[(a + b) / 2] for a, b in itertools.pairwise(cuts)], dtype=torch.float64)
    chance = torch.tensor(np.diff(cuts))
    each = logit(p).expand(len(middle), 1).clone().requires_grad_()
    value = DisARM()(step_on(each, toy, k=1, noise=given(middle)))
    return spread(torch.autograd.grad(value.sum(), each)[0][:, 0], chance) / (samples // 2)


def of_loorf(p, samples):
    """One of two scores drawn: a gate whose log-odds are their difference."""
    seen = []
    draws = torch.tensor(list(itertools.product([1e-9, 1 - 1e-9], repeat=samples)), dtype=torch.float64).T[
        ..., None
    ]
    each = (
        torch.cat([logit(p), torch.zeros(1, dtype=torch.float64)])
        .expand(2**samples, 2)
        .clone()
        .requires_grad_()
    )
    method = ScoreFunction("conditional_poisson", samples, "leave_one_out")
    step = step_on(each, lambda m, _: (seen.append(m), toy(m, _))[1], k=1, noise=lambda *_, **__: draws[None])
    g = torch.autograd.grad(method(step).sum(), each)[0][:, 0]
    opened = seen[0][:, 0, :, 0].sum(0)
    assert sorted(opened.tolist()) == sorted(d.sum().item() for d in (draws[..., 0] > 0.5).double().T)
    return spread(g, p**opened * (1 - p) ** (samples - opened))


@pytest.mark.parametrize("samples", [2, 4, 6, 8, 10])
def test_the_toy_is_reproduced(samples, monkeypatch):
    """ARMS-D is below LOORF at every p and N, DisARM's at N = 2; DisARM has no variance at p = 1/2."""
    free(monkeypatch)
    for p in (0.02, 0.1, 0.25, 0.3, 0.45, 0.5, 0.55, 0.7, 0.9, 0.98):
        arms, loorf, disarm = (of(p, samples) for of in (of_arms, of_loorf, of_disarm))
        assert arms < loorf
        if samples == 2:
            assert arms == pytest.approx(disarm, abs=1e-15)
    assert of_disarm(0.5, samples) < 1e-30
    for p, expected in ((0.1, 2.4e-6), (0.3, 1.75e-6), (0.5, 5.6e-7)) if samples == 10 else ():
        assert of_loorf(p, 10) == pytest.approx(expected, rel=0.03)


# What is drawn, and what is refused


@pytest.mark.parametrize("copula", COPULAS)
def test_extreme_levels(copula):
    """Finite, and the correction tends to 1, where a state has a chance that rounds to 0."""
    for dtype in (torch.float32, torch.float64):
        for samples in (2, 3, 30):
            for row in ([1e4, -1e4, 0.0, 1.0], [torch.inf, 1.0, 0.5, -torch.inf], [1.0, 1.0, 1.0, 1.0]):
                scores = torch.tensor([row] * 20, dtype=dtype, requires_grad=True)
                for k in (1, 2, 3, 4):
                    method = ARMS(1.0, samples, copula)
                    value = method(step_on(scores, lambda m, _: m.square().sum(-1), k=k))
                    g = torch.autograd.grad(value.sum(), scores)[0]
                    assert value.isfinite().all()
                    assert g.isfinite().all()


@pytest.mark.parametrize("samples", [3, 4, 10, 50])
def test_the_correction_of_the_normal_law_is_that_of_scipy(samples):
    a = torch.tensor([-30.0, -9.0, -2.0, -0.1, 0.0, 0.5, 4.0], dtype=torch.float64)
    q = norm.cdf(norm.ppf(1 / (1 + np.exp(a.abs().numpy()))))
    pair = multivariate_normal([0, 0], [[1, -1 / (samples - 1)], [-1 / (samples - 1), 1]])
    both = pair.cdf(np.stack([norm.ppf(q)] * 2, -1))
    close(antithetic._of_gaussian(a, samples), q * (1 - q) / (q - both), 1e-6)


def test_bad_arguments_are_refused():
    for make, message in (
        (lambda: ARMS(0.0), "temperature must be > 0 and finite, got 0"),
        (lambda: ARMS(samples=1), "samples must be >= 2, got 1"),
        (
            lambda: ARMS(copula="clayton"),
            "must be one of dirichlet, gaussian, got clayton|parameter 'copula'",
        ),
    ):
        # Where signatures are checked as well, a wrong word is refused by that text.
        with pytest.raises((ValueError, TypeError), match=message):
            make()
    with pytest.raises(ValueError, match="needs a task whose loss is a function of the mask, not of values"):
        ARMS()(step_on(rows(2, 4), lambda v, _: v.sum(-1), "values"))
