"""Optimal transport to anchors: against explicit plans, its limit, and derivatives through the iterations."""

import math

import numpy as np
import pytest
import torch
from references_anchors import cardinality_sinkhorn as reference_cardinality
from references_anchors import sinkhorn_rank as reference_rank
from references_anchors import soft_sorted as reference_sorted

from topkbench.operators import (
    cardinality_sinkhorn,
    entropic,
    hard_selection,
    sinkhorn_rank,
    soft,
    soft_sorted,
)
from topkbench.operators._plan import transport

OPERATORS = (soft_sorted, sinkhorn_rank, cardinality_sinkhorn)
over = pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.__name__)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, tol=1e-9):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


# Readable twins: one row, float64, explicit plans


@pytest.mark.parametrize("iterations", [1, 2, 30])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_reference(n, iterations):
    rows = torch.cat([draw(3, n), 20 * draw(1, n), draw(1, n).round()])
    for k in {1, (n + 1) // 2, n}:
        for temperature in (0.05, 1.0):
            options = {"temperature": temperature, "iterations": iterations}
            for m in (None, 2, 5, 9):
                expected = [reference_rank(row, k, anchors=m, **options) for row in rows.numpy()]
                close(sinkhorn_rank.selection(rows, k, anchors=m, **options), np.array(expected))
                close(sinkhorn_rank(rows, k, anchors=m, **options), np.sum(expected, 1))
            expected = [reference_sorted(row, k, **options) for row in rows.numpy()]
            close(soft_sorted.selection(rows, k, **options), np.array(expected))
            expected = [reference_cardinality(row, k, **options) for row in rows.numpy()]
            close(cardinality_sinkhorn(rows, k, **options), np.array(expected))


# The plan and its derivatives


def unrolled(logits, masses, iterations):
    for _ in range(iterations):
        logits = logits.log_softmax(-2)
        logits = logits + masses.log() - logits.logsumexp(-1, keepdim=True)
    return logits.exp()


@pytest.mark.parametrize("masses", [[3.0, 4.0], [1.0, 1.0, 5.0], [1.5, 0.25, 0.25, 2.0, 3.0]])
def test_converged_the_gradient_is_that_through_the_iterations(masses):
    masses = torch.tensor(masses, dtype=torch.float64).unsqueeze(-1)
    logits, weights = draw(4, len(masses), 7).requires_grad_(), draw(4, len(masses), 7, seed=1)
    plans = transport(logits, masses, 500), unrolled(logits, masses, 500)
    close(*plans, tol=1e-12)
    close(plans[0].sum(-2), torch.ones(4, 7))
    close(plans[0].sum(-1, keepdim=True), masses.expand(4, -1, 1))
    first = [torch.autograd.grad((p * weights).sum(), logits, create_graph=True)[0] for p in plans]
    close(*first)
    second = [torch.autograd.grad((g * g * weights).sum(), logits)[0] for g in first]
    close(*second)


def test_derivatives_of_the_plan():
    masses = torch.tensor([[1.0], [1.0], [0.0], [3.0]], dtype=torch.float64)
    logits = draw(2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: transport(x, masses, 300), logits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert torch.autograd.gradgradcheck(lambda x: transport(x, masses, 300), logits)
    assert (transport(logits, masses, 3)[:, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [10, 100, 1e4, 1e30])
def test_a_nearly_hard_plan_has_a_small_gradient(scale, dtype):
    """Parts of the graph of anchors lose touch, and its Laplacian is singular in more ways than one."""
    hard = torch.eye(5).repeat(1, 2).to(dtype)
    logits = (scale * hard + draw(5, 10).to(dtype)).requires_grad_()
    weights = draw(5, 10, seed=1).to(dtype)
    plan = transport(logits, torch.full((5, 1), 2.0, dtype=dtype), 50)
    (gradient,) = torch.autograd.grad((plan * weights).sum(), logits)
    bound = 10 * math.exp(-scale + 6) + 1e-12 if dtype == torch.float64 else 10 * math.exp(-scale + 6) + 1e-6
    assert gradient.abs().max() <= bound


def test_too_few_iterations_give_another_gradient_of_sum_zero():
    scores, weights = draw(6).requires_grad_(), draw(6, seed=1)
    for op, temperature in ((soft_sorted, 0.003), (sinkhorn_rank, 0.003), (cardinality_sinkhorn, 0.05)):
        mask = op(scores, 3, temperature, iterations=2)
        (gradient,) = torch.autograd.grad((mask * weights).sum(), scores)
        close(gradient.sum(), torch.tensor(0.0))
        assert (mask.sum(-1) - 3).abs() < 1e-9


# Sorted SOFT


def test_sorted_soft_of_one_is_soft():
    """k = 1: the anchors 1 and 0 of SOFT."""
    scores = draw(4, 6).requires_grad_()
    masks = [op(scores, 1, 0.1, iterations=500) for op in (soft, soft_sorted)]
    close(*masks)
    weights = draw(4, 6, seed=1)
    close(*(torch.autograd.grad((mask * weights).sum(), scores)[0] for mask in masks))


def test_sorted_soft_becomes_the_hard_selection():
    scores = torch.tensor([0.2, -1.0, 1.0, -0.6, 0.6, -0.2], dtype=torch.float64)
    for k in (1, 2, 5, 6):
        close(soft_sorted.selection(scores, k, 0.001, iterations=20000), hard_selection(scores, k), tol=1e-3)


def test_rows_of_sorted_soft_depend_on_k_and_those_of_sinkhorn_ranks_do_not():
    scores = draw(3, 6)
    rows = [soft_sorted.selection(scores, k, 0.1) for k in (2, 4)]
    assert (rows[0] - rows[1][:, :2]).abs().max() > 0.01
    rows = [sinkhorn_rank.selection(scores, k, 0.1) for k in (2, 4)]
    close(rows[0], rows[1][:, :2], tol=1e-14)


def test_sorted_soft_has_the_gradient_of_the_limit_with_the_largest_cost_held_constant():
    scores = draw(2, 6)
    largest = torch.maximum(scores**2, (scores - 2) ** 2).amax(-1, keepdim=True)
    leaves = scores.requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def held(scores, temperature):
        """The same with the largest cost in the temperature."""
        moving = torch.maximum(scores**2, (scores - 2) ** 2).amax(-1, keepdim=True)
        return soft_sorted.selection(scores, 2, temperature * largest / moving.detach(), iterations=1000)

    assert torch.autograd.gradcheck(held, leaves)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert torch.autograd.gradgradcheck(held, leaves)


# Sinkhorn ranks


def test_sinkhorn_ranks_become_the_hard_selection():
    scores = torch.tensor([0.2, -1.0, 1.0, -0.6, 0.6, -0.2], dtype=torch.float64)
    rows = sinkhorn_rank.selection(scores, 6, 0.001, iterations=20000)
    close(rows, hard_selection(scores, 6), tol=1e-3)


def test_sinkhorn_ranks_know_neither_shift_nor_scale():
    scores = draw(3, 6)
    close(sinkhorn_rank(7 * scores + 3, 2, 0.05), sinkhorn_rank(scores, 2, 0.05), tol=1e-8)


def test_anchors_that_end_at_the_top_share_make_a_hard_mask():
    """Of 6 scores the top 3 are one of 2 anchors, and the top 2 one of 3."""
    scores = torch.tensor([0.2, -1.0, 1.0, -0.6, 0.6, -0.2], dtype=torch.float64)
    for k, anchors in ((3, 2), (2, 3)):
        mask = sinkhorn_rank(scores, k, 0.002, anchors=anchors, iterations=5000)
        close(mask, hard_selection(scores, k).sum(0), tol=1e-3)


def test_too_few_anchors():
    with pytest.raises(ValueError, match="anchors must be at least 2, or None for as many as scores, got 1"):
        sinkhorn_rank(draw(5), 2, 0.1, anchors=1)


# Cardinality Sinkhorn


def test_cardinality_sinkhorn_converges_to_entropic():
    scores = draw(4, 7).requires_grad_()
    weights = draw(4, 7, seed=1)
    for k in (1, 3, 6):
        pair = cardinality_sinkhorn(scores, k, 0.6, iterations=2000), entropic(scores, k, 0.3)
        close(*pair, tol=1e-11)
        close(*(torch.autograd.grad((m * weights).sum(), scores)[0] for m in pair), tol=1e-11)


def test_noise_on_both_columns_is_noise_on_the_scores():
    scores, noise, k = draw(6), draw(6, seed=1), 2
    anchors = torch.stack([scores.max(), scores.min()]).unsqueeze(-1)
    similarity = -(scores - anchors).abs() + torch.stack([-noise, noise])
    masses = torch.tensor([[2.0], [4.0]], dtype=torch.float64)
    published = unrolled(similarity / 0.5, masses, 2000)[0]
    close(published, cardinality_sinkhorn(scores - noise, k, 0.5, iterations=2000))


# All


@over
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradients_at_ties_are_finite_and_equal(op, k):
    scores = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(op(scores, k, 0.5).square().sum(), scores)
    close(gradient[0], gradient[2])
    assert gradient.isfinite().all()


@over
def test_vectorised_jacobian(op):
    """The backward pass under vmap."""
    scores = draw(2, 5)
    for part in (op, op.selection):

        def function(scores, part=part):
            return part(scores, 2, 0.5)

        row_by_row = torch.autograd.functional.jacobian(function, scores)
        close(torch.func.jacrev(function)(scores), row_by_row, tol=1e-12)


@over
def test_bad_iterations(op):
    for part in (op, op.selection):
        with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
            part(draw(2, 5), 3, 0.5, iterations=0)


@pytest.mark.parametrize("op", [soft_sorted, sinkhorn_rank], ids=lambda op: op.__name__)
def test_too_large_is_refused(op):
    with pytest.raises(ValueError, match=r"a plan to \d+ anchors of scores .* and the limit is"):
        op(torch.zeros(1).expand(10**6), 10**5)


def test_the_gradient_of_a_plan_that_is_hard_to_the_last_bit_does_not_depend_on_the_order():
    """Found by hypothesis: where nearly all of a score goes to one anchor, what is left must not cancel."""
    scores = torch.tensor([-32, -32, -32, -5, 1.5, 1.5, -3, -3, -32, -3, -3, -32], dtype=torch.float64)
    order = [3, 8, 11, 7, 10, 0, 6, 1, 4, 2, 9, 5]

    def gradient(row):
        row = row.clone().requires_grad_()
        return torch.autograd.grad(cardinality_sinkhorn(row, 7, 0.5559355104139848).square().sum(), row)[0]

    torch.testing.assert_close(gradient(scores)[order], gradient(scores[order]), rtol=1e-6, atol=1e-15)
