"""Distinct draws: their law, and the estimate made of them, against enumeration of all outcomes."""

import pytest
import torch
from conftest import built
from enumeration import TEMPERATURE, log_law, outcomes, part_of
from torch.func import grad

from topkbench.methods import ScoreFunction, ScoreFunctionWithoutReplacement, Step
from topkbench.operators import plackett_luce, subset
from topkbench.operators.sequential import distinct_orders, distinct_subsets
from topkbench.randomness import Normals

N, K = 5, 2
LAWS = {"conditional_poisson": distinct_subsets, "plackett_luce": distinct_orders}
MANY = 40_000


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SCORES, A, B = rows(N), rows(N, seed=1), rows(N, N, seed=2)


def wild(mask, scores):
    return (mask @ A).exp() + ((mask * scores) @ B - A).square().sum(-1) * (mask[..., 0] - 0.3)


def of_values(values, scores):
    return (values[..., 0] * 1.5 - values[..., 1]).sin() + scores.square().sum(-1)


CASES = [(law, loss, wants) for law in LAWS for loss, wants in ((wild, "mask"), (of_values, "values"))]


def expected_loss(scores, law, loss, wants):
    index = outcomes(law, N, K)
    part = part_of(index, scores, wants)
    return (log_law(law, scores, index).exp() * loss(part, scores.expand(len(index), -1))).sum()


def step_on(scores, loss, wants="mask", k=K, seed=0):
    scores = scores[None]
    W, x = scores.new_zeros(1, scores.shape[-1], 3), scores.new_zeros(1, scores.shape[1], 3)
    noise = Normals([seed], dtype=scores.dtype)
    return Step(W, x, scores, k, wants, lambda part: loss(part, scores), noise)


def draws(law, scores, k, samples, temperature=TEMPERATURE, seed=0):
    noise = Normals([seed], dtype=scores.dtype)

    def waits(item, beams):
        return noise(f"item {item}", *scores.shape[:-1], beams, scores.shape[-1], law="exponential")[0]

    return LAWS[law](scores, k, temperature, samples, waits)


def codes(index):
    """A number for each outcome."""
    return (index * 10 ** torch.arange(index.shape[-1])).sum(-1)


def close(actual, expected, tol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


# The draws


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (5, 2), (5, 4), (5, 5)])
@pytest.mark.parametrize("law", LAWS)
def test_probabilities_are_those_of_the_law(law, n, k):
    scores, index = rows(n, seed=3), outcomes(law, n, k)
    drawn = draws(law, scores, k, 200)
    alive = drawn.weight > 0
    assert alive.sum() == len(index)
    assert sorted(codes(drawn.picks[alive]).tolist()) == sorted(codes(index).tolist())
    of_law = dict(zip(codes(index).tolist(), log_law(law, scores, index).exp(), strict=True))
    close(drawn.p[alive], torch.stack([of_law[code] for code in codes(drawn.picks[alive]).tolist()]))
    close(drawn.weight[alive], drawn.p[alive])  # nothing is left out: every chance to be among them is 1


@pytest.mark.parametrize("law", LAWS)
def test_draws_are_distinct_and_the_first_has_the_law(law):
    index = outcomes(law, N, K)
    drawn = codes(draws(law, SCORES.expand(MANY, N), K, 3).picks)
    assert (drawn[0] != drawn[1]).all()
    assert (drawn[0] != drawn[2]).all()
    assert (drawn[1] != drawn[2]).all()
    p = log_law(law, SCORES, index).exp()
    counts = (drawn[0].unsqueeze(-1) == codes(index)).double().sum(0)
    error = (MANY * p * (1 - p)).sqrt()
    assert ((counts - MANY * p) / error).abs().max() < 4
    # Without replacement the second is p over what the first left, in the mean over the first.
    second = p * ((p / (1 - p)).sum() - p / (1 - p))
    counts = (drawn[1].unsqueeze(-1) == codes(index)).double().sum(0)
    assert ((counts - MANY * second) / (MANY * second * (1 - second)).sqrt()).abs().max() < 4
    assert ((counts - MANY * p) / error).abs().max() > 4


@pytest.mark.parametrize("samples", [1, 2, 4, 9])
@pytest.mark.parametrize("law", LAWS)
def test_weights_are_unbiased_for_every_outcome(law, samples):
    index = outcomes(law, N, K)
    drawn = draws(law, SCORES.expand(MANY, N), K, samples)
    each = ((codes(drawn.picks).unsqueeze(-1) == codes(index)) * drawn.weight.unsqueeze(-1)).sum(0)
    p = log_law(law, SCORES, index).exp()
    error = each.std(0) / MANY**0.5 + 1e-12  # the likeliest outcome is always drawn, with its probability
    assert ((each.mean(0) - p) / error).abs().max() < 4


def test_long_rows_against_the_marginals():
    """The first draws of 200 scores: counts of each item, and the probabilities that come with them."""
    scores = rows(200, seed=5)
    drawn = draws("conditional_poisson", scores.expand(2000, -1), 20, 2, 1.0)
    masks = torch.zeros(2000, 200, dtype=torch.float64).scatter(1, drawn.picks[0], 1)
    mean = subset.marginals(scores, 20, 1.0)
    assert ((masks.mean(0) - mean) / (mean * (1 - mean) / 2000).sqrt()).abs().max() < 4.5
    close(drawn.p[0].log(), subset.log_probability(scores, masks, 20, 1.0), tol=1e-8)


@pytest.mark.parametrize("law", LAWS)
def test_infinite_huge_and_missing_scores(law):
    for row, k, allowed in (
        ([-torch.inf, 1.0, 3.0, 3.0], 2, {1, 2, 3}),
        ([torch.inf, 2.0, 2.0, -torch.inf], 2, {0, 1, 2}),
        ([1e4, 3.0, -1e4, -1e4], 2, {0, 1}),
    ):
        for dtype in (torch.float32, torch.float64):
            drawn = draws(law, torch.tensor(row, dtype=dtype), k, 8)
            assert set(drawn.picks[drawn.weight > 1e-6].flatten().tolist()) <= allowed
            close(drawn.weight.sum(), torch.ones((), dtype=dtype), tol=1e-5)
            assert drawn.picks.sort(-1).values.diff(dim=-1).min() > 0
    assert draws(law, torch.tensor([1.0, torch.nan, 0.0]), 2, 3).weight.isnan().any()


# The estimate


@pytest.mark.parametrize(("law", "loss", "wants"), CASES)
@pytest.mark.parametrize("samples", [10, 20, 33])
def test_all_outcomes_give_the_exact_gradient(law, loss, wants, samples):
    samples = max(samples, len(outcomes(law, N, K)))
    scores = SCORES.expand(3, N).clone().requires_grad_()
    value = ScoreFunctionWithoutReplacement(law, samples, temperature=TEMPERATURE)(
        step_on(scores, loss, wants)
    )[0]
    truth = grad(expected_loss)(SCORES, law, loss, wants)
    close(value.detach(), expected_loss(SCORES, law, loss, wants).expand(3), tol=1e-9)
    close(torch.autograd.grad(value.sum(), scores)[0], truth.expand(3, N), tol=1e-9)


@pytest.mark.parametrize("samples", [2, 4, 9])
@pytest.mark.parametrize(("law", "loss", "wants"), CASES)
def test_unbiased(law, loss, wants, samples):
    """The mean of many estimates is the gradient, within 4 standard errors; 1.2 times it is not."""
    method = ScoreFunctionWithoutReplacement(law, samples, temperature=TEMPERATURE)
    scores = SCORES.expand(MANY, N).clone().requires_grad_()
    value = method(step_on(scores, loss, wants, seed=samples))[0]
    gradients = torch.autograd.grad(value.sum(), scores)[0]
    truth = grad(expected_loss)(SCORES, law, loss, wants)
    error = gradients.std(0) / MANY**0.5
    assert ((gradients.mean(0) - truth) / error).abs().max() < 4
    assert ((gradients.mean(0) - 1.2 * truth) / error).abs().max() > 4
    value = value.detach()
    assert (value.mean() - expected_loss(SCORES, law, loss, wants)).abs() < 4 * value.std() / MANY**0.5


def test_the_formula_of_one_row():
    law, k, M = "plackett_luce", 2, 3
    scores = SCORES.clone().requires_grad_()
    method = ScoreFunctionWithoutReplacement(law, M, temperature=TEMPERATURE)
    value = method(step_on(scores[None], wild))[0, 0]
    drawn = draws(law, SCORES[None], k, M)
    index, w = drawn.picks[:, 0], drawn.weight[:, 0]
    p = log_law(law, SCORES, index).exp()
    losses = wild(part_of(index, SCORES, "mask"), SCORES)
    expected = torch.zeros(N, dtype=torch.float64)
    for m in range(M):
        one = index[m : m + 1]
        score = grad(lambda s, one=one: log_law(law, s, one)[0])(SCORES)
        others = sum(w[j] * losses[j] for j in range(M) if j != m)
        expected += w[m] * (losses[m] * (1 - p[m]) - others) * score
        expected += w[m] * grad(lambda s, one=one: wild(part_of(one, SCORES, "mask"), s)[0])(SCORES)
    close(value.detach(), (w * losses).sum())
    close(torch.autograd.grad(value, scores)[0], expected)


@pytest.mark.parametrize(("law", "loss", "wants"), CASES)
def test_normalized_with_all_outcomes_is_exact(law, loss, wants):
    scores = SCORES.expand(3, N).clone().requires_grad_()
    method = ScoreFunctionWithoutReplacement(law, 20, normalized=True, temperature=TEMPERATURE)
    value = method(step_on(scores, loss, wants))[0]
    truth = grad(expected_loss)(SCORES, law, loss, wants)
    close(value.detach(), expected_loss(SCORES, law, loss, wants).expand(3), tol=1e-9)
    close(torch.autograd.grad(value.sum(), scores)[0], truth.expand(3, N), tol=1e-9)


def test_the_normalized_formula_of_one_row():
    law, M = "conditional_poisson", 3
    scores = SCORES.clone().requires_grad_()
    method = ScoreFunctionWithoutReplacement(law, M, normalized=True, temperature=TEMPERATURE)
    value = method(step_on(scores[None], wild))[0, 0]
    drawn = draws(law, SCORES[None], K, M)
    masks, w, p = part_of(drawn.picks[:, 0], SCORES, "mask"), drawn.weight[:, 0], drawn.p[:, 0]
    losses, mean = wild(masks, SCORES), subset.marginals(SCORES, K, TEMPERATURE)
    expected = torch.zeros(N, dtype=torch.float64)
    for m in range(M):
        gain = (losses[m] - w @ losses / w.sum()) / (w.sum() - w[m] + p[m])
        expected += w[m] * gain * (masks[m] - mean) / TEMPERATURE
        expected += w[m] / w.sum() * grad(lambda s, z=masks[m]: wild(z, s))(SCORES)
    close(value.detach(), w @ losses / w.sum())
    close(torch.autograd.grad(value, scores)[0], expected)


@pytest.mark.parametrize("law", LAWS)
def test_normalized_of_many_outcomes_is_leave_one_out(law):
    """Where no outcome is likely; and there a constant added to the loss changes nothing."""
    flat = torch.zeros(4, 60, dtype=torch.float64, requires_grad=True)
    method = ScoreFunctionWithoutReplacement(law, 5, normalized=True)
    weight = torch.arange(60).double().cos()
    gradients = [
        torch.autograd.grad(
            method(step_on(flat, lambda z, _, c=c: (z @ weight).exp() + c, k=12)).sum(), flat
        )[0]
        for c in (0.0, 100.0)
    ]
    close(*gradients, tol=1e-6)
    masks = torch.zeros(5, 4, 60, dtype=torch.float64)
    picks = draws(law, flat.detach(), 12, 5, 1.0).picks
    masks = masks.scatter(-1, picks, 1)
    losses = (masks @ weight).exp()
    leaf = flat.detach().clone().requires_grad_()
    log_p = (
        subset.log_probability(leaf, masks, 12)
        if law == "conditional_poisson"
        else plackett_luce.log_probability(leaf, picks)
    )
    term = ((losses - losses.mean(0)) / 4 * log_p).sum()
    close(gradients[0], torch.autograd.grad(term, leaf)[0], tol=1e-6)


@pytest.mark.parametrize("law", LAWS)
def test_weights_of_many_outcomes_sum_to_1_in_the_mean(law):
    """No outcome is likely (e^-60): the chance to be among the first is the only thing that differs."""
    total = draws(law, rows(200, seed=5).expand(2000, -1), 20, 6, 1.0).weight.sum(0)
    assert (total.mean() - 1).abs() < 4 * total.std() / 2000**0.5
    assert 0.2 < total.std() < 1


@pytest.mark.parametrize("law", LAWS)
def test_less_variance_than_with_replacement(law):
    scores = (2 * SCORES).expand(4000, N).clone().requires_grad_()  # far from uniform: draws repeat
    variances = [
        torch.autograd.grad(method(step_on(scores, wild)).sum(), scores)[0].var(0).sum()
        for method in (
            ScoreFunctionWithoutReplacement(law, 6, temperature=TEMPERATURE),
            ScoreFunction(law, 6, "leave_one_out", TEMPERATURE),
        )
    ]
    assert variances[0] < 0.5 * variances[1]


@pytest.mark.parametrize("law", LAWS)
def test_value_alone_is_the_same_in_either_precision(law):
    for dtype in (torch.float32, torch.float64):
        method, scores = ScoreFunctionWithoutReplacement(law), rows(6, N).to(dtype)

        def loss(mask, s, dtype=dtype):
            return (mask @ A.to(dtype)).exp()

        value = method(step_on(scores.clone().requires_grad_(), loss))
        with torch.no_grad():
            close(method(step_on(scores, loss)), value.detach())
        assert value.dtype == dtype


def test_each_row_has_its_own_temperature():
    scores, temperature = rows(3, 4, N).requires_grad_(), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for name in ("score_function_swor", "score_function_swor_pl"):
        method = built("method", name, temperature=temperature[:, None, None])
        noise = Normals([0, 1, 2], dtype=torch.float64)
        step = Step(rows(3, N, 2), rows(3, 4, 2), scores, K, "mask", lambda m: wild(m, scores), noise)
        together = torch.autograd.grad(method(step).sum(), scores)[0]
        for i in range(3):
            row = scores[i].detach().clone().requires_grad_()
            alone = built("method", name, temperature=temperature[i].item())(step_on(row, wild, seed=i))
            close(together[i], torch.autograd.grad(alone.sum(), row)[0])


def test_bad_arguments_are_refused():
    for arguments, message in (
        ({"law": "poisson"}, "law must be one of conditional_poisson, plackett_luce, got poisson"),
        ({"samples": 1}, "samples must be >= 2, got 1"),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0"),
    ):
        # Where signatures are checked as well (jaxtyping), an unknown name is refused by that text.
        with pytest.raises((ValueError, TypeError), match=f"{message}|typechecking parameter"):
            ScoreFunctionWithoutReplacement(**arguments)
    with pytest.raises(ValueError, match=r"k must be in \[1, 5\]"):
        draws("plackett_luce", SCORES, 6, 2)
