"""The splitter selection network against the explicit product of its layer matrices."""

import numpy as np
import pytest
import torch
from references_splitter import splitter as reference
from references_splitter import splitter_pairs

from topkbench.operators import hard_selection, splitter
from topkbench.operators._layers import bitonic_network
from topkbench.operators._splitter import selection_pairs, splitter_network

STEPS = ("logistic", "logistic_phi", "gaussian", "reciprocal", "cauchy", "optimal")
steps = pytest.mark.parametrize("step", STEPS)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, tol=1e-9):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


@steps
@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 11])
def test_reference(step, n):
    rows = torch.cat([draw(2, n), 20 * draw(1, n), draw(1, n).round()])
    for k in {1, 2, (n + 1) // 2, n} & set(range(1, n + 1)):
        for temperature in (0.3, 3.0):
            expected = np.array([reference(row, k, temperature, step=step) for row in rows.numpy()])
            # The guard of the logistic_phi step is felt at 1e-10 of a difference.
            tol = 1e-6 if step == "logistic_phi" else 1e-10
            close(splitter.selection(rows, k, temperature, step=step), expected, tol)
            close(splitter(rows, k, temperature, step=step), expected.sum(-2), tol)


def test_the_network_selects_in_order():
    """Zeros and ones of all kinds, hence every input: the 0-1 principle."""
    for n in range(1, 11):
        bits = ((torch.arange(2**n).unsqueeze(-1) >> torch.arange(n)) & 1).double()
        for k in range(1, n + 1):
            # A tie may be broken either way, and half exchanged; the values are sorted.
            values = splitter.values(bits, k, 1e-3)
            close(values, bits.sort(descending=True).values[:, :k])


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (7, 3), (16, 5), (33, 33), (100, 4)])
def test_pairs(n, k):
    """As many comparators as of the twin; in a layer no wire is in two of them; no more than for more."""
    layers = selection_pairs(n, k)
    count = sum(len(high) for high, _ in layers)
    assert count == sum(map(len, splitter_pairs(n, k))) == splitter_network(n, k).comparators
    for layer in layers:
        wires = np.concatenate(layer)
        assert len(np.unique(wires)) == len(wires)
    assert count <= splitter_network(n, min(k + 1, n)).comparators


def test_number_of_comparators():
    assert splitter_network(16, 1).comparators == 4 * 8
    assert splitter_network(16, 5).comparators == 50 < bitonic_network(16).comparators


@steps
def test_derivatives_of_every_step(step):
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    scores = draw(2, 5).requires_grad_()
    for part in (splitter, splitter.selection):

        def function(scores, temperature, part=part):
            return part(scores, 2, temperature, step=step)

        assert torch.autograd.gradcheck(function, (scores, temperature))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            assert torch.autograd.gradgradcheck(function, (scores, temperature), atol=1e-4)


def test_vectorised_jacobian():
    """The backward pass under vmap."""
    scores = draw(2, 6)
    for part in (splitter, splitter.selection):

        def function(scores, part=part):
            return part(scores, 2, 0.5)

        row_by_row = torch.autograd.functional.jacobian(function, scores)
        close(torch.func.jacrev(function)(scores), row_by_row, tol=1e-12)


def test_the_streamed_mask_is_the_sum_of_the_rows():
    scores, weights = draw(4, 13).requires_grad_(), draw(4, 13, seed=1)
    for k in (1, 5, 13):
        mask, rows = splitter(scores, k, 0.4), splitter.selection(scores, k, 0.4).sum(-2)
        close(mask, rows, tol=1e-12)
        gradients = (torch.autograd.grad((part * weights).sum(), scores)[0] for part in (mask, rows))
        close(*gradients, tol=1e-12)


def test_rows_do_not_depend_on_k():
    """A network for more than k has more comparators, but none that the first k rows pass."""
    scores = draw(3, 13)
    everything = splitter.selection(scores, 13, 0.5)
    for k in range(1, 13):
        close(splitter.selection(scores, k, 0.5), everything[:, :k], 1e-14)


@steps
def test_low_temperature_is_hard(step):
    scores = draw(20, 6).argsort(-1).double()
    # Heavy tails leave a share of temperature / difference at each comparator.
    tol = 1e-9 if step in ("logistic", "gaussian") else 1e-3
    for k in (1, 3, 6):
        close(splitter.selection(scores, k, 1e-5, step=step), hard_selection(scores, k), tol)


def test_nothing_given_is_written_to():
    scores, weights = draw(3, 6).requires_grad_(), draw(3, 6, seed=1)
    before, given = scores.detach().clone(), weights.clone()
    mask = splitter(scores, 2, 0.5)
    first, second = (torch.autograd.grad(mask, scores, weights, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(scores, before)
    assert torch.equal(weights, given)


def test_keep_selects_from_the_largest_alone():
    scores = draw(4, 12)
    largest, index = scores.topk(5)
    for part, axis in ((splitter, index), (splitter.selection, index.unsqueeze(-2).expand(4, 3, 5))):
        kept = part(scores, 3, 0.5, keep=5)
        close(kept.gather(-1, axis), part(largest, 3, 0.5), tol=1e-14)
        assert ((kept > 0).sum(-1) == 5).all()
    close(splitter(scores, 3, 0.5, keep=5).sum(-1), torch.full((4,), 3))


def test_a_k_for_each_row_may_exceed_what_is_kept():
    scores = draw(3, 6)
    mask = splitter(scores, torch.tensor([1, 3, 6]), 0.5, keep=4)
    close(mask.sum(-1), torch.tensor([1, 3, 4]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": "linear"}, "step must be one of logistic, .*got 'linear'"),
        ({"keep": 2}, "keep must be at least k = 3, got 2"),
    ],
)
def test_bad_options(options, message):
    for part in (splitter, splitter.selection):
        with pytest.raises(ValueError, match=message):
            part(draw(2, 5), 3, 0.5, **options)
