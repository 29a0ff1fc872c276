"""The k-subset distribution and the Plackett-Luce law against enumeration of all subsets and orders."""

import itertools
import math

import numpy as np
import pytest
import torch

from topkbench.operators import entropic, hard_mask, plackett_luce
from topkbench.operators.subset import entropy, log_normalizer, log_probability, marginals, sample

INF = float("inf")
SIZES = [(1, 1), (2, 1), (4, 3), (5, 5), (6, 3), (7, 2), (8, 4)]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniforms(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, tol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def states(n, k):
    """All hard masks with k ones."""
    picks = torch.tensor(list(itertools.combinations(range(n), k)))
    return torch.zeros(len(picks), n, dtype=torch.float64).scatter(1, picks, 1)


def law(scores, k, temperature):
    """States, their probabilities, the mean and the covariance."""
    z = states(len(scores), k)
    p = (z @ scores / temperature).softmax(0)
    mean = p @ z
    return z, p, mean, (z - mean).T @ (p.unsqueeze(-1) * (z - mean))


def reference(scores, k, temperature):
    """NumPy twin of `marginals`: sums over the scores before and after each one, in logarithms."""
    n, u = len(scores), (scores - scores.max()) / temperature

    def forward(u):
        table = np.full((n + 1, k + 1), -np.inf)
        table[0, 0] = 0
        for i, x in enumerate(u):
            table[i + 1] = table[i]
            table[i + 1, 1:] = np.logaddexp(table[i, 1:], table[i, :-1] + x)
        return table

    before, after = forward(u), forward(u[::-1])[::-1]
    pairs = [before[i, :k] + u[i] + after[i + 1, :k][::-1] for i in range(n)]
    return np.exp(np.logaddexp.reduce(pairs, axis=1) - before[n, k])


# Marginals and what goes with them


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_enumeration(n, k, temperature):
    scores = draw(n)
    z, p, mean, covariance = law(scores, k, temperature)
    close(marginals(scores, k, temperature), mean)
    jacobian = torch.autograd.functional.jacobian(lambda s: marginals(s, k, temperature), scores)
    close(jacobian, covariance / temperature)
    close(log_normalizer(scores, k, temperature), (z @ scores / temperature).logsumexp(0))
    close(log_probability(scores, z, k, temperature), p.log())
    close(entropy(scores, k, temperature), -(p * p.log()).sum())
    close(marginals(scores, k, temperature), torch.tensor(reference(scores.numpy(), k, temperature)))


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_gradients_of_the_logarithms(n, k):
    scores, temperature = draw(2, n).requires_grad_(), torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    temperature.requires_grad_()
    (grad,) = torch.autograd.grad(log_normalizer(scores, k, temperature).sum(), scores)
    close(grad, marginals(scores, k, temperature) / temperature)
    z = states(n, k)[:, None].expand(-1, 2, -1)
    (grad,) = torch.autograd.grad(log_probability(scores, z, k, temperature).sum(), scores)
    close(grad, (z - marginals(scores, k, temperature)).sum(0) / temperature)
    for function in (
        lambda s, t: log_normalizer(s, k, t),
        lambda s, t: log_probability(s, z[0], k, t),
        lambda s, t: entropy(s, k, t),
    ):
        assert torch.autograd.gradcheck(function, (scores, temperature))
        assert torch.autograd.gradgradcheck(function, (scores, temperature), atol=1e-4)


def test_k_of_each_row():
    scores, temperature = draw(2, 3, 5).requires_grad_(), 0.3 + draw(3, 1, seed=1).abs()
    for k in (torch.tensor([1, 4, 5]), torch.tensor([[4], [5]]), torch.tensor(2)):
        masks = marginals(scores, k, temperature)
        (gradient,) = torch.autograd.grad(masks.square().sum(), scores)
        for index, count in np.ndenumerate(k.expand(2, 3).numpy()):
            row = scores[index].detach().requires_grad_()
            alone = marginals(row, int(count), temperature[index[1]])
            close(masks[index], alone)
            close(gradient[index], torch.autograd.grad(alone.square().sum(), row)[0])


def test_identities():
    scores = draw(3, 7)
    close(marginals(scores, 1, 0.5), (scores / 0.5).softmax(-1))
    close(marginals(draw(1, 2), 1), torch.stack([d := draw(1, 2).diff().squeeze(), -d]).neg().sigmoid()[None])
    close(marginals(scores, 3, 0.7), 1 - marginals(-scores, 4, 0.7))
    close(marginals(scores, 7, 0.7), torch.ones_like(scores))


def test_marginals_are_not_the_entropic_mask():
    scores = draw(6)
    assert (marginals(scores, 2) - entropic(scores, 2)).abs().max() > 1e-2


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_float32_with_a_thousand_scores(spread):
    exact = (spread * draw(1000)).float().double()
    g, h, outcomes = draw(1000, seed=1), draw(1000, seed=2), []
    for scores in (exact.clone().requires_grad_(), exact.float().requires_grad_()):
        mask = marginals(scores, 50)
        (slope,) = torch.autograd.grad(mask, scores, g.to(scores.dtype), create_graph=True)
        (bend,) = torch.autograd.grad(slope, scores, h.to(scores.dtype))
        outcomes.append([mask.detach(), slope.detach(), bend])
    close(outcomes[0][0], torch.tensor(reference(exact.numpy(), 50, 1.0)), tol=1e-11)
    for double, single in zip(*outcomes, strict=True):
        assert single.dtype == torch.float32
        assert (single - double).abs().max() < 5e-6 * max(1, double.abs().max())
    assert (outcomes[1][0] - outcomes[0][0]).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(
    ("row", "k", "expected"),
    [
        ([-INF, 1.0, 3.0, 3.0], 3, [0.0, 1, 1, 1]),
        ([INF, 1.0, 2.0, 3.0], 1, [1.0, 0, 0, 0]),
        ([INF, 2.0, 2.0, -INF], 2, [1.0, 0.5, 0.5, 0]),
        ([1e4, 3.0, 3.0, -1e4, -1e4], 5, [1.0, 1, 1, 1, 1]),
        ([0.0, 0.0, 0.0, 0.0], 3, [0.75] * 4),
    ],
)
def test_infinite_and_equal_scores(row, k, expected, temperature, dtype):
    scores, hot = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (row, temperature))
    mask = marginals(scores, k, hot)
    close(mask, torch.tensor(expected, dtype=dtype), tol=1e-6)
    first = torch.autograd.grad(mask.square().sum(), (scores, hot), create_graph=True)
    second = torch.autograd.grad(sum(x.sum() for x in first), (scores, hot))
    for output in (*first, *second, entropy(scores, k, hot)):
        assert output.isfinite().all()


def test_not_a_number_stays_that():
    assert marginals(torch.tensor([1.0, torch.nan, 0.0, 2.0]), 2).isnan().all()


# Sampling


def worst_z(counts, p):
    """The largest deviation of counts from their expectation, in standard errors."""
    total = counts.sum()
    return ((counts - total * p) / (total * p * (1 - p)).sqrt()).abs().max()


@pytest.mark.parametrize(("n", "k"), [(5, 2), (6, 3), (7, 5), (4, 1)])
def test_samples_have_their_law(n, k):
    scores = draw(n, seed=3)
    z, p, _, _ = law(scores, k, 0.8)
    masks = sample(scores, k, 0.8, uniforms(200_000, n - 1))
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert (masks.sum(-1) == k).all()
    code = 2.0 ** torch.arange(n, dtype=torch.float64)
    counts = ((masks @ code).unsqueeze(-1) == z @ code).double().sum(0)
    assert worst_z(counts, p) < 4
    # The test can tell: not a law that is off by 5 % in its temperature.
    assert worst_z(counts, law(scores, k, 0.84)[1]) > 4


def test_samples_of_each_row_are_those_of_the_row_alone():
    scores, draws = draw(2, 3, 7), uniforms(4, 2, 3, 6)
    temperature = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)
    together = sample(scores, 3, temperature, draws)
    for i, j in itertools.product(range(2), range(3)):
        alone = sample(scores[i, j], 3, temperature[j].item(), draws[:, i, j])
        assert torch.equal(together[:, i, j], alone)


def test_samples_at_the_ends():
    low, high = torch.zeros(6), torch.full((6,), 1 - 2.0**-24)
    for k in range(1, 8):
        for row in (draw(7), 1e4 * draw(7), torch.zeros(7)):
            for u in (low, high):
                assert sample(row.float(), k, 1.0, u).sum() == k
        assert torch.equal(sample(draw(7), k, 1e-6, uniforms(6)), hard_mask(draw(7), k))
    assert sample(torch.tensor([-INF, 0.0, 0.0]), 2, 1.0, torch.rand(50, 2))[:, 0].sum() == 0
    assert sample(torch.tensor([0.3]), 1, 1.0, torch.zeros(0)).item() == 1
    many = sample(draw(1000).float(), 50, 1.0, uniforms(64, 999).float())
    assert (many.sum(-1) == 50).all()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"uniforms must be \(\.\.\., 3\) for 4 scores, got \(4,\)"):
        sample(draw(4), 2, 1.0, uniforms(4))
    with pytest.raises(ValueError, match=r"k must be in \[1, 4\]"):
        sample(draw(4), 5, 1.0, uniforms(3))


# Plackett-Luce


def orders(n, k):
    return torch.tensor(list(itertools.permutations(range(n), k)))


def test_published_probabilities_of_pairs():
    # n = 4, k = 2, weights 1, 2, 3, 4: the sums over both orders.
    scores = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64).log()
    both = [
        plackett_luce.log_probability(scores, torch.tensor([pair, pair[::-1]])).exp().sum()
        for pair in itertools.combinations(range(4), 2)
    ]
    expected = [17 / 360, 8 / 105, 1 / 9, 9 / 56, 7 / 30, 13 / 35]
    close(torch.stack(both), torch.tensor(expected, dtype=torch.float64))
    weights = torch.tensor([2, 3, 4, 6, 8, 12], dtype=torch.float64) / 35
    close(log_probability(scores, states(4, 2), 2).exp(), weights)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (5, 3), (4, 4)])
def test_order_probabilities(n, k):
    scores = draw(n).requires_grad_()
    log_p = plackett_luce.log_probability(scores, orders(n, k), 0.7)
    close(log_p.exp().sum(), torch.ones((), dtype=torch.float64))
    for order, value in zip(orders(n, k).tolist(), log_p, strict=True):
        weights, score = (scores.detach() / 0.7).exp(), torch.zeros(n, dtype=torch.float64)
        expected = torch.zeros((), dtype=torch.float64)
        for i in order:
            expected += (weights[i] / weights.sum()).log()
            score += torch.eye(n, dtype=torch.float64)[i] - weights / weights.sum()
            weights[i] = 0
        close(value, expected)
        close(torch.autograd.grad(value, scores, retain_graph=True)[0], score / 0.7)


def test_draws_have_their_law():
    scores = draw(4, seed=3)
    gumbels = -(-uniforms(200_000, 4, seed=1).log()).log()
    order = plackett_luce.gumbel_top_k(scores, 2, 0.8, gumbels)
    counts = (order.unsqueeze(1) == orders(4, 2)).all(-1).double().sum(0)
    assert worst_z(counts, plackett_luce.log_probability(scores, orders(4, 2), 0.8).exp()) < 4
    assert worst_z(counts, plackett_luce.log_probability(scores, orders(4, 2), 0.84).exp()) > 4


def test_order_probability_with_infinite_scores():
    scores = torch.tensor([-INF, -INF, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    value = plackett_luce.log_probability(scores, torch.tensor([3, 2]))
    (grad,) = torch.autograd.grad(value, scores)
    close(grad, torch.tensor([0, 0, -1.0, 1.0], dtype=torch.float64) / (1 + math.e))
