import itertools
import math

import numpy as np
import pytest
import torch
from references import hard_selection

from topkbench.operators._top import top_indices
from topkbench.operators.perturbed import perturbed_mask, perturbed_selection

OPTIONS = [
    {"centred": False},
    {"centred": True},
    {"law": "gumbel", "centred": False},
    {"law": "gumbel", "centred": True},
    {"antithetic": True},
]
PARTS = {"mask": perturbed_mask, "selection": perturbed_selection}


def draws(count, *shape, law="normal", seed=1):
    generator = torch.Generator().manual_seed(seed)
    if law == "normal":
        return torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return -torch.empty(count, *shape, dtype=torch.float64).exponential_(generator=generator).log()


def reference(part, scores, k, temperature, noise, g, *, law="normal", antithetic=False, centred=True):
    """The mean of one row's hard parts and the estimate of its vector-Jacobian product."""
    noise = np.concatenate([noise, -noise]) if antithetic else noise
    parts = np.stack([hard_selection(scores + temperature * z, k) for z in noise])
    parts = parts if part == "selection" else parts.sum(1)
    weight = (parts * g).reshape(len(noise), -1).sum(1)
    if centred and not antithetic:
        others = (weight.sum() - weight) / (len(noise) - 1)
        weight = weight - others
    slope = noise if law == "normal" else 1 - np.exp(-noise)
    return parts.mean(0), (slope * weight[:, None]).mean(0) / temperature


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_value_and_gradient_are_the_formulas(part, k, options):
    scores = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    noise = draws(6, 2, 3, 5, law=options.get("law", "normal"))
    samples = 12 if options.get("antithetic") else 6
    output = PARTS[part](scores, k, 0.7, samples=samples, noise=noise, **options)
    g = torch.randn_like(output)
    (grad,) = torch.autograd.grad(output, scores, g)
    for row in itertools.product(range(2), range(3)):
        z = noise[(slice(None), *row)].numpy()
        value, slope = reference(part, scores[row].detach().numpy(), k, 0.7, z, g[row].numpy(), **options)
        np.testing.assert_allclose(output[row].detach(), value, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(grad[row], slope, rtol=1e-9, atol=1e-12)


def test_pieces_and_large_rows_change_nothing(monkeypatch):
    scores = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    noise, g = draws(6, 2, 5), torch.randn(2, 5, dtype=torch.float64)

    def outcome():
        mask = perturbed_mask(scores, 2, 0.7, samples=6, noise=noise)
        return mask, torch.autograd.grad(mask, scores, g)[0]

    whole = outcome()
    monkeypatch.setattr("topkbench.operators.perturbed.AT_ONCE", 20)
    monkeypatch.setattr("topkbench.operators.perturbed.LARGE", 1)
    for pieces, expected in zip(outcome(), whole, strict=True):
        torch.testing.assert_close(pieces, expected, rtol=1e-12, atol=1e-14)


def ordered(scores, k):
    """Plackett-Luce: the probability of each ordered draw of k, and its selection."""
    for order in itertools.permutations(range(len(scores)), k):
        left, log_p = list(range(len(scores))), 0.0
        for i in order:
            log_p = log_p + scores[i] - scores[left].logsumexp(0)
            left.remove(i)
        yield log_p.exp(), torch.eye(len(scores), dtype=scores.dtype)[list(order)]


def z_test(estimates, truth, limit=4.0):
    """Whether a mean over rows is the truth, to within `limit` standard errors in every coordinate."""
    error = estimates.std(0) / len(estimates) ** 0.5
    return bool(((estimates.mean(0) - truth).abs() <= limit * error).all())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("centred", [True, False])
def test_gumbel_noise_has_the_plackett_luce_gradient(part, centred):
    scores = torch.tensor([0.3, -0.5, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 2.0, -1.0]], dtype=torch.float64)
    g = g if part == "selection" else g[0]
    temperature = 0.8
    rows = [
        (p, (s * g).sum() if part == "selection" else (s.sum(0) * g).sum())
        for p, s in ordered(scores / temperature, 2)
    ]
    (truth,) = torch.autograd.grad(sum(p * f for p, f in rows), scores)
    many = scores.detach().expand(200_000, 4).clone().requires_grad_()
    noise = draws(3, 200_000, 4, law="gumbel", seed=3)
    output = PARTS[part](many, 2, temperature, samples=3, law="gumbel", centred=centred, noise=noise)
    (estimates,) = torch.autograd.grad(output, many, g.expand(200_000, *g.shape))
    assert z_test(estimates, truth)
    assert not z_test(1.1 * estimates, truth)


@pytest.mark.parametrize("options", [{"centred": True}, {"centred": False}, {"antithetic": True}], ids=str)
def test_normal_noise_has_the_gradient_of_the_normal_law(options):
    """Of two scores the first is kept with probability Phi((s_1 - s_2) / (sigma sqrt 2))."""
    gap, temperature = 0.4, 0.9
    scores = torch.tensor([gap, 0.0], dtype=torch.float64).expand(200_000, 2).clone().requires_grad_()
    hot = torch.tensor(temperature, dtype=torch.float64).expand(200_000, 1).clone().requires_grad_()
    antithetic = options.get("antithetic", False)
    noise = draws(2, 200_000, 2)
    mask = perturbed_mask(scores, 1, hot, samples=4 if antithetic else 2, noise=noise, **options)
    g = torch.tensor([1.0, 0.0], dtype=torch.float64).expand_as(mask)
    u = gap / (temperature * math.sqrt(2))
    density = math.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)
    slope = density / (temperature * math.sqrt(2))
    assert z_test(mask[:, :1].detach(), torch.tensor(math.erf(u / math.sqrt(2)) / 2 + 0.5))
    (estimates,) = torch.autograd.grad(mask, scores, g, retain_graph=True)
    assert z_test(estimates, torch.tensor([slope, -slope]))
    assert not z_test(1.1 * estimates, torch.tensor([slope, -slope]))
    (of_temperature,) = torch.autograd.grad(mask, hot, g)
    assert z_test(of_temperature, torch.tensor(-density * u / temperature))
    assert not z_test(1.1 * of_temperature, torch.tensor(-density * u / temperature))


def test_comparing_and_pairing_lower_the_variance():
    scores = torch.randn(6, dtype=torch.float64).expand(4000, 6).clone().requires_grad_()
    g = torch.arange(6.0, dtype=torch.float64).expand(4000, 6)
    spread = {}
    for name, options in (("plain", {"centred": False}), ("centred", {}), ("pairs", {"antithetic": True})):
        generator = torch.Generator().manual_seed(0)
        mask = perturbed_mask(scores, 3, 0.5, generator=generator, **options)
        spread[name] = torch.autograd.grad(mask, scores, g)[0].var(0).sum()
    assert spread["centred"] < 0.5 * spread["plain"]
    assert spread["pairs"] < 0.5 * spread["plain"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4)])
def test_any_leading_dimensions_and_the_same_generator(part, shape, dtype):
    scores = torch.randn(shape, dtype=dtype, requires_grad=True)
    first, second = (
        PARTS[part](scores, 2, 0.5, generator=torch.Generator().manual_seed(0), law="gumbel")
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.shape == (*shape[:-1], *((2, 4) if part == "selection" else (4,)))
    assert first.dtype == dtype
    total = first.flatten(-2).sum(-1) if part == "selection" else first.sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, 2))
    assert torch.autograd.grad(first.sum(), scores)[0].isfinite().all()


def test_the_rows_add_up_to_the_mask():
    scores, noise = torch.randn(3, 6, dtype=torch.float64), draws(10, 3, 6)
    rows = perturbed_selection(scores, 4, 0.5, noise=noise)
    torch.testing.assert_close(rows.sum(-2), perturbed_mask(scores, 4, 0.5, noise=noise))
    torch.testing.assert_close(rows.sum(-1), torch.ones(3, 4, dtype=torch.float64))


def test_only_indices_and_noise_are_kept():
    scores = torch.randn(8, 1000, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        perturbed_mask(scores, 10, 0.5, samples=20)
    assert sum(kept) <= 20 * 8 * (1000 + 10) + 1


def test_there_is_no_second_derivative():
    scores = torch.randn(3, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(perturbed_mask(scores, 2, 0.5).square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_bad_arguments_are_refused():
    scores = torch.randn(3, 6)
    for options, message in (
        ({"samples": 0}, r"samples must be >= 1, got 0"),
        ({"samples": 1}, r"samples must be >= 2 where they are centred, got 1"),
        ({"samples": 5, "antithetic": True}, r"samples must be even and >= 1, got 5"),
        ({"law": "gumbel", "antithetic": True}, r"antithetic draws need symmetric noise: normal, got gumbel"),
        ({"noise": torch.randn(9, 3, 6)}, r"noise must have shape \(10, 3, 6\), got \(9, 3, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            perturbed_mask(scores, 2, **options)
    for k, temperature, message in ((7, 1.0, "k must be"), (2, 0.0, "temperature must be > 0")):
        with pytest.raises(ValueError, match=message):
            perturbed_mask(scores, k, temperature)


@pytest.mark.parametrize(("n", "k"), [(10, 3), (4096, 1), (5000, 7), (5003, 300), (20_011, 1000)])
def test_top_indices_are_those_of_topk(n, k):
    for scores in (
        torch.randn(2, 3, n),
        torch.randn(3, n).round(decimals=1),  # many ties
        torch.where(torch.rand(3, n) < 0.999, -torch.inf, torch.randn(3, n)),
        torch.zeros(2, n),
    ):
        expected = scores.topk(k, dim=-1).values
        index = top_indices(scores, k, ranked=True)
        assert torch.equal(scores.gather(-1, index), expected)
        index = top_indices(scores, k)
        assert torch.equal(scores.gather(-1, index).sort(-1, descending=True).values, expected)
        assert (index.sort(-1).values.diff(dim=-1) > 0).all()
