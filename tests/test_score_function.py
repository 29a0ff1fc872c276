"""Methods on drawn subsets: their mean over all subsets is the gradient that they claim to estimate."""

import itertools

import pytest
import torch
from torch.func import grad

import topkbench.methods.score_function as score_function
import topkbench.methods.subset as drawn
from topkbench.methods import Step
from topkbench.methods.score_function import ScoreFunction
from topkbench.methods.subset import ReinMaxK, Simple, TaylorControl
from topkbench.operators import plackett_luce, subset
from topkbench.randomness import Normals

N, K = 5, 2
STATES = torch.zeros(10, N, dtype=torch.float64).scatter(
    1, torch.tensor(list(itertools.combinations(range(N), K))), 1
)
ORDERS = torch.tensor(list(itertools.permutations(range(N), K)))
TEMPERATURE = 0.7


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SCORES, A, B = rows(N), rows(N, seed=1), rows(N, N, seed=2)


def linear(mask, scores):
    return mask @ A


def quadratic(mask, scores):
    return ((mask * scores) @ B - A).square().sum(-1)


def wild(mask, scores):
    return (mask @ A).exp() + ((mask * scores) @ B - A).square().sum(-1) * (mask[..., 0] - 0.3)


def of_values(values, scores):
    return (values[..., 0] * 1.5 - values[..., 1]).sin() + scores.square().sum(-1)


def step_on(scores, loss, wants="mask", noise=None):
    """Rows of scores (B, n) as one replicate."""
    scores = scores[None]
    W, x = scores.new_zeros(1, scores.shape[-1], 3), scores.new_zeros(1, scores.shape[1], 3)
    noise = noise or Normals([0], dtype=torch.float64)
    return Step(W, x, scores, K, wants, lambda part: loss(part, scores), noise)


def values_of(masks, scores):
    return scores.expand_as(masks).masked_fill(masks == 0, -torch.inf).topk(K).values


def expected_loss(scores, loss, law="conditional_poisson", wants="mask"):
    """E L by enumeration."""
    u = scores / TEMPERATURE
    if law == "conditional_poisson":
        masks, p = STATES, (STATES @ u).softmax(0)
    else:
        first = u.softmax(-1)[ORDERS[:, 0]]
        others = torch.ones_like(STATES[:1]).expand(len(ORDERS), N).scatter(1, ORDERS[:, :1], 0)
        second = (u + others.log()).softmax(-1).gather(1, ORDERS[:, 1:])[:, 0]
        masks, p = torch.zeros(len(ORDERS), N, dtype=u.dtype).scatter(1, ORDERS, 1), first * second
    part = masks if wants == "mask" else values_of(masks, scores)
    return (p * loss(part, scores.expand_as(masks))).sum()


def mean_gradient(method, monkeypatch, loss, wants="mask", samples=1):
    """The mean of the method's value and gradient over all that it could have drawn, by enumeration."""
    plackett = getattr(method, "law", "") == "plackett_luce"
    single = plackett_p() if plackett else (STATES @ SCORES / TEMPERATURE).softmax(0)
    index = torch.cartesian_prod(*[torch.arange(len(single))] * samples).reshape(-1, samples).T
    p = single[index].prod(0)
    if plackett:
        monkeypatch.setattr(plackett_luce, "gumbel_top_k", lambda *_: ORDERS[index][:, None])
    elif isinstance(method, ScoreFunction):
        monkeypatch.setattr(score_function.subset, "sample", lambda *_: STATES[index][:, None])
    else:
        monkeypatch.setattr(drawn, "sample", lambda *_: STATES[index])
    scores = SCORES.expand(len(p), N).clone().requires_grad_()
    surrogate = method(step_on(scores, loss, wants))[0]
    gradients = torch.autograd.grad((p * surrogate).sum(), scores)[0]
    return (p * surrogate).sum().detach(), gradients.sum(0)


def plackett_p():
    return plackett_luce.log_probability(SCORES, ORDERS, TEMPERATURE).exp()


def close(actual, expected, tol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


CASES = [
    (Simple(TEMPERATURE), linear, "mask", 1),
    (ReinMaxK(TEMPERATURE), linear, "mask", 1),
    (ReinMaxK(TEMPERATURE), quadratic, "mask", 1),
    (TaylorControl(TEMPERATURE), quadratic, "mask", 1),
    (TaylorControl(TEMPERATURE), wild, "mask", 1),
]
for _law in ("conditional_poisson", "plackett_luce"):
    for _loss, _wants in ((wild, "mask"), (of_values, "values")):
        CASES += [
            (ScoreFunction(_law, 1, "none", TEMPERATURE), _loss, _wants, 1),
            (ScoreFunction(_law, 2, "none", TEMPERATURE), _loss, _wants, 2),
            (ScoreFunction(_law, 2, "leave_one_out", TEMPERATURE), _loss, _wants, 2),
        ]


@pytest.mark.parametrize(("method", "loss", "wants", "samples"), CASES)
def test_unbiased(method, loss, wants, samples, monkeypatch):
    value, gradient = mean_gradient(method, monkeypatch, loss, wants, samples)
    of_law = (loss, getattr(method, "law", "conditional_poisson"), wants)
    close(value, expected_loss(SCORES, *of_law))
    close(gradient, grad(expected_loss)(SCORES, *of_law))


def test_leave_one_out_of_three_samples_is_unbiased(monkeypatch):
    method = ScoreFunction("conditional_poisson", 3, "leave_one_out", TEMPERATURE)
    close(mean_gradient(method, monkeypatch, wild, samples=3)[1], grad(expected_loss)(SCORES, wild))


@pytest.mark.parametrize(
    ("method", "loss"), [(Simple(TEMPERATURE), quadratic), (ReinMaxK(TEMPERATURE), wild)]
)
def test_biased_where_not_claimed(method, loss, monkeypatch):
    truth = grad(expected_loss)(SCORES, loss)
    assert (mean_gradient(method, monkeypatch, loss)[1] - truth).norm() > 1e-2 * truth.norm()


def test_reinmax_k_is_reinmax_at_one():
    # 2 J((D + pi) / 2) g - J(pi) g / 2, with J(p) = diag p - p p^T.
    scores, noise = rows(4, 6, seed=3).requires_grad_(), Normals([5], dtype=torch.float64)
    step = step_on(scores, lambda mask, _: (mask * torch.arange(6.0)).sum(-1).exp())
    step = Step(step.W, step.x, step.scores, 1, "mask", step.loss, noise)
    (actual,) = torch.autograd.grad(ReinMaxK()(step).sum(), scores)
    z = subset.sample(
        scores.detach(), 1, 1.0, Normals([5], dtype=torch.float64)("subset", 4, 5, law="uniform")[0]
    )
    pi, g = (
        scores.detach().softmax(-1),
        torch.arange(6.0) * (z @ torch.arange(6.0).double()).exp().unsqueeze(-1),
    )

    def vjp(p):
        return p * (g - (p * g).sum(-1, keepdim=True))

    close(actual, 2 * vjp((z + pi) / 2) - vjp(pi) / 2)


@pytest.mark.parametrize("law", ["conditional_poisson", "plackett_luce"])
def test_draws_come_from_the_noise(law):
    """The mean of many real draws is the gradient, within 4 standard errors; 1.1 times it is not."""
    method = ScoreFunction(law, 4, "leave_one_out", TEMPERATURE)
    scores = SCORES.expand(20_000, N).clone().requires_grad_()
    gradients = torch.autograd.grad(method(step_on(scores, wild)).sum(), scores)[0]
    error = gradients.std(0) / len(gradients) ** 0.5
    truth = grad(expected_loss)(SCORES, wild, law)
    assert ((gradients.mean(0) - truth) / error).abs().max() < 4
    assert ((gradients.mean(0) - 1.1 * truth) / error).abs().max() > 4


def test_simple_values():
    scores = rows(8, N, seed=4).requires_grad_()
    step = step_on(scores, of_values, "values")
    masks = subset.sample(
        scores.detach(), K, 0.5, Normals([0], dtype=torch.float64)("subset", 8, N - 1, law="uniform")[0]
    )
    loss = Simple(0.5)(step)
    values = values_of(masks, scores.detach()).requires_grad_()
    close(loss[0], of_values(values, scores))
    # The gradient: through the scores with the rows held fast, and through the marginals' rows.
    (g,) = torch.autograd.grad((values[..., 0] * 1.5 - values[..., 1]).sin().sum(), values)
    hard = torch.autograd.grad((values_of(masks, scores) * g).sum() + scores.square().sum(), scores)[0]
    P = subset.marginals.selection(scores, K, 0.5)
    soft = torch.autograd.grad((P * scores.detach().unsqueeze(-2) * g.unsqueeze(-1)).sum(), scores)[0]
    close(torch.autograd.grad(loss.sum(), scores)[0], hard + soft)


@pytest.mark.parametrize(
    "method", [Simple(), ReinMaxK(), TaylorControl(), ScoreFunction(), ScoreFunction(samples=3)]
)
def test_value_alone_is_the_same(method):
    value = method(step_on(rows(6, N).requires_grad_(), wild))
    with torch.no_grad():
        close(method(step_on(rows(6, N), wild)), value.detach())


def test_baseline_lowers_the_variance():
    scores = SCORES.expand(4000, N).clone().requires_grad_()
    variances = [
        torch.autograd.grad(m(step_on(scores, lambda z, s: wild(z, s) + 10)).sum(), scores)[0].var(0).sum()
        for m in (ScoreFunction(samples=4), ScoreFunction(samples=4, baseline="leave_one_out"))
    ]
    assert variances[1] < 0.2 * variances[0]


def test_bad_arguments_are_refused():
    for arguments, message in (
        ({"law": "poisson"}, "law must be one of conditional_poisson, plackett_luce, got 'poisson'"),
        ({"baseline": "mean"}, "baseline must be one of none, leave_one_out, got 'mean'"),
        ({"samples": 0}, "samples must be >= 1 with baseline=none, got 0"),
        ({"baseline": "leave_one_out"}, "samples must be >= 2 with baseline=leave_one_out, got 1"),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0"),
    ):
        # Where signatures are checked as well (jaxtyping), an unknown name is refused by that text.
        with pytest.raises((ValueError, TypeError), match=f"{message}|typechecking parameter"):
            ScoreFunction(**arguments)
    for method in (Simple, ReinMaxK, TaylorControl):
        with pytest.raises(ValueError, match="temperature must be > 0 and finite, got nan"):
            method(float("nan"))
    for method in (ReinMaxK(), TaylorControl()):
        with pytest.raises(
            ValueError, match="needs a task whose loss is a function of the mask, not of values"
        ):
            method(step_on(SCORES[None], of_values, "values"))
