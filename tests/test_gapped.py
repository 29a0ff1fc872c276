import numpy as np
import pytest
import torch

from topkbench.methods import GappedStraightThrough, Step, StraightThrough
from topkbench.operators import softmax as successive
from topkbench.randomness import Normals

N = 6


def step_of(scores, loss, wants="mask", k=1):
    """Three replicates of five rows of six scores."""
    nothing = scores.new_zeros
    return Step(
        nothing(3, N, 4), nothing(3, 5, 4), scores, k, wants, loss, Normals([0, 1, 2], dtype=scores.dtype)
    )


def one_row_often(scores, loss):
    W, x = scores.new_zeros(1, N, 3), scores.new_zeros(1, scores.shape[1], 3)
    return Step(W, x, scores, 1, "mask", loss, Normals([0], dtype=scores.dtype))


def drawn(scores):
    """What each row draws, from the same noise."""
    noise = Normals([0, 1, 2], dtype=scores.dtype)("draw", 5, N, law="gumbel")
    return (scores.detach() + noise).argmax(-1).numpy()


def softmax(u):
    e = np.exp(u - u.max())
    return e / e.sum()


def reference(s, i, g, temperature, gap):
    """One row: the gradient of the softmax of scores that the drawn one leads by the gap."""
    pi = softmax(s)[i]
    gap = -np.log(1 - pi) / pi if gap == "probability" else gap
    moved = np.array([min(x, s.max() - gap) for x in s])
    moved[i] = s.max()
    r = softmax(moved / temperature)
    assert r.argmax() == i
    return r * (g - r @ g) / temperature


@pytest.mark.parametrize("gap", [0.3, 1.0, "probability"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_published_formula(temperature, gap):
    scores, weight = torch.randn(3, 5, N, dtype=torch.float64, requires_grad=True), torch.randn(N).double()
    loss = GappedStraightThrough(temperature, gap)(step_of(scores, lambda mask: (mask @ weight).square()))
    index, w = drawn(scores), weight.numpy()
    np.testing.assert_allclose(loss.detach(), w[index] ** 2, rtol=1e-12)
    grad = torch.autograd.grad(loss.sum(), scores)[0]
    for row in np.ndindex(3, 5):
        g = 2 * w[index[row]] * w
        expected = reference(scores[row].detach().numpy(), index[row], g, temperature, gap)
        np.testing.assert_allclose(grad[row], expected, rtol=1e-9, atol=1e-12)


def test_the_draws_have_the_law_of_the_softmax():
    scores = torch.randn(1, 1, N, dtype=torch.float64)
    many = scores.expand(1, 40_000, N)
    step = one_row_often(many, lambda mask: mask @ torch.arange(N).double())
    loss = GappedStraightThrough()(step)
    p = scores[0, 0].softmax(-1)
    counts = torch.bincount(loss.round().long()[0], minlength=N)
    assert ((counts - 40_000 * p) / (40_000 * p * (1 - p)).sqrt()).abs().max() < 4


def test_values_are_the_drawn_score():
    scores = torch.randn(3, 5, N, dtype=torch.float64, requires_grad=True)
    loss = GappedStraightThrough(0.7)(step_of(scores, lambda values: values[..., 0].square(), "values"))
    index, s = drawn(scores), scores.detach().numpy()
    grad = torch.autograd.grad(loss.sum(), scores)[0]
    for row in np.ndindex(3, 5):
        i, value = index[row], s[row][index[row]]
        assert loss[row].item() == pytest.approx(value**2)
        expected = reference(s[row], i, 2 * value * s[row], 0.7, 1.0)
        expected[i] += 2 * value
        np.testing.assert_allclose(grad[row], expected, rtol=1e-9, atol=1e-12)


def test_it_varies_less_than_gumbel_straight_through():
    scores = torch.randn(1, 1, N, dtype=torch.float64).expand(1, 4000, N).clone().requires_grad_()
    weight, variances = torch.randn(N).double(), []
    for method in (GappedStraightThrough(0.5), StraightThrough(successive, 0.5, noise="gumbel")):
        step = one_row_often(scores, lambda mask: (mask @ weight).square())
        variances.append(torch.autograd.grad(method(step).sum(), scores)[0].var(1).sum())
    assert variances[0] < 0.8 * variances[1]


def test_each_replicate_has_its_own_temperature():
    scores, weight = torch.randn(3, 5, N, dtype=torch.float64, requires_grad=True), torch.randn(N).double()
    temperatures = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    for gap in (1.0, "probability"):
        grads = [
            torch.autograd.grad(
                GappedStraightThrough(t, gap)(step_of(scores, lambda mask: (mask @ weight).square())).sum(),
                scores,
            )[0]
            for t in (temperatures[:, None, None], *temperatures.tolist())
        ]
        alone = torch.stack([grads[i + 1][i] for i in range(3)])
        torch.testing.assert_close(grads[0], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("gap", [1.0, "probability"])
def test_a_score_that_is_sure_or_missing(gap):
    row = torch.tensor([1e4, 0.0, -torch.inf, -1e4, 1.0, 2.0], dtype=torch.float64)
    scores = row.expand(3, 5, N).clone().requires_grad_()
    loss = GappedStraightThrough(1.0, gap)(step_of(scores, lambda mask: mask @ torch.arange(N).double()))
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.autograd.grad(loss.sum(), scores)[0].isfinite().all()


def test_bad_arguments_are_refused():
    method = GappedStraightThrough()
    method.check_sizes(6, 1)
    with pytest.raises(ValueError, match="k must be 1, got k=2 of n=6"):
        method.check_sizes(6, 2)
    with pytest.raises(ValueError, match="k must be 1, got k=2 of n=6"):
        method(step_of(torch.zeros(3, 5, N), lambda mask: mask.sum(-1), k=2))
    for arguments, message in (
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0"),
        ({"gap": -1.0}, "gap must be > 0 and finite, got -1"),
        ({"gap": "wide"}, "gap must be a number > 0 or probability, got wide"),
    ):
        # Where signatures are checked as well (jaxtyping), a wrong word is refused by that text.
        with pytest.raises((ValueError, TypeError), match=f"{message}|typechecking parameter"):
            GappedStraightThrough(**arguments)
