import numpy as np
import pytest
import torch

from topkbench.methods import L2X, GumbelRao, Relaxed, Step, StraightThrough, Systematic
from topkbench.methods.gumbel_rao import conditional
from topkbench.methods.systematic import drawn
from topkbench.operators import entropic, hard_mask, hard_selection, identity, softmax
from topkbench.operators.identity import projected_identity
from topkbench.randomness import Normals


def step_of(scores, loss, wants="mask", k=2):
    """Three replicates; the same noise at every call."""
    nothing = scores.new_zeros
    normals = Normals([0, 1, 2], dtype=scores.dtype)
    n, rows = scores.shape[-1], scores.shape[1]
    return Step(nothing(3, n, 4), nothing(3, rows, 4), scores, k, wants, loss, normals)


def noise_of(method, scores):
    """The noise that a method ranks with: what it adds to scores of zero."""
    return method.ranked(step_of(torch.zeros_like(scores), torch.zeros_like))


def of(loss, scores):
    return torch.autograd.grad(loss.sum(), scores, retain_graph=True)[0]


def drawn_scores(*shape):
    return torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)


G = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0], dtype=torch.float64)


@pytest.mark.parametrize("law", ["gumbel", "normal"])
@pytest.mark.parametrize("wrapper", [Relaxed, StraightThrough])
def test_noise_is_ranked_and_the_values_are_clean(wrapper, law):
    scores = drawn_scores(5, 6)
    method = wrapper(entropic, 0.7, noise=law, scale=0.5)
    noisy = scores + noise_of(method, scores)
    rows = entropic.selection(noisy, 2, 0.7)
    if wrapper is StraightThrough:
        rows = hard_selection(noisy, 2) + (rows - rows.detach())
    for wants, expected in (
        ("mask", rows.sum(-2) @ G),
        ("values", (rows @ scores.unsqueeze(-1)).squeeze(-1) @ G[:2]),
    ):
        loss = method(step_of(scores, lambda part: part @ G[: part.shape[-1]], wants))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(of(loss, scores), of(expected, scores), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wrapper", [Relaxed, StraightThrough])
def test_scale_is_how_strong_the_noise_is(wrapper):
    scores = drawn_scores(5, 6)
    one, three = (noise_of(wrapper(entropic, noise="normal", scale=scale), scores) for scale in (1.0, 3.0))
    torch.testing.assert_close(three, 3 * one)
    assert not wrapper(entropic).stochastic
    assert wrapper(entropic, noise="normal").stochastic


def test_only_the_backward_pass_of_straight_through_has_a_temperature():
    """At k = 1: `pi (g - <pi, g>) / tau_b` with pi = softmax((s + G) / tau_b)."""
    scores, losses = drawn_scores(5, 6), []
    for hot in (0.2, 1.0, 3.0):
        method = StraightThrough(softmax, hot, noise="gumbel")
        losses.append(method(step_of(scores, lambda mask: mask @ G, k=1)))
        pi = ((scores + noise_of(method, scores)) / hot).softmax(-1)
        expected = pi * (G - (pi @ G).unsqueeze(-1)) / hot
        torch.testing.assert_close(of(losses[-1], scores), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_the_conditional_race_keeps_the_order_of_the_draw(k):
    scores = torch.cat([torch.randn(20, 6), 30 * torch.randn(20, 6), torch.full((1, 6), 1e4)]).double()
    index = (scores - torch.empty_like(scores).exponential_().log()).topk(k).indices
    u = conditional(scores, index, torch.empty(50, 41, 6, dtype=torch.float64).exponential_())
    assert u.isfinite().all()
    assert torch.equal(u.topk(k).indices, index.expand(50, 41, k))


def test_over_all_draws_the_conditional_noise_is_gumbel():
    scores = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64).expand(100_000, 4)
    index = (scores - torch.empty_like(scores).exponential_().log()).topk(2).indices
    noise = conditional(scores, index, torch.empty(1, 100_000, 4, dtype=torch.float64).exponential_())
    noise = noise[0] - scores
    variance = np.pi**2 / 6
    mean = np.full(4, np.euler_gamma)
    np.testing.assert_allclose(noise.mean(0), mean, rtol=0, atol=4 * (variance / 1e5) ** 0.5)
    np.testing.assert_allclose(noise.var(0), variance, rtol=4 * (4.4 / 1e5) ** 0.5)  # kurtosis 3 + 2.4
    covariance = np.cov(noise.numpy().T) - np.diag(noise.var(0))
    assert np.abs(covariance).max() < 4 * variance / 1e5**0.5


@pytest.mark.parametrize("wants", ["mask", "values"])
def test_gumbel_rao_has_the_mean_of_straight_through_and_less_variance(wants):
    scores = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.3], dtype=torch.float64)
    scores = scores.expand(3, 4000, 6).clone().requires_grad_()
    step = step_of(scores, lambda part: (part @ G[: part.shape[-1]]).square(), wants)
    plain = StraightThrough(softmax, 0.5, noise="gumbel", scale=0.8)(step)
    rao = GumbelRao(softmax, 0.5, samples=10, scale=0.8)(step)
    grads = [of(loss, scores).flatten(0, 1) for loss in (plain, rao)]
    error = sum(grad.var(0) / len(grad) for grad in grads).sqrt()
    assert ((grads[0].mean(0) - grads[1].mean(0)).abs() <= 4 * error).all()
    assert grads[1].var(0).sum() < 0.95 * grads[0].var(0).sum()
    # The draw is the same: the second call on one step takes the next noise, a fresh step the same.
    again = step_of(scores, lambda part: (part @ G[: part.shape[-1]]).square(), wants)
    torch.testing.assert_close(GumbelRao(softmax, 0.5, scale=0.8)(again), plain)


def test_l2x_sends_the_gradient_to_the_draw_with_the_maximum():
    scores = drawn_scores(5, 6)
    step = step_of(scores, lambda mask: mask @ G)
    loss = L2X(0.4)(step)
    noise = step_of(scores, torch.zeros_like).noise("draws", 2, 5, 6, law="gumbel")
    pi = ((scores.unsqueeze(1) + noise) / 0.4).softmax(-1).detach()
    first = pi[:, :1] >= pi[:, 1:]
    g = torch.cat([first, ~first], 1) * G
    expected = (pi * (g - (pi * g).sum(-1, keepdim=True)) / 0.4).sum(1)
    torch.testing.assert_close(loss.detach(), pi.amax(1) @ G)
    torch.testing.assert_close(of(loss, scores), expected)
    with pytest.raises(
        ValueError, match=r"L2X needs a task whose loss is a function of the mask, not of val"
    ):
        L2X()(step_of(scores, torch.zeros_like, "values"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_systematic_sampling_has_the_probabilities_of_the_mask(k, dtype):
    mask = entropic(torch.randn(4, 6, dtype=dtype), k, 0.5)
    starts = (torch.arange(20_000, dtype=dtype) + 0.5) / 20_000
    z = drawn(mask.expand(20_000, 4, 6), k, starts[:, None, None].expand(20_000, 4, 1))
    assert z.dtype == dtype
    assert set(z.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(z.sum(-1), torch.full((20_000, 4), k, dtype=dtype))
    torch.testing.assert_close(z.double().mean(0), mask.double(), rtol=0, atol=1.1 / 20_000)


def test_systematic_sampling_of_a_hard_mask_is_the_mask():
    mask = hard_mask(torch.randn(100, 6), 3)
    assert torch.equal(drawn(mask, 3, torch.rand(100, 1).clamp(1e-6, 1 - 1e-6)), mask)


def test_systematic_is_straight_through_at_the_draw():
    scores = drawn_scores(5, 6)
    loss = Systematic(entropic, 0.5)(step_of(scores, lambda mask: (mask @ G).square()))
    mask = entropic(scores, 2, 0.5)
    z = drawn(mask.detach(), 2, step_of(scores, torch.zeros_like).noise("start", 5, 1, law="uniform"))
    torch.testing.assert_close(loss.detach(), (z @ G).square())
    expected = of(2 * (z @ G) * (mask @ G), scores)
    torch.testing.assert_close(of(loss, scores), expected, rtol=1e-9, atol=1e-12)
    values = Systematic(entropic, 0.5)(step_of(scores, lambda values: values.sum(-1), "values"))
    torch.testing.assert_close(values, (z * scores).sum(-1))


def test_projected_identity_is_the_formula():
    scores, g = drawn_scores(5, 6), torch.randn(3, 5, 6, dtype=torch.float64)
    s = scores.detach().numpy()
    centred = s - s.mean(-1, keepdims=True)
    size = np.linalg.norm(centred, axis=-1, keepdims=True)
    c = centred / size
    off = (g.numpy() - c * (c * g.numpy()).sum(-1, keepdims=True)) / size
    mask = projected_identity(scores, 2)
    np.testing.assert_allclose(mask.detach(), c, rtol=1e-12)
    grad = torch.autograd.grad(mask, scores, g)[0]
    np.testing.assert_allclose(grad, off - off.mean(-1, keepdims=True), rtol=1e-9, atol=1e-12)
    # What a shift or a stretch of all scores would do is projected out.
    assert grad.sum(-1).abs().max() < 1e-12
    assert (grad * scores).sum(-1).abs().max() < 1e-12
    huge = torch.tensor([1e30, -1e30, 0.0], requires_grad=True)
    for scale in (1.0, 1e-30, 1e-60):
        assert (
            torch.autograd.grad(projected_identity(huge * scale, 1).square().sum(), huge)[0].isfinite().all()
        )


def test_bad_arguments_are_refused():
    for wrapper in (Relaxed, StraightThrough):
        for change, message in (
            ({"scale": 0.0}, r"scale must be > 0 and finite, got 0"),
            ({"noise": "cauchy"}, r"noise must be one of none, gumbel, normal, got cauchy|parameter 'noise'"),
        ):
            # Where signatures are checked as well, a wrong word is refused by that text.
            with pytest.raises((ValueError, TypeError), match=message):
                wrapper(entropic, **change)
    with pytest.raises(ValueError, match=r"samples must be >= 1, got 0"):
        GumbelRao(entropic, samples=0)
    with pytest.raises(ValueError, match=r"scale must be > 0 and finite, got -1"):
        GumbelRao(entropic, scale=-1.0)
    with pytest.raises(ValueError, match=r"operator must have a mask in \[0, 1\] that sums to k"):
        Systematic(identity)
    with pytest.raises(ValueError, match=r"temperature must be > 0 and finite, got 0"):
        L2X(0.0)
