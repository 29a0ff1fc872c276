"""Sorting networks against the explicit product of their layer matrices, and what their options promise."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from references_networks import bitonic as reference_bitonic
from references_networks import odd_even as reference_odd_even

from topkbench.operators import entropic, hard_selection
from topkbench.operators._layers import bitonic_network, odd_even_network
from topkbench.operators.networks import bitonic, odd_even
from topkbench.testing._always import check_extremes

OPERATORS = {"odd_even": odd_even, "bitonic": bitonic}
STEPS = ("logistic", "logistic_phi", "gaussian", "reciprocal", "cauchy", "optimal")
over = pytest.mark.parametrize("name", OPERATORS)
steps = pytest.mark.parametrize("step", STEPS)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, tol=1e-9):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


# Readable twins: one row, float64, dense matrices


REFERENCES = {"odd_even": reference_odd_even, "bitonic": reference_bitonic}


@over
@steps
@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 11])
def test_reference(name, step, n):
    operator, reference = OPERATORS[name], REFERENCES[name]
    rows = torch.cat([draw(2, n), 20 * draw(1, n), draw(1, n).round()])
    for k in {1, (n + 1) // 2, n}:
        for temperature in (0.3, 3.0):
            expected = np.array([reference(row, k, temperature, step=step) for row in rows.numpy()])
            # The guard of the logistic_phi step is felt at 1e-10 of a difference.
            tol = 1e-6 if step == "logistic_phi" else 1e-10
            close(operator.selection(rows, k, temperature, step=step), expected, tol)
            close(operator(rows, k, temperature, step=step), expected.sum(-2), tol)


@over
def test_the_network_sorts(name):
    """Zeros and ones of all kinds, hence every input: the 0-1 principle."""
    for n in range(1, 11):
        bits = (torch.arange(2**n).unsqueeze(-1) >> torch.arange(n)) & 1
        # A tie may be broken either way, and half exchanged; the values are sorted.
        values = OPERATORS[name].values(bits.double(), n, 1e-3)
        close(values, bits.double().sort(descending=True).values)


def test_number_of_comparators():
    for n in (1, 2, 3, 6, 16, 17):
        assert odd_even_network(n).comparators == n * (n - 1) // 2
    assert bitonic_network(16).comparators == 10 * 8
    assert len(bitonic_network(16).layers) == len(bitonic_network(9).layers) == 10
    assert len(bitonic_network(1).layers) == 0


# Derivatives


@over
@steps
@pytest.mark.parametrize("n", [2, 5])
def test_derivatives_of_every_step(name, step, n):
    operator, temperature = OPERATORS[name], torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    scores = draw(2, n).requires_grad_()
    for part in (operator, operator.selection):

        def function(scores, temperature, part=part):
            return part(scores, (n + 1) // 2, temperature, step=step)

        assert torch.autograd.gradcheck(function, (scores, temperature))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            assert torch.autograd.gradgradcheck(function, (scores, temperature), atol=1e-4)


@over
def test_vectorised_jacobian(name):
    """The backward pass under vmap."""
    scores = draw(2, 5)
    for part in (OPERATORS[name], OPERATORS[name].selection):

        def function(scores, part=part):
            return part(scores, 2, 0.5)

        row_by_row = torch.autograd.functional.jacobian(function, scores)
        close(torch.func.jacrev(function)(scores), row_by_row, tol=1e-12)


@over
def test_nothing_given_is_written_to(name):
    scores, weights = draw(3, 6).requires_grad_(), draw(3, 6, seed=1)
    before, given = scores.detach().clone(), weights.clone()
    mask = OPERATORS[name](scores, 2, 0.5)
    first, second = (torch.autograd.grad(mask, scores, weights, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(scores, before)
    assert torch.equal(weights, given)


# Properties


@over
def test_two_scores_meet_once(name):
    scores = draw(5, 2)
    half = (scores - scores.flip(-1)) / 0.7
    close(OPERATORS[name](scores, 1, 0.7), half.sigmoid())
    close(OPERATORS[name](scores, 1, 0.7), entropic(scores, 1, 0.35))


@over
@steps
def test_doubly_stochastic(name, step):
    rows = OPERATORS[name].selection(5 * draw(20, 7), 7, 0.5, step=step)
    assert (rows >= 0).all()
    close(rows.sum(-1), torch.ones(20, 7))
    close(rows.sum(-2), torch.ones(20, 7))


@over
def test_the_streamed_mask_is_the_sum_of_the_rows(name):
    operator, scores = OPERATORS[name], draw(4, 13).requires_grad_()
    weights = draw(4, 13, seed=1)
    for k in (1, 5, 13):
        mask, rows = operator(scores, k, 0.4), operator.selection(scores, k, 0.4).sum(-2)
        close(mask, rows, tol=1e-12)
        gradients = (torch.autograd.grad((part * weights).sum(), scores)[0] for part in (mask, rows))
        close(*gradients, tol=1e-12)


@over
def test_rows_do_not_depend_on_k(name):
    scores = draw(3, 9)
    close(OPERATORS[name].selection(scores, 4, 0.5), OPERATORS[name].selection(scores, 9, 0.5)[:, :4], 1e-14)


@over
@steps
def test_low_temperature_is_hard(name, step):
    scores = draw(20, 6).argsort(-1).double()
    # Heavy tails leave a share of temperature / difference at each of up to 21 comparators of a wire.
    tol = 1e-9 if step in ("logistic", "gaussian") else 1e-3
    for k in (1, 3, 6):
        close(OPERATORS[name].selection(scores, k, 1e-5, step=step), hard_selection(scores, k), tol)


@over
def test_a_masked_score_spoils_no_other(name):
    scores = draw(3, 6).float()
    for far in (-1e9, -float("inf")):
        scores[:, 2] = far
        values = OPERATORS[name].values(scores.masked_fill(scores == far, -1e9), 3, 0.01)
        assert (OPERATORS[name](scores, 3, 0.01)[:, 2] == 0).all()
        close(values, scores.sort(descending=True).values[:, :3], tol=0.05)


def test_monotone_steps_make_monotone_comparators():
    """For two scores: the larger output does not fall when an input rises (Petersen et al. 2022)."""
    first = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    scores = torch.stack([first, torch.zeros_like(first)], -1)
    for step in STEPS:
        largest = odd_even.values(scores, 1, 1.0, step=step).squeeze(-1)
        assert (largest.diff() >= -1e-12).all() == (step in ("reciprocal", "cauchy", "optimal"))


@over
@steps
def test_extremes_of_every_step(name, step):
    operator = OPERATORS[name]
    bound = dataclasses.replace(
        operator,
        function=functools.partial(operator.function, step=step),
        streamed=functools.partial(operator.streamed, step=step),
    )
    check_extremes(bound)


# Keep: only the largest scores are sorted


@over
def test_keep_sorts_the_largest_alone(name):
    operator, scores = OPERATORS[name], draw(4, 12)
    largest, index = scores.topk(5)
    for part, axis in ((operator, index), (operator.selection, index.unsqueeze(-2).expand(4, 3, 5))):
        kept = part(scores, 3, 0.5, keep=5)
        close(kept.gather(-1, axis), part(largest, 3, 0.5), tol=1e-14)
        assert ((kept > 0).sum(-1) == 5).all()
    close(operator(scores, 3, 0.5, keep=5).sum(-1), torch.full((4,), 3))


@over
def test_keep_makes_it_equivariant(name):
    scores, order = draw(4, 8), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    mask = OPERATORS[name](scores, 3, 0.5, keep=8)
    close(OPERATORS[name](scores[:, order], 3, 0.5, keep=8), mask[:, order], tol=1e-14)
    close(OPERATORS[name](scores, 3, 0.5, keep=100), mask, tol=1e-14)


@over
def test_derivatives_with_keep(name):
    scores = draw(2, 7).requires_grad_()
    for part in (OPERATORS[name], OPERATORS[name].selection):

        def function(scores, part=part):
            return part(scores, 2, 0.7, keep=4)

        assert torch.autograd.gradcheck(function, scores)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            assert torch.autograd.gradgradcheck(function, scores)


@over
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": "linear"}, "step must be one of logistic, .*got 'linear'"),
        ({"step": "logistic_phi", "art": 1.0}, r"art must be in \[0, 1\), got 1.0"),
        ({"keep": 2}, "keep must be at least k = 3, got 2"),
    ],
)
def test_bad_options(name, options, message):
    for part in (OPERATORS[name], OPERATORS[name].selection):
        with pytest.raises(ValueError, match=message):
            part(draw(2, 5), 3, 0.5, **options)


def test_too_large_is_refused():
    with pytest.raises(ValueError, match=r"comparators of scores .* and the limit is"):
        odd_even(torch.zeros(1).expand(10**5), 3)
