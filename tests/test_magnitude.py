"""The operator in magnitude: against pooling, its published example, its closed gradient and its limits."""

import numpy as np
import pytest
import torch
from references_uncapped import magnitude as reference
from scipy.optimize import brentq

from topkbench.operators import hard_mask
from topkbench.operators.magnitude import magnitude

PS = [2.0, 5 / 3, 1.5, 4 / 3]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, tol=1e-9):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 40])
def test_reference(n, temperature, p):
    rows = torch.cat([draw(4, n), 10 * draw(2, n), 1e-3 * draw(1, n), torch.ones(1, n), draw(2, n).round()])
    for k in {1, min(2, n), n // 2 + 1, max(n - 1, 1), n}:
        expected = [reference(row, k, temperature, p) for row in rows.numpy()]
        # The power amplifies the rounding of v where the temperature is low.
        close(magnitude(rows, k, temperature, p=p), np.array(expected), tol=1e-7)


@pytest.mark.parametrize("p", PS)
def test_the_published_example(p):
    # The published code prints [-5.000036, 0, 2.9999416, 0] in single precision.
    values = magnitude(torch.tensor([-5.0, -2.0, 3.0, 1.0]), 2, 1e-2, p=p)
    assert torch.equal(values, torch.tensor([-5.0, 0.0, 3.0, 0.0]))


@pytest.mark.parametrize("p", PS)
def test_many_scores_of_which_exactly_k_are_kept(p):
    scores = torch.from_numpy(np.random.RandomState(0).randn(1000))
    values = magnitude(scores, 10, 1e-3, p=p)
    hard = hard_mask(scores.abs(), 10)
    assert torch.equal((values != 0).to(hard.dtype), hard)
    close(values, scores * hard)


def test_two_that_tie_share():
    # v = 2 / (2 + T), and each has m + 1 - v.
    for temperature in (0.1, 1.0):
        values = magnitude(torch.tensor([1.0, -1.0, 0.1], dtype=torch.float64), 1, temperature)
        share = (1 + temperature) / (2 + temperature)
        close(values, [share, -share, 0.0])


def test_the_change_over_is_continuous():
    path = torch.linspace(1.0, 3.0, 2001, dtype=torch.float64)
    scores = torch.stack([path, torch.full_like(path, -2.0), torch.zeros_like(path) + 0.3], -1)
    for p in PS:
        values = magnitude(scores, 1, 0.2, p=p)
        assert torch.equal(values[0], torch.tensor([0.0, -2.0, 0.0]))
        assert torch.equal(values[-1], torch.tensor([3.0, 0.0, 0.0]))
        assert values.diff(dim=0).abs().max() < 0.03


# Derivatives


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("k", [1, 2, 4, 5, torch.tensor([2, 4])])
def test_derivatives(p, k):
    scores = draw(2, 5).requires_grad_()
    for temperature in (0.1, 1.0, 5.0):
        hot = torch.full((2, 1), temperature, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda s, t: magnitude(s, k, t, p=p), (scores, hot))
        assert torch.autograd.gradgradcheck(lambda s, t: magnitude(s, k, t, p=p), (scores, hot), atol=1e-4)


@pytest.mark.parametrize("p", PS)
def test_the_closed_gradient(p):
    k, temperature, power = 3, 0.8, 1 / (p - 1)
    scores, g = draw(8).requires_grad_(), draw(8, seed=1).numpy()
    values = magnitude(scores, k, temperature, p=p)
    (gradient,) = torch.autograd.grad(values, scores, torch.from_numpy(g))
    s, size, y = scores.detach().numpy(), scores.detach().abs().numpy(), values.detach().abs().numpy()
    block = (y > 0) & (abs(y - size) > 1e-9)
    assert 2 < block.sum() < 8

    def m_of(v):
        return (np.maximum(size - v, 0) / temperature) ** power

    v = brentq(lambda v: np.minimum(m_of(v), v).sum() - k * v, 1e-9, size[block].min(), xtol=1e-15)
    b = power / temperature * m_of(v) ** (1 - 1 / power) * block
    c = k - (~block & (y > 0)).sum()
    h = np.sign(s) * g
    mean = ((1 + b) * h * block).sum() / (b.sum() + c)
    inside = np.sign(s) * ((1 + b) * h - b * mean)
    close(gradient, np.where(block, inside, g * (y > 0)), tol=1e-8)
    if p == 2:  # as the source has it
        T, size_B = temperature, block.sum()
        mean = (h * block).sum() / (size_B + T * c)
        close(gradient, np.where(block, np.sign(s) * (1 + T) / T * (h - mean), g * (y > 0)), tol=1e-8)


def test_no_gradient_through_what_is_far_below():
    scores = torch.tensor([3.0, -2.0, 0.1, 0.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(magnitude(scores, 2, 0.1).sum(), scores)
    assert torch.equal(gradient, torch.tensor([1.0, 1.0, 0.0, 0.0]))


# Symmetries and limits


@pytest.mark.parametrize("p", PS)
def test_signs_and_order(p):
    scores = draw(4, 7)
    values = magnitude(scores, 3, 0.5, p=p)
    close(magnitude(-scores, 3, 0.5, p=p), -values)
    close(magnitude(scores.flip(-1), 3, 0.5, p=p), values.flip(-1))
    assert (values.abs() <= scores.abs() + 1e-12).all()


def test_at_p_2_the_temperature_has_no_unit():
    scores = draw(4, 7)
    for c in (1e-6, 1e6):
        close(magnitude(c * scores, 3, 0.5) / c, magnitude(scores, 3, 0.5))


@pytest.mark.parametrize("p", PS)
def test_limits(p):
    scores = draw(4, 7)
    close(magnitude(scores, 3, 1e-9, p=p), scores * hard_mask(scores.abs(), 3))
    close(magnitude(scores, 3, 1e9, p=p), scores, tol=1e-6)
    close(magnitude(scores, 7, 0.5, p=p), scores)


# Shapes, precision, and what it refuses


@pytest.mark.parametrize("p", PS)
def test_each_row_alone(p):
    scores, k = draw(2, 3, 6), torch.tensor([[1, 4, 6], [2, 2, 5]])
    hot = 0.2 + draw(3, 1, seed=1).abs()
    together = magnitude(scores, k, hot, p=p)
    for i, j in np.ndindex(2, 3):
        close(together[i, j], magnitude(scores[i, j], int(k[i, j]), float(hot[j]), p=p))
    nested = magnitude(scores.unsqueeze(-2).expand(2, 3, 6, 6), torch.arange(1, 7), 0.4, p=p)
    close(nested[..., 2, :], magnitude(scores, 3, 0.4, p=p))
    assert magnitude(draw(0, 4), 2, p=p).shape == (0, 4)
    batched = torch.vmap(lambda s, t: magnitude(s, 2, t, p=p))(scores, hot[:2])
    close(batched, torch.stack([magnitude(s, 2, float(t), p=p) for s, t in zip(scores, hot, strict=False)]))


@pytest.mark.parametrize("p", PS)
def test_extremes_are_finite(p):
    far = torch.tensor([1e4, -1e4, 0, 1e-8, -1e4, 1e3])
    rows = torch.stack([1e4 * draw(6).float(), 1e-8 * draw(6).float(), torch.zeros(6), torch.ones(6), far])
    for dtype in (torch.float32, torch.float64):
        for k in (1, 2, 5, 6):
            for temperature in (1e-3, 1.0, 1e3):
                scores = rows.to(dtype, copy=True).requires_grad_()
                hot = torch.tensor(temperature, dtype=dtype, requires_grad=True)
                values = magnitude(scores, k, hot, p=p)
                slopes = torch.autograd.grad(values.square().sum(), (scores, hot))
                assert values.dtype == dtype
                assert all(part.isfinite().all() for part in (values, *slopes))
                assert (values.abs() <= scores.abs() * (1 + 1e-5)).all()


def test_single_precision():
    scores = draw(20, 30)
    for p in PS:
        close(magnitude(scores.float(), 5, 0.3, p=p), magnitude(scores, 5, 0.3, p=p).float(), tol=2e-5)


def test_nan_stays_in_its_row():
    scores = draw(3, 5)
    scores[1, 2] = torch.nan
    values = magnitude(scores, 2, 0.5)
    assert values[1].isnan().any()
    close(values[::2], magnitude(scores[::2], 2, 0.5))


@pytest.mark.parametrize(
    ("k", "temperature", "p", "message"),
    [
        (0, 1.0, 2.0, r"^k must be in \[1, 4\]"),
        (5, 1.0, 2.0, r"^k must be in \[1, 4\]"),
        (2, 0.0, 2.0, r"^temperature must be > 0"),
        (2, 1.0, 1.0, r"^p must be in \(1, 2\], got 1.0$"),
        (2, 1.0, 3.0, r"^p must be in \(1, 2\], got 3.0$"),
    ],
)
def test_bad_arguments(k, temperature, p, message):
    with pytest.raises(ValueError, match=message):
        magnitude(draw(4), k, temperature, p=p)
