"""k times entmax: against sorting, its closed gradient, and what it is for special k and alpha."""

import numpy as np
import pytest
import torch
from references_uncapped import scaled_entmax as reference

from topkbench.operators import entmax, scaled_entmax, scaled_softmax, sparsemax

ALPHAS = [1.25, 1.5, 1.75, 2.0]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, tol=1e-9):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 40])
def test_reference(n, temperature, alpha):
    rows = torch.cat([draw(4, n), 20 * draw(2, n), torch.zeros(1, n), draw(2, n).round()])
    for k in {1, min(2, n), max(n - 1, 1), n}:
        expected = [reference(row, k, temperature, alpha) for row in rows.numpy()]
        close(scaled_entmax(rows, k, temperature, alpha=alpha), np.array(expected))


def test_values_by_hand():
    # 1 - t and 1/2 - t sum to 1 at t = 1/4.
    mask = scaled_entmax(torch.tensor([0.5, 1.0, -1.0]), 2, alpha=2.0)
    close(mask, [0.5, 1.5, 0.0], tol=1e-6)
    # (1/2 - t)^2 + t^2 = 1 at t = (1 - sqrt(7)) / 4.
    root = 7**0.5
    mask = scaled_entmax(torch.tensor([0.0, 1.0, -9.0], dtype=torch.float64), 1)
    close(mask, [((root - 1) / 4) ** 2, ((root + 1) / 4) ** 2, 0.0])


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_closed_gradient(alpha, k):
    for temperature in (0.3, 1.0, 4.0):
        scores, g = draw(5, 6).requires_grad_(), draw(5, 6, seed=1)
        mask = scaled_entmax(scores, k, temperature, alpha=alpha)
        (gradient,) = torch.autograd.grad(mask, scores, g)
        p = mask.detach().numpy() / k
        u = np.where(p > 0, p, 1) ** (2 - alpha) * (p > 0)
        mean = (u * g.numpy()).sum(-1, keepdims=True) / u.sum(-1, keepdims=True)
        close(gradient, k / temperature * u * (g.numpy() - mean))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_derivatives(alpha):
    scores = draw(2, 6).requires_grad_()
    for k in (1, 4, torch.tensor([2, 6])):
        hot = torch.tensor([[0.5], [2.0]], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda s, t, k=k: scaled_entmax(s, k, t, alpha=alpha), (scores, hot))
        assert torch.autograd.gradgradcheck(
            lambda s, t, k=k: scaled_entmax(s, k, t, alpha=alpha), (scores, hot)
        )


def test_at_k_1_there_is_no_cap():
    scores = draw(5, 8)
    close(scaled_entmax(scores, 1, 0.7, alpha=1.3), entmax(scores, 1, 0.7, alpha=1.3))
    close(scaled_entmax(scores, 1, 0.7, alpha=2.0), sparsemax(scores, 1, 0.7))


def test_the_support_does_not_depend_on_k():
    scores = draw(5, 8)
    close(scaled_entmax(scores, 5) / 5, scaled_entmax(scores, 1))
    close(scaled_entmax(scores, 5, 1e-3).max(-1).values, torch.full((5,), 5.0))
    assert ((scaled_entmax(scores, 5, 1e-3) > 0).sum(-1) == 1).all()


def test_alpha_near_1_is_nearly_the_softmax():
    scores = draw(5, 8)
    close(scaled_entmax(scores, 3, 0.5, alpha=1 + 1e-5), scaled_softmax(scores, 3, 0.5), tol=1e-3)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.1, float("nan")])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match=rf"^alpha must be in \(1, 2\], got {alpha}$"):
        scaled_entmax(draw(4), 2, alpha=alpha)
