"""The relaxed dynamic program against its own value, cell by cell, and against the exact marginals."""

import functools

import numpy as np
import pytest
import torch
from references_uncapped import dp_gini as reference
from references_uncapped import maximum_gini, table

from topkbench.operators import dp_gini, dynamic_program, marginals, sparsemax


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, tol=1e-9):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def slopes(row, k, temperature, maximum, h=1e-6):
    """Central differences of V[n][k], for the scores and the temperature that belong to it."""

    def value(scores):
        return temperature * table(scores / temperature, k, maximum)[-1, k]

    steps = h * np.eye(len(row))
    return np.array([(value(row + step) - value(row - step)) / (2 * h) for step in steps])


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_the_mask_is_the_slope_of_the_value(n, temperature):
    for row in draw(3, n):
        for k in {1, min(2, n), max(n - 1, 1), n}:
            expected = slopes(row.numpy(), k, temperature, maximum_gini)
            close(dp_gini(row, k, temperature), expected, tol=1e-7)


def test_with_shannons_entropy_the_value_has_the_marginals_for_its_slope():
    row = draw(7)
    for k in (1, 3, 6):
        close(marginals(row, k, 0.7), slopes(row.numpy(), k, 0.7, np.logaddexp), tol=1e-7)


def test_with_shannons_entropy_the_same_passes_give_the_marginals(monkeypatch):
    monkeypatch.setattr(dynamic_program, "_share", torch.sigmoid)
    monkeypatch.setattr(
        dynamic_program, "_gain", lambda apart: torch.nn.functional.softplus(-apart.abs(), threshold=800)
    )
    scores = draw(4, 20)
    for k in (1, 2, 10, 19, 20):
        for temperature in (0.1, 1.0, 10.0):
            close(dp_gini(scores, k, temperature), marginals(scores, k, temperature), tol=1e-10)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 5.0])
def test_reference(temperature):
    rows = torch.cat([draw(4, 30), 10 * draw(2, 30), torch.zeros(1, 30), draw(2, 30).round()])
    for k in (1, 2, 15, 29, 30):
        expected = np.array([reference(row, k, temperature) for row in rows.numpy()])
        close(dp_gini(rows, k, temperature), expected)


def test_of_two_it_is_sparsemax():
    scores = draw(20, 2)
    close(dp_gini(scores, 1, 0.8), sparsemax(scores, 1, 0.8))


def test_of_three_equal_scores_the_last_has_more():
    # The first two have 1/2 each, with value T / 4 above that of one alone, which the third has to beat.
    third = (1 - 1 / 4) / 2
    close(dp_gini(torch.zeros(3, dtype=torch.float64), 1), [(1 - third) / 2, (1 - third) / 2, third])
    close(dp_gini(draw(3), 1, 1e9), [(1 - third) / 2, (1 - third) / 2, third], tol=1e-8)


def test_another_order_is_another_mask():
    scores = draw(30, 8)
    apart = dp_gini(scores, 3, 1.0) - dp_gini(scores.flip(-1), 3, 1.0).flip(-1)
    assert 0.02 < apart.abs().max() < 0.5


def test_zeros_and_ones_are_exact():
    mask = dp_gini(draw(200), 20, 0.1)
    assert (mask == 0).sum() > 100
    assert (mask == 1).sum() > 5
    assert ((mask > 0) & (mask < 1)).any()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_jacobian_is_that_of_a_convex_function(k):
    jacobian = torch.autograd.functional.jacobian(lambda s: dp_gini(s, k, 0.8), draw(6))
    close(jacobian, jacobian.mT)
    close(jacobian.sum(-1), torch.zeros(6))
    assert torch.linalg.eigvalsh(jacobian).min() > -1e-12


@pytest.mark.parametrize("k", [1, 2, 4, 5, torch.tensor([2, 4])])
def test_derivatives(k):
    scores = draw(2, 5).requires_grad_()
    for temperature in (0.4, 2.0):
        hot = torch.full((2, 1), temperature, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda s, t: dp_gini(s, k, t), (scores, hot))
        assert torch.autograd.gradgradcheck(lambda s, t: dp_gini(s, k, t), (scores, hot))


@pytest.mark.parametrize("infinite", [[0], [6], [2, 5], [0, 1, 2]])
def test_scores_of_minus_infinity_change_nothing(infinite):
    scores = draw(7)
    full = scores.clone()
    full[infinite] = -torch.inf
    rest = [i for i in range(7) if i not in infinite]
    for k in (1, 3, 4):
        for dtype in (torch.float64, torch.float32):
            mask = dp_gini(full.to(dtype), k, 0.6)
            assert (mask[infinite] == 0).all()
            close(mask[rest], dp_gini(scores[rest].to(dtype), k, 0.6), tol=1e-5)


def test_large_scores_keep_their_digits():
    scores = draw(5, 50)
    sparse = torch.where(torch.arange(50) % 7 == 0, 1e12, 0) + scores  # 8 of them
    others = torch.arange(50) % 7 != 0
    close(dp_gini(sparse, 12, 0.6)[:, others], dp_gini(scores[:, others], 4, 0.6), tol=1e-3)
    close(dp_gini(sparse, 12, 0.6)[:, ~others], torch.ones(5, 8))


def test_a_table_that_is_too_large_is_refused():
    scores = torch.zeros(1).expand(60000)
    with pytest.raises(ValueError, match=r"^the dynamic program of scores .* takes 13.4 GiB, and the limit"):
        dp_gini(scores, 60000)
    with pytest.raises(ValueError, match="the dynamic program"):
        functools.partial(dp_gini.function, torch.zeros(1).expand(60000, 1, 60000))(torch.arange(1, 3))
