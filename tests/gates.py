"""What the tests of independent gates look at: a loss, a step, a noise, and all that it can be."""

import itertools

import numpy as np
import torch
from numpy.polynomial.legendre import leggauss
from torch.func import grad

from topkbench.methods import Step
from topkbench.operators import entropic
from topkbench.randomness import Normals

K, TEMPERATURE = 2, 0.7


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B = rows(4, seed=1), rows(4, 4, seed=2)


def wild(mask, scores):
    """Not linear in the mask, and of the scores as well."""
    n = mask.shape[-1]
    return (mask @ A[:n]).exp() + ((mask * scores) @ B[:n, :n] - A[:n]).square().sum(-1) * (
        mask[..., 0] - 0.3
    )


def step_on(scores, loss, wants="mask", k=K, noise=None, seed=0, memory=None):
    scores = scores[None]
    W, x = scores.new_zeros(1, scores.shape[-1], 3), scores.new_zeros(1, scores.shape[1], 3)
    noise = noise or Normals([seed], dtype=scores.dtype)
    return Step(
        W, x, scores, k, wants, lambda part: loss(part, scores), noise, {} if memory is None else memory
    )


def given(draws):
    """The noise of a step: these numbers, a row each."""
    return lambda *shape, **_: draws[None, None] if len(shape) == 4 else draws[None]


def close(actual, expected, tol=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tol, atol=tol)


def expected_loss(scores, k=K):
    """E L by enumeration of all masks."""
    n = len(scores)
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=torch.float64)
    p = entropic(scores, k, TEMPERATURE)
    chance = torch.where(masks == 1, p, 1 - p).prod(-1)
    return (chance * wild(masks, scores.expand(len(masks), n))).sum()


def nodes(p, count):
    """Quadrature in u for each gate: between the places where what is drawn changes; with weights."""
    x, w = leggauss(count)
    points, mass = [], []
    for one in p.tolist():
        ends = sorted({0.0, one, 1 - one, 1.0})
        parts = [
            (low + (high - low) * (x + 1) / 2, (high - low) * w / 2) for low, high in itertools.pairwise(ends)
        ]
        points.append(torch.from_numpy(np.concatenate([u for u, _ in parts])))
        mass.append(torch.from_numpy(np.concatenate([w for _, w in parts])))
    n = len(points)
    return torch.cartesian_prod(*points).reshape(-1, n), torch.cartesian_prod(*mass).reshape(-1, n).prod(-1)


def mean_gradient(method, n, k, count, memory=None):
    """The mean over the noise of the value and the gradient, and the gradient by enumeration."""
    scores = rows(n, seed=4)
    u, mass = nodes(entropic(scores, k, TEMPERATURE), count)
    each = scores.expand(len(u), n).clone().requires_grad_()
    surrogate = method(step_on(each, wild, k=k, noise=given(u), memory=memory))[0]
    gradient = torch.autograd.grad((mass * surrogate).sum(), each)[0].sum(0)
    return (mass * surrogate).sum().detach(), gradient, grad(expected_loss)(scores, k)
