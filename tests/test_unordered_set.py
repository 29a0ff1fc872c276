"""The unordered-set estimator: its weights in the words of the source, and its mean over all draws."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import built
from enumeration import TEMPERATURE, log_law, outcomes, part_of
from references_gates import chance_of_set, unordered_set
from torch.func import grad

from topkbench.methods import ScoreFunction, ScoreFunctionWithoutReplacement, Step, UnorderedSet, _distinct
from topkbench.methods.unordered_set import weights
from topkbench.operators.sequential import Distinct
from topkbench.randomness import Normals

LAWS = ("conditional_poisson", "plackett_luce")


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B = rows(5, seed=1), rows(5, 5, seed=2)


def wild(mask, scores):
    n = mask.shape[-1]
    return (mask @ A[:n]).exp() + ((mask * scores) @ B[:n, :n] - A[:n]).square().sum(-1) * (
        mask[..., 0] - 0.3
    )


def of_values(values, scores):
    return (values[..., 0] * 1.5 - values[..., -1].square()).sin() + scores.square().sum(-1)


def expected_loss(scores, law, k, loss, wants):
    index = outcomes(law, len(scores), k)
    each = loss(part_of(index, scores, wants), scores.expand(len(index), -1))
    return (log_law(law, scores, index).exp() * each).sum()


def step_on(scores, loss, k, wants="mask", seed=0):
    scores = scores[None]
    W, x = scores.new_zeros(1, scores.shape[-1], 3), scores.new_zeros(1, scores.shape[1], 3)
    noise = Normals([seed], dtype=scores.dtype)
    return Step(W, x, scores, k, wants, lambda part: loss(part, scores), noise)


def close(actual, expected, tol=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tol, atol=tol)


# Weights


@pytest.mark.parametrize(("n", "size"), [(3, 2), (5, 2), (5, 3), (5, 4), (8, 5)])
def test_weights_are_leave_one_out_ratios(n, size):
    for seed in range(3):
        p = (2 * rows(n, seed=seed)).softmax(0)
        drawn, losses = list(range(size)), rows(size, seed=9)
        first, second = weights(p[:size].log(), torch.zeros(size, dtype=torch.bool), exact=False)
        expected, baselines = unordered_set(p.numpy(), drawn, losses.numpy())
        close(first, expected, 1e-9)
        close(second @ losses, baselines, 1e-9)
        close(first.sum(), 1.0)
        close(second.sum(1), torch.ones(size))


def test_weights_are_precise_where_one_outcome_has_nearly_all_the_chance():
    # Against rational numbers: p = 1 - 2^-40 - ..., of which floating point keeps 1 - p to 2^-53.
    from fractions import Fraction

    tiny = [Fraction(1, 2**30), Fraction(1, 2**31), Fraction(1, 2**29)]
    p = [1 - sum(tiny), *tiny]
    first, second = weights(
        torch.tensor([float(x) for x in p[:3]], dtype=torch.float64).log(),
        torch.zeros(3, dtype=torch.bool),
        exact=False,
    )
    exact = [
        p[s] * chance_of_set(p, [i for i in range(3) if i != s], (s,)) / chance_of_set(p, range(3))
        for s in range(3)
    ]
    close(first, [float(x) for x in exact], 1e-6)
    assert first[1] / float(exact[1]) == pytest.approx(1, rel=1e-5)
    close(second.sum(1), torch.ones(3))


def test_weights_stay_finite():
    for log_p in ([-1e-9, -1e5, -2e5], [-800.0, -801.0, -802.0], [-0.7, -0.7, -1e19]):
        first, second = weights(torch.tensor(log_p).double(), torch.zeros(3, dtype=torch.bool), exact=False)
        assert first.isfinite().all()
        close(first.sum(), 1.0, 1e-6)
        close(second.sum(1), torch.ones(3), 1e-6)
    # Outcomes of which none has a chance worth speaking of: as with replacement.
    close(
        first := weights(torch.full((4,), -800.0).double(), torch.zeros(4).bool(), exact=False)[0], [0.25] * 4
    )
    close(first.sum(), 1.0)


# The mean over all draws


def mean_over_draws(method, monkeypatch, law, n, k, loss, wants):
    """Value and gradient, in the mean over ordered draws of M outcomes without replacement."""
    scores, index = rows(n, seed=4), outcomes(law, n, k)
    p = log_law(law, scores, index).exp()
    draws = torch.tensor(list(itertools.permutations(range(len(index)), method.samples)))
    chance, left = torch.ones(len(draws), dtype=torch.float64), torch.ones(len(draws), dtype=torch.float64)
    for m in draws.T:
        chance, left = chance * p[m] / left, left - p[m]
    close(chance.sum(), 1.0)
    picks = index[draws.T][:, None]
    drawn = Distinct(picks, p[draws.T][:, None], torch.ones(draws.T.shape, dtype=torch.float64)[:, None])
    for name in ("distinct_subsets", "distinct_orders"):
        monkeypatch.setattr(_distinct, name, lambda *_: drawn)
    each = scores.expand(len(draws), n).clone().requires_grad_()
    surrogate = method(step_on(each, loss, k, wants))[0]
    (gradient,) = torch.autograd.grad((chance * surrogate).sum(), each)
    return scores, (chance * surrogate).sum().detach(), gradient.sum(0)


CATEGORICAL = [(n, 1, m) for n in (3, 4, 5) for m in (2, 3)]


@pytest.mark.parametrize(("loss", "wants"), [(wild, "mask"), (of_values, "values")])
@pytest.mark.parametrize(("n", "k", "samples"), [*CATEGORICAL, (5, 1, 4), (4, 2, 2), (4, 2, 3)])
@pytest.mark.parametrize("law", LAWS)
def test_unbiased(law, n, k, samples, loss, wants, monkeypatch):
    method = UnorderedSet(law, samples, TEMPERATURE)
    scores, value, gradient = mean_over_draws(method, monkeypatch, law, n, k, loss, wants)
    close(value, expected_loss(scores, law, k, loss, wants))
    close(gradient, grad(expected_loss)(scores, law, k, loss, wants))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("samples", "k"), [(2, 1), (3, 2), (6, 2)])
def test_draws_come_from_the_noise(law, samples, k):
    """The mean of many estimates is the gradient, within 4 standard errors; 1.2 times it is not."""
    scores = rows(5, seed=4)
    each = scores.expand(40_000, 5).clone().requires_grad_()
    method = UnorderedSet(law, samples, TEMPERATURE)
    value = method(step_on(each, wild, k, seed=samples))[0]
    gradients = torch.autograd.grad(value.sum(), each)[0]
    truth, error = grad(expected_loss)(scores, law, k, wild, "mask"), gradients.std(0) / len(each) ** 0.5
    assert ((gradients.mean(0) - truth) / error).abs().max() < 4
    assert ((gradients.mean(0) - 1.2 * truth) / error).abs().max() > 4


@pytest.mark.parametrize(("loss", "wants"), [(wild, "mask"), (of_values, "values")])
@pytest.mark.parametrize(("k", "samples"), [(1, 5), (1, 7), (2, 12), (4, 8), (5, 2)])
@pytest.mark.parametrize("law", LAWS)
def test_all_outcomes_give_the_exact_gradient(law, k, samples, loss, wants):
    if len(outcomes(law, 5, k)) > samples:
        pytest.skip("more outcomes than draws")
    scores = rows(3, 5, seed=4)
    leaf = scores.clone().requires_grad_()
    value = UnorderedSet(law, samples, TEMPERATURE)(step_on(leaf, loss, k, wants))[0]
    gradient = torch.autograd.grad(value.sum(), leaf)[0]
    for i in range(3):
        close(value[i].detach(), expected_loss(scores[i], law, k, loss, wants), 1e-9)
        close(gradient[i], grad(expected_loss)(scores[i], law, k, loss, wants), 1e-9)


def test_the_formula_of_one_row():
    law, k, M = "plackett_luce", 2, 3
    scores, index = rows(5, seed=4), outcomes("plackett_luce", 5, 2)
    leaf = scores[None].clone().requires_grad_()
    method, seen = UnorderedSet(law, M, TEMPERATURE), []

    def loss(mask, q):
        seen.append(mask)
        return wild(mask, q)

    value = method(step_on(leaf, loss, k))[0, 0]
    again = _distinct.drawn(step_on(scores[None], wild, k), law, TEMPERATURE, M)  # the same noise
    picks = again.picks
    place = [int((index == one).all(-1).nonzero()) for one in picks[:, 0, 0]]
    close(seen[0][:, 0, 0], part_of(index[place], scores, "mask"))
    p, losses = log_law(law, scores, index).exp(), wild(part_of(index[place], scores, "mask"), scores)
    first, baseline = unordered_set(p.numpy(), place, dict(zip(place, losses.numpy(), strict=True)))
    expected = torch.zeros(5, dtype=torch.float64)
    for m, which in enumerate(place):
        one = index[which : which + 1]
        expected += (
            first[m] * (losses[m] - baseline[m]) * grad(lambda s, w=which: log_law(law, s, index)[w])(scores)
        )
        expected += first[m] * grad(lambda s, one=one: wild(part_of(one, s.detach(), "mask"), s)[0])(scores)
    close(value.detach(), (torch.from_numpy(first) * losses).sum())
    close(torch.autograd.grad(value, leaf)[0][0], expected)


# What it is for


@pytest.mark.parametrize("law", LAWS)
def test_it_is_the_importance_weighted_value_with_the_order_averaged_out(law):
    """Row by row on the same draws: the same mean for each set, and less variance."""
    scores = rows(4, seed=4).expand(60_000, 4)
    ours, other = (
        method(step_on(scores, wild, 2, seed=3))[0]
        for method in (
            UnorderedSet(law, 3, TEMPERATURE),
            ScoreFunctionWithoutReplacement(law, 3, temperature=TEMPERATURE),
        )
    )
    for value in ours.unique().tolist()[:4]:
        of_set = other[ours == value]
        if len(of_set) > 100:
            assert (of_set.mean() - value).abs() < 4.5 * of_set.std() / len(of_set) ** 0.5
    assert ours.var() < other.var()


@pytest.mark.parametrize("law", LAWS)
def test_a_constant_added_to_the_loss_changes_nothing(law):
    leaf = rows(20, 6).requires_grad_()
    method = UnorderedSet(law, 4, TEMPERATURE)
    plain, shifted = (
        torch.autograd.grad(
            method(step_on(leaf, lambda z, _, c=c: (z @ rows(6, seed=7)).exp() + c, 2)).sum(), leaf
        )[0]
        for c in (0.0, 1000.0)
    )
    close(plain, shifted, 1e-8)


@pytest.mark.parametrize("law", LAWS)
def test_less_variance_than_its_peers(law):
    each = (2 * rows(5)).expand(4000, 5).clone().requires_grad_()
    ours, weighted, with_replacement = (
        torch.autograd.grad(method(step_on(each, wild, 2)).sum(), each)[0].var(0).sum()
        for method in (
            UnorderedSet(law, 4, TEMPERATURE),
            ScoreFunctionWithoutReplacement(law, 4, temperature=TEMPERATURE),
            ScoreFunction(law, 4, "leave_one_out", TEMPERATURE),
        )
    )
    assert ours < weighted
    assert ours < 0.5 * with_replacement


def test_many_outcomes_of_which_none_is_likely_are_leave_one_out():
    flat = torch.zeros(4, 60, dtype=torch.float64, requires_grad=True)
    weight, method = torch.arange(60).double().cos(), UnorderedSet(samples=5)
    seen = []

    def loss(z, _):
        seen.append(z)
        return (z @ weight).exp()

    (g,) = torch.autograd.grad(method(step_on(flat, loss, 12)).sum(), flat)
    masks = seen[0][:, 0]
    losses = (masks @ weight).exp()
    close(g, ((losses - losses.mean(0)).unsqueeze(-1) / 4 * (masks - 12 / 60)).sum(0), 1e-6)


# Contract


@pytest.mark.parametrize("law", LAWS)
def test_value_alone_is_the_same_in_either_precision(law):
    for dtype in (torch.float32, torch.float64):
        scores = rows(6, 5).to(dtype)

        def loss(mask, s, dtype=dtype):
            return (mask @ A.to(dtype)).exp()

        method = UnorderedSet(law)
        value = method(step_on(scores.clone().requires_grad_(), loss, 2))
        with torch.no_grad():
            close(method(step_on(scores, loss, 2)), value.detach())
        assert value.dtype == dtype


@pytest.mark.parametrize("law", LAWS)
def test_extreme_scores(law):
    for dtype in (torch.float32, torch.float64):
        for row in (
            [1e4, -1e4, 0.0, 1.0, 0.5],
            [torch.inf, 1.0, 0.5, -torch.inf, 0.0],
            [1.0] * 5,
            [60.0, 30.0, 0, -30, -60],
        ):
            scores = torch.tensor([row] * 20, dtype=dtype, requires_grad=True)
            for k in (1, 2, 4, 5):
                for samples in (2, 4, 9):
                    step = step_on(scores, lambda m, _: m.square().sum(-1) + m[..., 0], k)
                    value = UnorderedSet(law, samples)(step)
                    (g,) = torch.autograd.grad(value.sum(), scores)
                    assert value.isfinite().all()
                    assert g.isfinite().all()
                    assert (value >= k - 1e-3).all()
    nothing = UnorderedSet(law)(step_on(torch.tensor([[1.0, torch.nan, 0.0]]), lambda m, _: m.sum(-1), 1))
    assert nothing.isnan().all()


def test_each_replicate_has_its_own_temperature():
    scores, temperature = rows(3, 4, 5).requires_grad_(), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for law in LAWS:
        method = built("method", "unordered_set", law=law, temperature=temperature[:, None, None])
        noise = Normals([0, 1, 2], dtype=torch.float64)
        step = Step(rows(3, 5, 2), rows(3, 4, 2), scores, 2, "mask", lambda m: wild(m, scores), noise)
        together = torch.autograd.grad(method(step).sum(), scores)[0]
        for i in range(3):
            row = scores[i].detach().clone().requires_grad_()
            alone = UnorderedSet(law, temperature=temperature[i].item())(step_on(row, wild, 2, seed=i))
            close(together[i], torch.autograd.grad(alone.sum(), row)[0])


def test_bad_arguments_are_refused():
    for arguments, message in (
        ({"law": "poisson"}, "law must be one of conditional_poisson, plackett_luce, got poisson"),
        ({"samples": 1}, r"samples must be in \[2, 12\], got 1"),
        ({"samples": 13}, r"samples must be in \[2, 12\], got 13"),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0"),
    ):
        # Where signatures are checked as well (jaxtyping), an unknown name is refused by that text.
        with pytest.raises((ValueError, TypeError), match=f"{message}|typechecking parameter"):
            UnorderedSet(**arguments)


@pytest.mark.parametrize("samples", [2, 3, 8])
def test_the_published_code_of_sfess_takes_in_its_own_loss(samples):
    """Its baseline indexes with ~i, which turns an index around: the mean of all, (M - 1) / M of ours."""
    losses, log_p = rows(samples, 6), rows(samples, 6, seed=1).requires_grad_()
    i = torch.arange(samples)
    published = (log_p * (losses - losses[~i].mean(0))).mean(0)
    others = (losses.sum(0) - losses) / (samples - 1)
    leave_one_out = (log_p * (losses - others)).mean(0)
    close(published.detach(), (samples - 1) / samples * leave_one_out.detach())
    assert math.isclose(float(np.mean(others.numpy())), float(losses.mean()))
