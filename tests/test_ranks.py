"""Soft ranks against pooling and a dense solver; ranks by counting against the matrix."""

import functools
import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from references_ranks import smooth_rank as reference_smooth_rank
from references_ranks import soft_rank as reference_soft_rank
from references_ranks import soft_rank_kl as reference_soft_rank_kl
from scipy.optimize import isotonic_regression, minimize

from topkbench.operators import _pairwise, _rowwise, sparsemax
from topkbench.operators.isotonic import descending, segment
from topkbench.operators.ranks import smooth_rank, soft_rank

Array = NDArray[np.float64]

soft_rank_kl = functools.partial(soft_rank, regularization="kl")
SOFT = [pytest.param(soft_rank, id="l2"), pytest.param(soft_rank_kl, id="kl")]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, tol=1e-9):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


# References: one row


REFERENCES = [
    pytest.param(soft_rank, reference_soft_rank, id="l2"),
    pytest.param(soft_rank_kl, reference_soft_rank_kl, id="kl"),
    pytest.param(smooth_rank, reference_smooth_rank, id="smooth"),
]


@pytest.mark.parametrize(("op", "reference"), REFERENCES)
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 10.0])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 40])
def test_reference(op, reference, n, temperature):
    rows = torch.cat([draw(4, n), 10 * draw(2, n), torch.zeros(1, n), draw(2, n).round()])
    for k in {1, min(2, n), n // 2 + 1, max(n - 1, 1), n}:
        expected = [reference(row, k, temperature) for row in rows.numpy()]
        close(op(rows, k, temperature), np.array(expected))


# The segment of the isotonic regression


def running(y):
    return torch.cat([torch.zeros_like(y[..., :1]), y.cumsum(-1)], -1)


@pytest.mark.parametrize("law", ["normal", "cubed", "rising", "falling", "clusters", "convex", "powers"])
def test_segment_is_that_of_isotonic_regression(law):
    n = 60
    z, ramp = draw(30, n), torch.arange(n, dtype=torch.float64)
    y = {
        "normal": z,
        "cubed": z**3,
        "rising": z + ramp / 3,
        "falling": 3 * z - ramp,
        "clusters": z + 10 * (ramp // 7 * 5 % 11),
        "convex": z / 10 + (ramp - n / 2) ** 2,
        "powers": 2.0 ** (-ramp) * (1 + z.abs()) * torch.where(ramp % 3 == 0, 5.0, 0.2),
    }[law]
    places = torch.arange(n + 1, dtype=torch.float64)
    for k in (1, 2, 17, n - 1, n):
        expected = [isotonic_regression(row, increasing=False).x[k - 1] for row in y.numpy()]
        found = segment(places, running(y), k)
        close(found.slope.squeeze(-1), np.array(expected), tol=1e-10)
        assert (found.left < k).all()
        assert (k <= found.right).all()
    ks = torch.arange(1, n + 1)
    regressed = np.array([isotonic_regression(row, increasing=False).x for row in y.numpy()])
    slopes = segment(places, running(y).unsqueeze(-2).expand(30, n, n + 1), ks).slope
    close(slopes.squeeze(-1), regressed, tol=1e-10)


def test_projection_on_the_permutahedron_of_k_ones_is_sparsemax():
    n, k = 8, 3
    scores = descending(draw(5, n))
    u, ones = scores / 0.4, (torch.arange(n) < k).to(scores.dtype)
    points = running(u - ones).unsqueeze(-2).expand(5, n, n + 1)
    levels = segment(torch.arange(n + 1, dtype=u.dtype), points, torch.arange(1, n + 1)).slope.squeeze(-1)
    close(u - levels, sparsemax(scores, k, 0.4))


# The ranks


def ranks_of(op, scores, temperature):
    """All masks know the ranks: `clip(k + 1 - r, 0, 1)` summed over k = 1..n is n + 1 - r."""
    n = scores.shape[-1]
    each = scores.unsqueeze(-2).expand(*scores.shape, n)
    return n + 1 - op(each, torch.arange(1, n + 1), temperature).sum(-2)


@pytest.mark.parametrize(("op", "divergence"), [(soft_rank, "l2"), (soft_rank_kl, "kl")])
def test_ranks_by_a_dense_solver(op, divergence):
    n = 4
    ranks = np.arange(1, n + 1)
    subsets = [list(s) for size in range(1, n) for s in itertools.combinations(range(n), size)]
    constraints = [
        {"type": "ineq", "fun": lambda r, s=s: r[s].sum() - len(s) * (len(s) + 1) / 2} for s in subsets
    ]
    constraints.append({"type": "eq", "fun": lambda r: r.sum() - ranks.sum()})
    for row, temperature in itertools.product(draw(3, n), (0.3, 1.0)):
        z = -row.numpy() / temperature

        def objective(r, z=z):
            if divergence == "l2":
                return ((r - z) ** 2).sum() / 2
            return (r * (np.log(r) - z) - r).sum()

        solved = minimize(
            objective,
            np.full(n, ranks.mean()),
            constraints=constraints,
            bounds=[(0.1, n)] * n,
            options={"ftol": 1e-14, "maxiter": 500},
        )
        close(ranks_of(op, row, temperature), solved.x, tol=2e-5)


@pytest.mark.parametrize("op", SOFT)
def test_ranks_are_ranks(op):
    scores = draw(6, 9)
    for temperature in (0.03, 0.3, 3.0):
        ranks = ranks_of(op, scores, temperature)
        close(ranks.sum(-1), torch.full((6,), 45.0))
        ascending = ranks.gather(-1, scores.argsort(-1, descending=True))
        assert (ascending.diff(dim=-1) >= -1e-12).all()
    exact = scores.argsort(-1, descending=True).argsort(-1) + 1.0
    close(ranks_of(op, scores, 1e-4), exact)
    close(ranks_of(op, scores, 1e9), torch.full((6, 9), 5.0), tol=1e-6)


def test_two_scores_are_as_with_sparsemax():
    scores = draw(20, 2)
    close(soft_rank(scores, 1, 0.8), sparsemax(scores, 1, 0.8))


@pytest.mark.parametrize("op", SOFT)
@pytest.mark.parametrize("spread", [0.01, 1.0, 100.0])
def test_many_scores(op, spread):
    reference = reference_soft_rank if op is soft_rank else reference_soft_rank_kl
    scores = spread * draw(4, 2000)
    heavy = spread * draw(2, 2000, seed=1) ** 5
    for rows in (scores, heavy):
        for k in (1, 30, 1999):
            expected = np.array([reference(row, k, 0.02) for row in rows.numpy()])
            close(op(rows, k, 0.02), expected, tol=1e-6)


@pytest.mark.parametrize("op", SOFT)
def test_single_precision_keeps_the_ranks_of_many_scores(op):
    n, fractional = 10000, 0
    scores = ((torch.arange(n) + 0.6 * draw(n)) / n).float()
    for k in (*range(5, 10), 100, 1000, 5000, 9000):
        temperature = (1 if op is soft_rank else k) / n
        expected = op(scores.double(), k, temperature)
        fractional += int(((expected > 0) & (expected < 1)).sum())
        # Only the formula of the mask is in single precision: a rounding of the scores is 6e-4 temperatures.
        close(op(scores, k, temperature).double(), expected, tol=5e-3)
    assert fractional > 1


# Derivatives


@pytest.mark.parametrize("op", [*SOFT, pytest.param(smooth_rank, id="smooth")])
@pytest.mark.parametrize("k", [1, 3, 5, 6, torch.tensor([2, 4])])
def test_derivatives(op, k):
    scores = draw(2, 6).requires_grad_()
    for temperature in (0.3, 1.5):
        hot = torch.full((2, 1), temperature, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda s, t: op(s, k, t), (scores, hot))
        assert torch.autograd.gradgradcheck(lambda s, t: op(s, k, t), (scores, hot))


@pytest.mark.parametrize("op", SOFT)
def test_a_block_shares_its_gradient(op):
    scores = torch.tensor([2.0, 0.3, 0.2, 0.1, -3.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(op(scores, 2, 0.5)[1], scores)
    assert (gradient[[0, 4]] == 0).all()
    assert (gradient[1:4] != 0).all()
    close(gradient.sum(), torch.tensor(0.0), tol=1e-12)


@pytest.mark.parametrize("op", [*SOFT, pytest.param(smooth_rank, id="smooth")])
def test_equal_scores_have_equal_gradients(op):
    scores = torch.tensor([1.0, 0, 1, 0, 0, -1], dtype=torch.float64, requires_grad=True)
    for k in (1, 2, 3, 4):
        for temperature in (0.4, 2.0):
            (gradient,) = torch.autograd.grad(op(scores, k, temperature).square().sum(), scores)
            close(gradient[[0, 1, 1]], gradient[[2, 3, 4]], tol=1e-12)


# Ranks by counting


def test_counted_ranks_in_blocks(monkeypatch):
    scores = draw(3, 11).requires_grad_()
    whole = smooth_rank(scores, 4, 0.3)
    (expected,) = torch.autograd.grad(whole.square().sum(), scores)
    blocks = _rowwise.blocks
    monkeypatch.setattr(_pairwise, "blocks", lambda rows, each: blocks(rows, each, 4 * each))
    mask = smooth_rank(scores, 4, 0.3)
    close(mask, whole.detach())
    close(torch.autograd.grad(mask.square().sum(), scores)[0], expected)
    assert torch.autograd.gradgradcheck(lambda s: smooth_rank(s, 4, 0.3), scores)


def test_counted_ranks_sum_to_that_of_ranks():
    ranks = _pairwise.pairwise_ranks(draw(3, 7) / 0.2)
    close(ranks.sum(-1), torch.full((3,), 28.0))
    close(smooth_rank(draw(3, 7), 2, 0.2), ((2.5 - ranks) / 1).sigmoid())
    close(smooth_rank(draw(3, 7), 2, 0.2, margin=0.1), ((2.5 - ranks) / 0.1).sigmoid())


# Refusals


def test_bad_options():
    with pytest.raises((ValueError, TypeError), match="regularization"):
        soft_rank(draw(4), 2, regularization="l1")
    for margin in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"margin must be > 0, got"):
            smooth_rank(draw(4), 2, margin=margin)
