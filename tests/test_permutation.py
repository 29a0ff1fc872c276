"""NeuralSort and SoftSort: readable twins, masks made without all rows, ties, and what the rows say."""

import functools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from references_permutation import neuralsort as reference_neuralsort
from references_permutation import softsort as reference_softsort

from topkbench.operators import _rowwise, _softsort, hard_selection, permutation
from topkbench.operators._spread import spread
from topkbench.operators.permutation import neuralsort, softsort

Array = NDArray[np.float64]

squared = functools.partial(softsort, power=2)
squared_rows = functools.partial(softsort.selection, power=2)
MASKS = {"neuralsort": neuralsort, "softsort": softsort, "softsort, power 2": squared}
ROWS = {"neuralsort": neuralsort.selection, "softsort": softsort.selection, "softsort, power 2": squared_rows}
BOTH = [pytest.param(MASKS[name], ROWS[name], id=name) for name in MASKS]
TIED = torch.tensor([[1.0, 0, 1, 0, 0, -1], [2, 2, 2, 2, 2, 2], [0, 0, 1, 1, 0, 1]], dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, tol=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


# References: one row, (k, n)


REFERENCES = [
    pytest.param(neuralsort, reference_neuralsort, id="neuralsort"),
    pytest.param(softsort, reference_softsort, id="softsort"),
]


@pytest.fixture
def _a_row_at_a_time(monkeypatch):
    """As for long rows: no mask by way of its rows, and blocks of one or a few."""
    monkeypatch.setattr(permutation, "FEW", 0)
    monkeypatch.setattr(permutation, "BLOCK", 0)
    monkeypatch.setattr(_softsort, "CACHE", 1)
    whole = _rowwise.blocks
    monkeypatch.setattr(_rowwise, "blocks", lambda rows, each: whole(rows, each, 2 * each))
    monkeypatch.setattr(_rowwise, "GROUP", 3)


@pytest.mark.parametrize(("op", "reference"), REFERENCES)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_reference(op, reference, n, temperature):
    rows = torch.cat([draw(3, n), 20 * draw(1, n), torch.zeros(1, n), draw(1, n).round()])
    for k in range(1, n + 1):
        expected = np.array([reference(row, k, temperature) for row in rows.numpy()])
        close(op.selection(rows, k, temperature), expected)
        close(op(rows, k, temperature), expected.sum(-2))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_reference_with_squares(temperature):
    rows = draw(3, 7)
    expected = np.array([reference_softsort(row, 4, temperature, 2) for row in rows.numpy()])
    close(squared_rows(rows, 4, temperature), expected)
    close(squared(rows, 4, temperature), expected.sum(-2))


# Masks without all rows


@pytest.mark.usefixtures("_a_row_at_a_time")
@pytest.mark.parametrize(("mask", "rows"), BOTH)
@pytest.mark.parametrize("k", [1, 2, 5, 6, torch.tensor([1, 6, 3])])
def test_streamed_mask_is_the_sum_of_rows(mask, rows, k):
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for scores in (draw(3, 6), 30 * draw(3, 6, seed=1), TIED):
        leaf = scores.clone().requires_grad_()
        counts = torch.as_tensor(k).expand(3)
        whole = rows(leaf, 6, temperature)
        taken = (torch.arange(6) < counts[:, None]).to(whole.dtype)
        expected = (whole * taken[..., None]).sum(-2)
        actual = mask(leaf, k, temperature)
        close(actual, expected)
        cotangent = draw(3, 6, seed=2)
        gradients = torch.autograd.grad(actual, (leaf, temperature), cotangent)
        for gradient, of_rows in zip(
            gradients, torch.autograd.grad(expected, (leaf, temperature), cotangent), strict=True
        ):
            close(gradient, of_rows, tol=1e-11)


@pytest.mark.usefixtures("_a_row_at_a_time")
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("k", [1, 3, 5, torch.tensor([2, 5])])
def test_streamed_derivatives(mask, k):
    scores = draw(2, 5).requires_grad_()
    hot = torch.tensor([[0.4], [1.1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, t: mask(s, k, t), (scores, hot))
    assert torch.autograd.gradgradcheck(lambda s, t: mask(s, k, t), (scores, hot))


@pytest.mark.usefixtures("_a_row_at_a_time")
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_streamed_in_single_precision_and_under_vmap(mask):
    scores = draw(4, 3, 6)
    close(mask(scores.float(), 3, 0.5), mask(scores, 3, 0.5), tol=1e-5)
    hot = torch.tensor([0.3, 0.5, 1.0, 2.0], dtype=torch.float64)
    mapped = torch.vmap(lambda s, t: mask(s, 3, t))(scores, hot)
    close(mapped, torch.stack([mask(s, 3, t) for s, t in zip(scores, hot, strict=True)]))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_long_rows(mask):
    scores = draw(2, 20000)
    k = 150  # the rows would be 6 million numbers
    total = mask(scores.float(), k, 0.01).double().sum(-1)
    close(total, torch.full((2,), float(k)), tol=1e-5)
    close(mask(scores.float(), k, 0.01).double(), mask(scores, k, 0.01), tol=2e-2)


# Ties and derivatives


@pytest.mark.parametrize(("name", "k"), [(name, k) for name in MASKS for k in (1, 2, 3, 5)])
def test_gradients_are_equal_where_scores_are(name, k):
    for row in TIED:
        kth, following = row.sort(descending=True).values[[k - 1, k]]
        # SoftSort has to choose one of them as its last anchor.
        if name == "neuralsort" or kth > following:
            leaf = row.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(MASKS[name](leaf, k, 0.6).square().sum(), leaf)
            for value in row.unique():
                among = gradient[row == value]
                close(among, among.mean().expand_as(among))


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("k", [1, 2, 4])
def test_rows_have_derivatives(rows, k):
    scores = draw(2, 4).requires_grad_()
    hot = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, t: rows(s, k, t), (scores, hot))
    assert torch.autograd.gradgradcheck(lambda s, t: rows(s, k, t), (scores, hot))


def test_spread():
    for u in (draw(3, 7), TIED, draw(2, 1)):
        leaf = u.clone().requires_grad_()
        plain = (leaf.unsqueeze(-1) - leaf.unsqueeze(-2)).abs().sum(-1)
        actual = spread(leaf, leaf.detach())
        close(actual, plain)
        g = draw(*u.shape, seed=3)
        (gradient,) = torch.autograd.grad(actual, leaf, g)
        close(gradient, torch.autograd.grad(plain, leaf, g)[0])


# What they are known for


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_low_temperature_is_hard(rows):
    scores = draw(5, 9)
    close(rows(scores, 9, 1e-6), hard_selection(scores, 9))


@pytest.mark.parametrize("op", [neuralsort, softsort])
def test_a_larger_score_may_get_less(op):
    mask = op(torch.tensor([5, 1, 0.9, 0.8, 0.7], dtype=torch.float64), 3, 5.0)
    assert mask[0] < mask[1:4].min()


@pytest.mark.parametrize(("k", "op"), [(k, op) for k in (1, 2) for op in (neuralsort, softsort)])
def test_scale_of_scores_is_that_of_the_temperature(k, op):
    scores = draw(6)
    close(op(3 * scores, k, 3 * 0.4), op(scores, k, 0.4))


def test_first_row_of_softsort_is_softmax():
    scores = draw(4, 6)
    close(softsort.selection(scores, 3, 0.3)[..., 0, :], (scores / 0.3).softmax(-1))


def test_two_scores():
    scores = draw(5, 2)
    apart = (scores - scores.flip(-1)) / 0.7
    close(neuralsort(scores, 1, 0.7), apart.sigmoid())
    close(softsort(scores, 1, 0.7), apart.sigmoid())


@pytest.mark.parametrize("power", [0, 3, 1.5])
def test_other_powers_are_refused(power):
    for part in (softsort, softsort.selection):
        with pytest.raises((ValueError, TypeError), match="power"):
            part(draw(4), 2, power=power)


@pytest.mark.parametrize("op", [neuralsort, softsort])
def test_rows_that_do_not_fit_are_refused(op, monkeypatch):
    monkeypatch.setattr("topkbench.operators._contract.LIMIT", 1000)
    with pytest.raises(ValueError, match="a selection of 50 rows"):
        op.selection(draw(100), 50)
