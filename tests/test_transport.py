"""Operators by Sinkhorn iterations against explicit transport plans, and against what they converge to."""

import numpy as np
import pytest
import torch
from references_transport import sinkhorn as reference_sinkhorn
from references_transport import soft as reference_soft

from topkbench.operators import entropic, hard_selection
from topkbench.operators.transport import sinkhorn, soft


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
            masks = [reference_soft(row, k, **options) for row in rows.numpy()]
            close(soft(rows, k, **options), np.array(masks))
            selections = [reference_sinkhorn(row, k, **options) for row in rows.numpy()]
            close(sinkhorn.selection(rows, k, **options), np.array(selections))


# SOFT


def test_soft_converges_to_entropic():
    scores = draw(4, 7).requires_grad_()
    largest = torch.maximum(scores**2, (scores - 1) ** 2).amax(-1, keepdim=True).detach()
    for k in (1, 3, 6):
        for temperature in (0.1, 1.0):
            pair = (
                soft(scores, k, temperature, iterations=2000),
                entropic(scores, k, temperature * largest / 2),
            )
            close(*pair, tol=1e-12)
            weights = draw(4, 7, seed=1)
            close(*(torch.autograd.grad((y * weights).sum(), scores)[0] for y in pair), tol=1e-12)
            rows = soft.selection(scores, k, temperature, iterations=2000)
            close(rows, entropic.selection(scores, k, temperature * largest / 2), tol=1e-12)


def test_too_few_iterations_leave_the_unit_interval():
    scores = draw(50, 6)
    for temperature, iterations in ((0.01, 10), (0.001, 200)):
        mask = soft(scores, 3, temperature, iterations=iterations)
        close(mask.sum(-1), torch.full((50,), 3.0))
        assert mask.max() > 1.001


def test_soft_gradient_is_the_derivative_with_the_largest_cost_held_constant():
    scores = draw(2, 6)
    largest = torch.maximum(scores**2, (scores - 1) ** 2).amax(-1, keepdim=True)
    leaves = scores.requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def held(scores, temperature):
        """The same with the largest cost in the temperature, which is shared by shifted scores."""
        moving = torch.maximum(scores**2, (scores - 1) ** 2).amax(-1, keepdim=True)
        return soft(scores, 2, temperature * largest / moving.detach(), iterations=1000)

    assert torch.autograd.gradcheck(held, leaves)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert torch.autograd.gradgradcheck(held, leaves)


def test_soft_depends_on_a_shift_but_not_on_its_neighbours():
    scores = draw(3, 6)
    alone = torch.stack([soft(row, 2, 0.1) for row in scores])
    close(soft(torch.cat([scores, 50 + scores]), 2, 0.1)[:3], alone)
    assert (soft(scores + 5, 2, 0.1) - alone).abs().max() > 0.1


# Sinkhorn


def test_sinkhorn_becomes_doubly_stochastic_and_hard():
    scores = torch.tensor([0.2, -1.0, 1.0, -0.6, 0.6, -0.2], dtype=torch.float64)
    rows = sinkhorn.selection(scores, 6, 1.0, iterations=300)
    close(rows.sum(-1), torch.ones(6))
    close(rows.sum(-2), torch.ones(6))
    close(sinkhorn.selection(scores, 3, 0.02, iterations=3000), hard_selection(scores, 3), tol=1e-3)


def test_sinkhorn_of_two_scores_is_a_sigmoid():
    """The plan [[p, 1-p], [1-p, p]] with log odds (w_1 - w_2)(s_1 - s_2) / 2, and w_1 - w_2 = 1."""
    scores = draw(5, 2)
    expected = ((scores - scores.flip(-1)) / 2 / 0.7).sigmoid()
    close(sinkhorn(scores, 1, 0.7, iterations=1000), expected)
    close(sinkhorn(scores, 1, 0.7, iterations=1000), entropic(scores, 1, 0.7))


def test_the_limit_maximises():
    """No doubly stochastic matrix nearby has a larger `<P, w s^T> + temperature * entropy`."""
    scores, w = draw(5), 3 - torch.arange(1, 6).double()
    plan = sinkhorn.selection(scores, 5, 0.8, iterations=1000)

    def objective(p):
        return (p * w.unsqueeze(-1) * scores).sum() + 0.8 * torch.special.entr(p).sum()

    for seed in range(20):
        other = sinkhorn.selection(draw(5, seed=seed), 5, 1.0, iterations=1000)
        assert objective(0.99 * plan + 0.01 * other) < objective(plan)


def test_sinkhorn_rows_do_not_depend_on_k():
    scores = draw(3, 6)
    assert torch.equal(sinkhorn.selection(scores, 2, 0.5), sinkhorn.selection(scores, 6, 0.5)[:, :2])


def test_large_scores_keep_their_digits():
    scores = (draw(20, 6) * 100).round().float() / 1024
    close(sinkhorn(scores + 8192, 2, 0.05), sinkhorn(scores, 2, 0.05), tol=1e-5)


# Both


@pytest.mark.parametrize("operator", [soft, sinkhorn], ids=["soft", "sinkhorn"])
def test_bad_iterations(operator):
    for part in (operator, operator.selection):
        with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
            part(draw(2, 5), 3, 0.5, iterations=0)


def test_too_large_is_refused():
    with pytest.raises(ValueError, match=r"matrices n x n of scores .* and the limit is"):
        sinkhorn(torch.zeros(1).expand(10**5), 3)
