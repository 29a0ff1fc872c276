"""What both tests of independent gates look at: a loss, a step, a noise."""

import torch

from topkbench.methods import Step
from topkbench.randomness import Normals

K = 2


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B = rows(4, seed=1), rows(4, 4, seed=2)


def wild(mask, scores):
    """Not linear in the mask, and of the scores as well."""
    n = mask.shape[-1]
    return (mask @ A[:n]).exp() + ((mask * scores) @ B[:n, :n] - A[:n]).square().sum(-1) * (
        mask[..., 0] - 0.3
    )


def step_on(scores, loss, wants="mask", k=K, noise=None, seed=0):
    scores = scores[None]
    W, x = scores.new_zeros(1, scores.shape[-1], 3), scores.new_zeros(1, scores.shape[1], 3)
    noise = noise or Normals([seed], dtype=scores.dtype)
    return Step(W, x, scores, k, wants, lambda part: loss(part, scores), noise)


def given(draws):
    """The noise of a step: these numbers, a row each."""
    return lambda *shape, **_: draws[None, None] if len(shape) == 4 else draws[None]


def close(actual, expected, tol=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tol, atol=tol)
