"""RELAX: unbiased whatever it has learned, REBAR before it has, less varied after."""

import pytest
import torch
from gates import TEMPERATURE, A, K, close, expected_loss, mean_gradient, rows, step_on, wild

from topkbench.methods import REBAR, RELAX, Step
from topkbench.operators import entropic
from topkbench.randomness import Normals

HIDDEN = 3


def parameters(n, seed=6):
    """Some that nothing has learned: eta, V, v_0, v, r_0."""
    return {"control": 3 * rows(1, 1 + n * HIDDEN + 2 * HIDDEN + 1, seed=seed)}


def gradient_of(method, step, scores):
    value = method(step)
    return value.detach(), torch.autograd.grad(value.sum(), scores)[0]


@pytest.mark.parametrize("seed", [6, 7])
@pytest.mark.parametrize("softness", [0.6, 1.0])
def test_unbiased_whatever_it_has_learned(softness, seed):
    """The more nodes, the closer: the control variate is smooth in the noise."""
    method = RELAX(TEMPERATURE, softness, hidden=HIDDEN)
    for n, k, count, tol in ((2, 1, 40, 1e-8), (3, 1, 14, 4e-4), (3, 2, 14, 4e-4)):
        value, gradient, truth = mean_gradient(method, n, k, count, parameters(n, seed))
        close(value, expected_loss(rows(n, seed=4), k))
        assert (gradient - truth).norm() < tol * truth.norm()


def test_the_first_estimate_is_that_of_rebar():
    scores = rows(50, 4).requires_grad_()
    for eta in (0.0, 1.0, 1.7):
        memory = {}
        step = step_on(scores, wild, memory=memory)
        rebar = gradient_of(REBAR(TEMPERATURE, 0.4, eta), step_on(scores, wild), scores)
        for own, other in zip(gradient_of(RELAX(TEMPERATURE, 0.4, eta), step, scores), rebar, strict=True):
            close(own, other)
        assert set(memory) == {"control", "control steps", "control mean", "control squares"}


def control_by_hand(phi, m, relaxed):
    """The control variate of one mask, in the letters of the method's docstring."""
    n = len(m)
    eta, rest = phi[0], phi[1:]
    V, v0 = rest[: n * HIDDEN].reshape(n, HIDDEN), rest[n * HIDDEN : (n + 1) * HIDDEN]
    v, r0 = rest[(n + 1) * HIDDEN : -1], rest[-1]
    return eta * relaxed + v @ torch.tanh(V.T @ (2 * m - 1) + v0) + r0


def estimate_by_hand(phi, a, u, scores, softness):
    """The estimate in the log-odds, with dc/dm by autograd through the loss and the network."""
    p = a.sigmoid()
    z = a + u.logit()
    b = (z > 0).to(a.dtype)
    m = (z / softness).sigmoid().requires_grad_()
    c = control_by_hand(phi, m, wild(m, scores))
    (dc,) = torch.autograd.grad(c, m, create_graph=True)
    change = torch.where(b == 1, (1 - p) / u, p / (1 - u))
    return (wild(b, scores) - c) * (b - p) + dc * m * (1 - m) / softness * change


def test_estimate_and_step_by_hand():
    """Two steps of three replicates, of three gates in four rows: the second meets moments that are not 0."""
    n, B, softness, rate = 3, 4, 0.5, 0.05
    scores = rows(3, B, n, seed=4).requires_grad_()
    memory = {"control": torch.cat([parameters(n, seed)["control"] for seed in (6, 7, 8)])}
    phi = memory["control"].clone()
    mean = square = torch.zeros_like(phi)
    method = RELAX(TEMPERATURE, softness, hidden=HIDDEN, rate=rate)
    for count in (1, 2):
        u = torch.rand(3, B, n, dtype=torch.float64)
        step = Step(
            rows(3, n, 2),
            rows(3, B, 2),
            scores,
            K,
            "mask",
            lambda m: wild(m, scores.detach()),
            lambda *_, u=u, **__: u,
            memory,
        )
        value, found = gradient_of(method, step, scores)
        leaf = phi.clone().requires_grad_()
        squares = 0
        for r in range(3):
            for i in range(B):
                s = scores[r, i].detach()
                a, p = log_odds(s)
                g = estimate_by_hand(leaf[r], a, u[r, i], s, softness)
                w = p * (1 - p) / (p * (1 - p)).sum()
                at_scores = g - w * g.sum()
                close(found[r, i], at_scores.detach() / TEMPERATURE)
                squares = squares + at_scores.square().sum() / B
        (change,) = torch.autograd.grad(squares, leaf)
        mean = 0.9 * mean + 0.1 * change
        square = 0.999 * square + 0.001 * change**2
        size = (square / (1 - 0.999**count)).sqrt() + 1e-8
        phi = phi - rate * mean / (1 - 0.9**count) / size
        close(memory["control"], phi)
        assert value.shape == (3, B)


def log_odds(s):
    p = entropic(s, K, TEMPERATURE)
    return p.logit(), p


def test_draws_come_from_the_noise():
    """The mean of many real draws is the gradient, within 4 standard errors; 1.2 times it is not."""
    scores = rows(3, seed=4)
    each = scores.expand(40_000, 3).clone().requires_grad_()
    step = step_on(each, wild, memory={"control": parameters(3)["control"] / 3})
    g = torch.autograd.grad(RELAX(TEMPERATURE, hidden=HIDDEN)(step).sum(), each)[0]
    truth, error = torch.func.grad(expected_loss)(scores), g.std(0) / len(each) ** 0.5
    assert ((g.mean(0) - truth) / error).abs().max() < 4
    assert ((g.mean(0) - 1.2 * truth) / error).abs().max() > 4


def quadratic(mask, _):
    return (mask - A).square().sum(-1) + 5


def learned(method, n, steps, seed=3):
    """What it remembers after so many mini-batches of 64 rows, all alike."""
    noise, memory = Normals([seed], dtype=torch.float64), {}
    each = rows(n, seed=4).expand(64, n).clone().requires_grad_()
    for _ in range(steps):
        method(step_on(each, quadratic, noise=noise, memory=memory))
    return memory


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_what_it_learns_lowers_the_variance(eta):
    """Less than half of that of REBAR with the default eta; starting without a relaxed loss, too."""
    method = RELAX(TEMPERATURE, eta=eta, rate=0.03)
    each = rows(4, seed=4).expand(20_000, 4).clone().requires_grad_()
    rebar, before, after = (
        torch.autograd.grad(m(step_on(each, quadratic, memory=memory)).sum(), each)[0].var(0).sum().item()
        for m, memory in (
            (REBAR(TEMPERATURE), {}),
            (method, {}),
            (method, learned(method, 4, 300)),
        )
    )
    assert after < 0.5 * rebar
    assert after < 0.5 * before


def test_without_gradients_nothing_is_learned():
    memory = {}
    with torch.no_grad():
        RELAX()(step_on(rows(5, 4), wild, memory=memory))
    assert memory == {}


def test_replicates_learn_apart():
    """Each from its own noise, the same as alone."""
    method, memory, noise = RELAX(TEMPERATURE), {}, Normals([0, 1, 2], dtype=torch.float64)
    scores = rows(3, 5, 4).requires_grad_()
    alone = [({}, Normals([i], dtype=torch.float64)) for i in range(3)]
    for _ in range(3):
        step = Step(
            rows(3, 4, 2), rows(3, 5, 2), scores, K, "mask", lambda m: wild(m, scores.detach()), noise, memory
        )
        method(step)
        for i, (own, source) in enumerate(alone):
            method(step_on(scores[i], lambda m, s: wild(m, s.detach()), noise=source, memory=own))
    for i, (own, _) in enumerate(alone):
        for name, value in own.items():
            close(memory[name][i : i + 1], value)
    assert (memory["control"][0] != memory["control"][1]).any()


def test_extreme_scores():
    for dtype in (torch.float32, torch.float64):
        for row in ([1e4, -1e4, 0.0, 1.0], [torch.inf, 1.0, 0.5, -torch.inf], [1.0, 1.0, 1.0, 1.0]):
            scores = torch.tensor([row] * 20, dtype=dtype, requires_grad=True)
            for k in (1, 2, 3, 4):
                memory = {}
                for _ in range(2):
                    step = step_on(scores, lambda m, _: m.square().sum(-1), k=k, memory=memory)
                    value, g = gradient_of(RELAX(), step, scores)
                    assert value.isfinite().all()
                    assert g.isfinite().all()
                assert all(kept.isfinite().all() and kept.dtype == dtype for kept in memory.values())


def test_bad_arguments_are_refused():
    for make, message in (
        (lambda: RELAX(0.0), "temperature must be > 0 and finite, got 0"),
        (lambda: RELAX(softness=-1.0), "softness must be > 0 and finite, got -1"),
        (lambda: RELAX(eta=-0.5), "eta must be >= 0 and finite, got -0.5"),
        (lambda: RELAX(hidden=0), "hidden must be >= 1, got 0"),
        (lambda: RELAX(rate=0.0), "rate must be > 0 and finite, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="needs a task whose loss is a function of the mask, not of values"):
        RELAX()(step_on(rows(2, 4), lambda v, _: v.sum(-1), "values"))
