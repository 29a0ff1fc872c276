"""Poisson sampling: its probabilities, and its gradient by enumeration of all masks."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from topkbench.methods import PoissonStraightThrough, Step
from topkbench.methods.poisson import scaled
from topkbench.randomness import Normals

N, K = 5, 2


def reference(s, k, temperature, g):
    """One row: the probabilities and the vector-Jacobian product, as the docstring has them."""
    n, a = len(s), 1 / (1 + np.exp(-s / temperature))
    total = a.sum()
    if total >= k:
        p, scale, other = k * a / total, k / total, a @ g / total
    else:
        p = 1 - (n - k) * (1 - a) / (n - total)
        scale, other = (n - k) / (n - total), (1 - a) @ g / (n - total)
    return p, scale * a * (1 - a) * (g - other) / temperature


def step_of(scores, loss, wants="mask", k=K, seed=0):
    scores = scores[None]
    noise = Normals([seed], dtype=scores.dtype)
    nothing = scores.new_zeros
    W, x = nothing(1, scores.shape[-1], 3), nothing(1, scores.shape[1], 3)
    return Step(W, x, scores, k, wants, lambda part: loss(part, scores), noise)


@pytest.mark.parametrize("shift", [-3.0, -1.0, 0.0, 3.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (5, 2), (5, 4), (5, 5)])
def test_probabilities_are_the_formula(n, k, shift):
    scores, g = (torch.randn(n, dtype=torch.float64) + shift).requires_grad_(), torch.randn(n).double()
    p = scaled(scores / 0.7, k)
    expected, vjp = reference(scores.detach().numpy(), k, 0.7, g.numpy())
    np.testing.assert_allclose(p.detach(), expected, rtol=1e-10)
    np.testing.assert_allclose(torch.autograd.grad(p, scores, g)[0], vjp, rtol=1e-8, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: scaled(s, k), scores)
    assert torch.autograd.gradgradcheck(lambda s: scaled(s, k), scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_sum_to_k_and_stay_in_range_whatever_the_scores(dtype):
    for size in (1.0, 1e2, 1e4):
        for shift in (-1e4, -10.0, 0.0, 10.0, 1e4):
            scores = (size * torch.randn(50, N, dtype=dtype) + shift).requires_grad_()
            for k in range(1, N + 1):
                p = scaled(scores, k)
                torch.testing.assert_close(p.sum(-1), torch.full_like(p[:, 0], k), rtol=1e-5, atol=1e-5)
                assert p.min() >= -1e-6
                assert p.max() <= 1 + 1e-6
                order = scores.argsort(-1)
                assert p.gather(-1, order).diff(dim=-1).min() >= 0
                assert torch.autograd.grad(p.square().sum(), scores)[0].isfinite().all()
    scores = torch.tensor([-torch.inf, torch.inf, 0.0, 0.5, 1.0], dtype=dtype, requires_grad=True)
    p = scaled(scores, 1)
    assert (p[0], p.isfinite().all()) == (0, True)
    assert scaled(torch.tensor([0.0, torch.nan, 1.0], dtype=dtype), 1).isnan().all()


@pytest.mark.parametrize("shift", [-2.0, 1.0])
def test_mean_over_all_masks(shift):
    """Unbiased where the loss is linear in the mask and also looks at the scores; elsewhere it is not."""
    s, w = torch.randn(N, dtype=torch.float64) + shift, torch.randn(N, dtype=torch.float64)
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=N)), dtype=torch.float64)

    def chance(p):
        return torch.where(masks == 1, p, 1 - p).prod(-1)

    losses = {
        "linear": lambda mask, q: (mask * q) @ w,
        "square": lambda mask, q: ((mask * q) @ w).square(),
    }
    for name, loss in losses.items():
        truth = torch.func.grad(lambda s, loss=loss: (chance(scaled(s, K)) * loss(masks, s)).sum())(s)
        p = scaled(s, K)
        rows = s.expand(len(masks), N).clone().requires_grad_()
        # Uniforms that give each mask once: 0 where an item is drawn, 1 where it is not.
        step = dataclasses.replace(step_of(rows, loss), noise=lambda *_, **__: 1 - masks[None])
        surrogate = PoissonStraightThrough()(step)[0]
        torch.testing.assert_close(surrogate.detach(), loss(masks, s))
        mean = torch.autograd.grad((chance(p) * surrogate).sum(), rows)[0].sum(0)
        assert torch.allclose(mean, truth, rtol=1e-9, atol=1e-12) == (name == "linear")


def test_draws_are_independent_and_k_in_the_mean():
    s, many = torch.randn(N, dtype=torch.float64), 40_000
    seen = []
    PoissonStraightThrough(0.8)(
        step_of(s.expand(many, N), lambda mask, _: (seen.append(mask), mask.sum(-1))[1])
    )
    masks, p = seen[0][0], scaled(s / 0.8, K)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert ((masks.mean(0) - p) / (p * (1 - p) / many).sqrt()).abs().max() < 4
    both, expected = masks.T @ masks / many, torch.outer(p, p)
    error = (expected * (1 - expected) / many).sqrt()
    assert ((both - expected) / error)[~torch.eye(N, dtype=torch.bool)].abs().max() < 4
    count = masks.sum(-1)
    assert (count.mean() - K).abs() < 4 * count.std() / many**0.5
    assert count.var().item() == pytest.approx((p * (1 - p)).sum().item(), rel=0.05)


def test_value_alone_is_the_same():
    for dtype in (torch.float32, torch.float64):
        scores = torch.randn(6, N, dtype=dtype)
        value = PoissonStraightThrough()(
            step_of(scores.clone().requires_grad_(), lambda m, s: (m * s).sum(-1))
        )
        with torch.no_grad():
            alone = PoissonStraightThrough()(step_of(scores, lambda m, s: (m * s).sum(-1)))
        torch.testing.assert_close(alone, value.detach())
        assert value.dtype == dtype


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got 0"):
        PoissonStraightThrough(0.0)
    with pytest.raises(ValueError, match="needs a task whose loss is a function of the mask, not of values"):
        PoissonStraightThrough()(step_of(torch.zeros(2, N), lambda v, _: v.sum(-1), "values"))
