"""Independent gates, k open in the mean: their law, and those between 0 and 1."""

import numpy as np
import pytest
import references_gates as references
import torch
from gates import K, close, given, rows, step_on, wild
from scipy.stats import norm

from topkbench.methods import ARMS, REBAR, RELAX, DisARM, HardConcrete, Step, StochasticGates
from topkbench.methods._gates import SURE, levels
from topkbench.operators import entropic, gaussian, hard_mask
from topkbench.operators._kernels import Gaussian, Logistic
from topkbench.randomness import Normals

N, TEMPERATURE = 3, 0.7
EVERY = [m(TEMPERATURE) for m in (DisARM, ARMS, REBAR, RELAX, HardConcrete, StochasticGates)]
KERNELS = [(Logistic(), references.logistic), (Gaussian(), norm.cdf)]


# Levels


@pytest.mark.parametrize(("kernel", "cdf"), KERNELS)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (5, 1), (5, 2), (5, 4), (40, 7)])
def test_levels_open_k_in_the_mean(n, k, temperature, kernel, cdf):
    scores = rows(3, n)
    a = levels(scores, k, temperature, kernel)
    expected = np.array([references.levels(row, k, temperature, cdf) for row in scores.numpy()])
    close(a, expected, 1e-8)
    close(torch.from_numpy(cdf(a.numpy())).sum(-1), torch.full((3,), float(k)), 1e-8)


@pytest.mark.parametrize("kernel", [Logistic(), Gaussian()])
def test_levels_have_the_derivative(kernel):
    scores = rows(2, 5).requires_grad_()
    for k in (1, 3, 4):
        for temperature in (0.5, 5.0):
            jacobian = torch.autograd.functional.jacobian(
                lambda s, k=k, t=temperature: levels(s, k, t, kernel)[0], scores
            )
            h = 1e-6
            for i in range(5):
                e = torch.zeros(2, 5, dtype=torch.float64)
                e[0, i] = h
                ends = [levels(scores.detach() + side * e, k, temperature, kernel)[0] for side in (1, -1)]
                close(jacobian[:, 0, i], (ends[0] - ends[1]) / (2 * h), 1e-6)


def test_levels_at_the_ends():
    for kernel in (Logistic(), Gaussian()):
        for dtype in (torch.float32, torch.float64):
            scores = torch.tensor([[3.0, -torch.inf, 1e4, 0.1, torch.inf]], dtype=dtype, requires_grad=True)
            for k in (1, 2, 3, 4, 5):
                for temperature in (1e-3, 1.0, 1e3):
                    a = levels(scores, k, temperature, kernel)
                    (g,) = torch.autograd.grad(a.sum(), scores)
                    assert a.isfinite().all()
                    assert g.isfinite().all()
                    assert a.abs().max() <= SURE
                    if temperature < 1:
                        assert torch.equal((a > 0).to(dtype), hard_mask(scores, k))
            assert torch.equal(levels(scores, 5, 1.0, kernel), torch.full_like(scores, SURE))
    assert levels(torch.tensor([0.0, torch.nan, 1.0]), 1, 1.0, Logistic()).isnan().any()


def test_levels_do_not_saturate_where_the_mask_does():
    scores = torch.tensor([30.0, 20.0, 0.0])
    close(
        levels(scores, 1, 1.0, Logistic()),
        references.levels(scores.double().numpy(), 1, 1.0, references.logistic),
        1e-5,
    )
    assert (levels(scores, 1, 1e-3, Logistic()).sign() == torch.tensor([1.0, -1.0, -1.0])).all()


# Between 0 and 1


def test_soft_gates_are_the_formula():
    for seed, (n, k) in enumerate([(3, 1), (3, 2), (8, 5)]):
        s, draws = rows(n, seed=seed), Normals([seed], dtype=torch.float64)
        u, e = draws("u", 1, n, law="uniform")[0], draws("e", 1, n)[0]
        for method, noise, expected in (
            (HardConcrete(TEMPERATURE), u, references.hard_concrete(s.numpy(), k, TEMPERATURE, u.numpy()[0])),
            (
                HardConcrete(TEMPERATURE, 0.3, 0.5),
                u,
                references.hard_concrete(s.numpy(), k, TEMPERATURE, u.numpy()[0], 0.3, -0.5, 1.5),
            ),
            (
                StochasticGates(TEMPERATURE),
                e,
                references.stochastic_gates(s.numpy(), k, TEMPERATURE, e.numpy()[0]),
            ),
            (
                StochasticGates(TEMPERATURE, 2.0),
                e,
                references.stochastic_gates(s.numpy(), k, TEMPERATURE, e.numpy()[0], 2.0),
            ),
        ):
            seen = []
            method(
                step_on(
                    s[None], lambda m, _, seen=seen: (seen.append(m), m.sum(-1))[1], k=k, noise=given(noise)
                )
            )
            close(seen[0][0, 0], expected, 1e-9)


@pytest.mark.parametrize("method", [HardConcrete(TEMPERATURE), StochasticGates(TEMPERATURE)])
def test_soft_gates_relaxit(method):
    """Against a public package's own draws of the two laws, in single precision as it has them."""
    package = pytest.importorskip("relaxit.distributions")
    s, number = rows(5), torch.tensor
    generator = torch.Generator().manual_seed(3)
    if isinstance(method, HardConcrete):
        shift = method.softness * np.log(0.1 / 1.1)
        alpha = (levels(s, K, TEMPERATURE, Logistic()) + shift).exp()
        theirs = package.HardConcrete(alpha, number(2 / 3), number(1.1), number(-0.1))
        shape, draw = (7, 1), torch.rand
    else:
        a = levels(s, K, TEMPERATURE, Gaussian())
        theirs = package.GaussianRelaxedBernoulli(0.5 * a, torch.full_like(a, 0.5))
        shape, draw = (7, 5), torch.randn
    torch.manual_seed(3)
    expected, seen = theirs.sample((7,)), []
    noise = draw(shape, generator=generator).expand(7, 5).double()
    method(step_on(s.expand(7, 5), lambda m, _: (seen.append(m), m.sum(-1))[1], noise=given(noise)))
    assert ((expected > 0) & (expected < 1)).any()
    close(seen[0][0], expected.double(), 1e-5)


@pytest.mark.parametrize(
    ("method", "operator"),
    [
        (HardConcrete(TEMPERATURE), entropic),
        (HardConcrete(0.3, 0.2, 0.4), entropic),
        (StochasticGates(TEMPERATURE, 0.2), gaussian),
    ],
)
def test_k_gates_are_above_zero_in_the_mean(method, operator):
    s, many, seen = rows(5), 40_000, []
    method(step_on(s.expand(many, 5), lambda m, _: (seen.append(m), m.sum(-1))[1]))
    positive, p = (seen[0][0] > 0).double(), operator(s, K, method.temperature)
    assert ((positive.mean(0) - p) / (p * (1 - p) / many).sqrt()).abs().max() < 4
    assert (positive.sum(-1).mean() - K).abs() < 0.03
    assert (seen[0][0] == 1).any()


@pytest.mark.parametrize("method", [HardConcrete(TEMPERATURE), StochasticGates(TEMPERATURE)])
def test_soft_gates_have_the_path_derivative(method):
    """With the same noise: through the threshold, and directly where the loss looks at the scores."""
    s, h = rows(4, 6, seed=5).requires_grad_(), 1e-6

    def value(scores):
        return method(
            step_on(scores, lambda m, q: (m * q).sin().sum(-1) + (m.square() * m.roll(1, -1)).sum(-1))
        )[0]

    (g,) = torch.autograd.grad(value(s).sum(), s)
    direction = rows(4, 6, seed=6)
    ends = [value(s.detach() + side * h * direction) for side in (1, -1)]
    close((g * direction).sum(-1), (ends[0] - ends[1]) / (2 * h), 1e-5)


# All of them


@pytest.mark.parametrize("method", EVERY)
def test_limits(method):
    """The hard mask at a low temperature, k / n at a high one; everything open where k = n."""
    scores, seen = rows(50, 6), []
    separate = scores.topk(4).values
    scores = scores[(separate[:, :-1] - separate[:, 1:]).amin(-1) > 0.05]

    def loss(mask, _):
        seen.append(mask)
        return mask.sum(-1)

    for k in (1, 2, 3, 6):
        type(method)(1e-3)(step_on(scores, loss, k=k))
        masks = seen[0][0] if isinstance(method, ARMS | DisARM) else seen[0]
        seen.clear()
        assert torch.equal(masks.reshape(-1, 6), hard_mask(scores, k))
    leaf = scores.clone().requires_grad_()
    value = method(step_on(leaf, lambda m, q: (m * q).sum(-1), k=6))
    close(value[0].detach(), leaf.detach().sum(-1))
    close(torch.autograd.grad(value.sum(), leaf)[0], torch.ones_like(leaf))


@pytest.mark.parametrize("method", [DisARM(1e9), ARMS(1e9), REBAR(1e9), RELAX(1e9)])
def test_uniform_limit(method):
    seen = []
    method(step_on(rows(1, 6).expand(20_000, 6), lambda m, _: (seen.append(m), m.sum(-1))[1]))
    share = seen[0].reshape(-1, 6).mean(0)
    assert (share - K / 6).abs().max() < 0.02


@pytest.mark.parametrize("method", EVERY)
def test_value_alone_is_the_same_in_either_precision(method):
    for dtype in (torch.float32, torch.float64):
        scores = (3 * rows(6, 4)).to(dtype)

        def loss(mask, s):
            return (mask * s).sum(-1).sin()

        leaf = scores.clone().requires_grad_()
        value = method(step_on(leaf, loss))
        with torch.no_grad():
            close(method(step_on(scores, loss)), value.detach())
        assert value.dtype == dtype
        assert torch.autograd.grad(value.sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("method", EVERY)
def test_extreme_scores(method):
    for dtype in (torch.float32, torch.float64):
        for row in ([1e4, -1e4, 0.0, 1.0], [torch.inf, 1.0, 0.5, -torch.inf], [1.0, 1.0, 1.0, 1.0]):
            scores = torch.tensor([row] * 20, dtype=dtype, requires_grad=True)
            for k in (1, 2, 3, 4):
                value = method(step_on(scores, lambda m, _: m.square().sum(-1), k=k))
                (g,) = torch.autograd.grad(value.sum(), scores, materialize_grads=True, allow_unused=True)
                assert value.isfinite().all()
                assert g.isfinite().all()


def test_each_replicate_has_its_own_temperature():
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for method in EVERY:
        scores = rows(3, 5, 4).requires_grad_()
        noise = Normals([0, 1, 2], dtype=torch.float64)
        step = Step(rows(3, 4, 2), rows(3, 5, 2), scores, K, "mask", lambda m, s=scores: wild(m, s), noise)
        together = type(method)(temperature[:, None, None])(step)
        for i in range(3):
            close(together[i], type(method)(temperature[i].item())(step_on(scores[i], wild, seed=i))[0])


def test_bad_arguments_are_refused():
    for make, message in (
        (lambda: DisARM(0.0), "temperature must be > 0 and finite, got 0"),
        (lambda: DisARM(samples=0), "samples must be >= 1, got 0"),
        (lambda: REBAR(softness=-1.0), "softness must be > 0 and finite, got -1"),
        (lambda: REBAR(eta=-0.5), "eta must be >= 0 and finite, got -0.5"),
        (lambda: HardConcrete(stretch=0.0), "stretch must be > 0 and finite, got 0"),
        (lambda: StochasticGates(scale=float("nan")), "scale must be > 0 and finite, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for method in EVERY:
        with pytest.raises(
            ValueError, match="needs a task whose loss is a function of the mask, not of values"
        ):
            method(step_on(rows(2, 4), lambda v, _: v.sum(-1), "values"))
