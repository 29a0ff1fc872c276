"""Shifted top-k: against its definition, its closed gradient, and the continuity that it is for."""

import numpy as np
import pytest
import torch
from references_gates import shifted_topk as reference

from topkbench.operators import hard_mask, shifted_topk


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [2, 3, 8, 5000])
def test_reference(n):
    rows = torch.cat([draw(4, n), 1e4 * draw(1, n), 1e-6 * draw(1, n), draw(2, n).round(), torch.ones(1, n)])
    for k in {1, n // 2, n - 1}:
        expected = np.array([reference(row, k) for row in rows.numpy()])
        torch.testing.assert_close(shifted_topk(rows, k), torch.from_numpy(expected), rtol=0, atol=0)


@pytest.mark.parametrize("k", [1, 2, 4, torch.tensor([3, 1])])
def test_derivatives(k):
    scores = draw(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: shifted_topk(s, k), scores)
    assert torch.autograd.gradgradcheck(lambda s: shifted_topk(s, k).square(), scores)


def test_the_closed_gradient():
    scores, g, k = draw(6).requires_grad_(), draw(6, seed=1), 3
    (gradient,) = torch.autograd.grad(shifted_topk(scores, k), scores, g)
    kept, order = hard_mask(scores, k), scores.argsort(descending=True)
    expected = g * kept
    expected[order[k]] = -(g * kept).sum()
    torch.testing.assert_close(gradient, expected)
    assert gradient.sum().abs() < 1e-14


def test_k_are_kept_and_a_shift_changes_nothing():
    scores = draw(50, 9)
    for k in range(1, 9):
        values = shifted_topk(scores, k)
        assert torch.equal((values > 0).to(scores.dtype), hard_mask(scores, k))
        torch.testing.assert_close(shifted_topk(scores + 5, k), values)
        torch.testing.assert_close(shifted_topk(3 * scores, k), 3 * values)
        torch.testing.assert_close(shifted_topk(scores.flip(-1), k), values.flip(-1))
    tied = torch.tensor([1.0, 3.0, 1.0, 0.0])
    assert torch.equal(shifted_topk(tied, 2), torch.tensor([0.0, 2.0, 0.0, 0.0]))


def test_it_is_continuous_where_two_scores_swap():
    path = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    scores = torch.stack([path, -path, torch.full_like(path, 2.0), torch.full_like(path, -3.0)], -1)
    weight = torch.tensor([1.0, -7.0, 2.0, 5.0], dtype=torch.float64)
    loss = (shifted_topk(scores, 2) @ weight).square()
    jumping = ((scores * hard_mask(scores, 2)) @ weight).square()
    assert loss.diff().abs().max() < 0.2
    shifted = scores + 1
    assert (((shifted * hard_mask(shifted, 2)) @ weight).square() - jumping).abs().max() > 1
    assert ((shifted * hard_mask(shifted, 2)) @ weight).square().diff().abs().max() > 5


def test_the_autograd_gradient_is_that_of_the_mean_loss():
    """d/dt of a mean over x, by common random numbers: no flux is missing, as there is with s * hard."""
    x, weight = draw(400_000, 4, seed=3), torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    direction, h = torch.tensor([1.0, -0.5, 0.0, 0.2], dtype=torch.float64), 0.02

    def of(t, part):
        s = x * (1 + t * direction)
        return (part(s) @ weight).square().mean()

    for part, right in ((lambda s: shifted_topk(s, 2), True), (lambda s: s * hard_mask(s, 2), False)):
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(of(t, part), t)
        differences = (of(h, part) - of(-h, part)) / (2 * h)
        assert (abs(gradient - differences) < 2e-3 * abs(differences)) == right


def test_each_row_alone():
    scores, k = draw(2, 3, 6), torch.tensor([[1, 4, 5], [2, 2, 3]])
    together = shifted_topk(scores, k)
    for i, j in np.ndindex(2, 3):
        torch.testing.assert_close(together[i, j], shifted_topk(scores[i, j], int(k[i, j])))
    nested = shifted_topk(scores.unsqueeze(-2).expand(2, 3, 5, 6), torch.arange(1, 6))
    torch.testing.assert_close(nested[..., 2, :], shifted_topk(scores, 3))
    assert shifted_topk(draw(0, 4), 2).shape == (0, 4)
    assert shifted_topk(draw(0, 4), torch.zeros(0, dtype=torch.long)).shape == (0, 4)
    batched = torch.vmap(lambda s: shifted_topk(s, 2))(scores)
    torch.testing.assert_close(batched, shifted_topk(scores, 2))


def test_precision_infinite_scores_and_nan():
    for dtype in (torch.float32, torch.float64):
        assert shifted_topk(draw(3, 5).to(dtype), 2).dtype == dtype
    row = torch.tensor([torch.inf, 1.0, 0.0, -torch.inf])
    assert torch.equal(shifted_topk(row, 2), torch.tensor([torch.inf, 1.0, 0.0, 0.0]))
    assert torch.equal(shifted_topk(row, 3)[:3], torch.full((3,), torch.inf))
    scores = draw(3, 5)
    scores[1, 2] = torch.nan
    values = shifted_topk(scores, 2)
    assert values[1].isnan().any()
    assert not values[::2].isnan().any()


def test_bad_arguments():
    for k in (0, 5):
        with pytest.raises(ValueError, match=r"^k must be in \[1, 4\]"):
            shifted_topk(draw(4), k)
    for k in (4, torch.tensor([2, 4])):
        with pytest.raises(ValueError, match=r"^k must be in \[1, 3\] for 4 scores: no score is next"):
            shifted_topk(draw(2, 4), k)
    # Where nobody may look at k, a row that keeps everything has no value.
    hidden = torch.vmap(lambda s, k: shifted_topk(s, k))(draw(2, 4), torch.tensor([2, 4]))
    assert hidden[1].isnan().all()
    torch.testing.assert_close(hidden[0], shifted_topk(draw(2, 4)[0], 2))
    # Where signatures are checked as well (jaxtyping), by that text.
    with pytest.raises(TypeError, match=r"^scores must be floating point|typechecking parameter"):
        shifted_topk(torch.arange(4), 2)
