"""Shifted top-k, and gates with k open in the mean, one row at a time."""

import itertools
import math

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm


def shifted_topk(scores, k):
    after = np.sort(scores)[::-1][k]
    return np.array([max(s - after, 0.0) for s in scores])


def levels(scores, k, temperature, cdf):
    """`s / temperature - t` with t by bracketing."""
    u = scores / temperature
    t = brentq(lambda t: cdf(u - t).sum() - k, u.min() - 40, u.max() + 40, xtol=1e-14, rtol=1e-15)
    return u - t


def logistic(v):
    return 1 / (1 + np.exp(-v))


def hard_concrete(scores, k, temperature, uniforms, beta=2 / 3, gamma=-0.1, zeta=1.1):
    """In the letters of Louizos et al. 2018, with the location that opens k of them."""
    log_alpha = levels(scores, k, temperature, logistic) + beta * math.log(-gamma / zeta)
    s = logistic((np.log(uniforms) - np.log(1 - uniforms) + log_alpha) / beta)
    return np.minimum(1, np.maximum(0, s * (zeta - gamma) + gamma))


def stochastic_gates(scores, k, temperature, normals, sigma=0.5):
    """In the letters of Yamada et al. 2020, with the mu that opens k of them: P(z > 0) = Phi(mu / sigma)."""
    mu = sigma * levels(scores, k, temperature, norm.cdf)
    return np.maximum(0, np.minimum(1, mu + sigma * normals))


def disarm(losses, first, second, a):
    """The gradient in the log-odds a, as Dong et al. 2020 write it: b = first, b~ = second."""
    differ = first != second
    return (losses[0] - losses[1]) / 2 * (-1.0) ** second * differ * logistic(abs(a))


def rebar(loss, slope, u, a, softness, eta):
    """By the paper's z and z~ and their derivatives in a by differences, v such that the two are equal."""

    def z_of(a):
        return a + np.log(u) - np.log(1 - u)

    def z_given(a, v, b):
        theta = logistic(a)
        odds = v / (1 - v)
        return np.where(b, np.log(odds / (1 - theta) + 1), -np.log(odds / theta + 1))

    b, p, h = z_of(a) > 0, logistic(a), 1e-6
    v = np.where(b, (u - (1 - p)) / p, 1 - u / (1 - p))
    assert np.allclose(z_given(a, v, b), z_of(a))
    change = 1 - (z_given(a + h, v, b) - z_given(a - h, v, b)) / (2 * h)
    soft = logistic(z_of(a) / softness)
    score = b - p
    control = eta * slope(soft) * soft * (1 - soft) / softness * change
    return (loss(b.astype(float)) - eta * loss(soft)) * score + control


def through_threshold(g, a, temperature, density):
    w = density(a) / density(a).sum()
    return (g - w * g.sum()) / temperature


def chance_of_set(p, drawn, gone=()):
    """The chance that the first draws are those of `drawn`, in any order; those `gone` are not there."""
    total = 0.0
    for order in itertools.permutations(drawn):
        left, chance = 1 - sum(p[i] for i in gone), 1.0
        for i in order:
            chance, left = chance * p[i] / left, left - p[i]
        total += chance
    return total


def unordered_set(p, drawn, losses):
    """The weight of each loss, and the baseline of each: first and second leave-one-out ratios."""
    whole, weights, baselines = chance_of_set(p, drawn), [], []
    for s in drawn:
        others = [i for i in drawn if i != s]
        once = chance_of_set(p, others, (s,))
        weights.append(p[s] * once / whole)
        baseline = p[s] * losses[s]
        for other in others:
            rest = [i for i in others if i != other]
            baseline += p[other] * chance_of_set(p, rest, (s, other)) / once * losses[other]
        baselines.append(baseline)
    return np.array(weights), np.array(baselines)
