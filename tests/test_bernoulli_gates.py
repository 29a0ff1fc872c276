"""Gates that are open or shut: their gradients by enumeration of masks, by quadrature of the noise."""

import numpy as np
import pytest
import references_gates as references
import torch
from gates import (
    TEMPERATURE,
    A,
    K,
    close,
    expected_loss,
    given,
    mean_gradient,
    nodes,
    rows,
    step_on,
    wild,
)
from torch.func import grad

import topkbench.methods.bernoulli_gates as bernoulli
from topkbench.methods import REBAR, DisARM

N = 3


@pytest.mark.parametrize(("n", "k"), [(2, 1), (3, 1), (3, 2), (4, 2), (4, 3)])
@pytest.mark.parametrize("method", [DisARM(TEMPERATURE), REBAR(TEMPERATURE, eta=0.0)])
def test_unbiased(method, n, k):
    """One node for each piece: what is drawn is all that counts."""
    value, gradient, truth = mean_gradient(method, n, k, 1)
    close(value, expected_loss(rows(n, seed=4), k))
    close(gradient, truth)


@pytest.mark.parametrize("method", [REBAR(TEMPERATURE, 1.0, 0.6), REBAR(TEMPERATURE)])
def test_unbiased_with_the_control_variate(method):
    """The more nodes, the closer: the relaxed mask is smooth in the noise."""
    for n, k, count, tol in ((2, 1, 20, 1e-10), (3, 1, 14, 5e-4), (3, 2, 14, 1e-4)):
        value, gradient, truth = mean_gradient(method, n, k, count)
        close(value, expected_loss(rows(n, seed=4), k))
        assert (gradient - truth).norm() < tol * truth.norm()


@pytest.mark.parametrize("method", [DisARM(TEMPERATURE, 2), REBAR(TEMPERATURE), REBAR(TEMPERATURE, 0.2, 1.7)])
def test_draws_come_from_the_noise(method):
    """The mean of many real draws is the gradient, within 4 standard errors; 1.2 times it is not."""
    scores = rows(N, seed=4)
    each = scores.expand(40_000, N).clone().requires_grad_()
    gradients = torch.autograd.grad(method(step_on(each, wild)).sum(), each)[0]
    truth, error = grad(expected_loss)(scores), gradients.std(0) / len(each) ** 0.5
    assert ((gradients.mean(0) - truth) / error).abs().max() < 4
    assert ((gradients.mean(0) - 1.2 * truth) / error).abs().max() > 4


def test_disarm_of_one_row():
    s, u = rows(N).numpy(), np.array([[0.9, 0.3, 0.55], [0.2, 0.6, 0.8]])
    a = references.levels(s, K, TEMPERATURE, references.logistic)
    p, expected, losses = references.logistic(a), np.zeros(N), []
    for one in u:
        masks = [(1 - one < p).astype(int), (one < p).astype(int)]
        pair = [float(wild(torch.from_numpy(m.astype(float)), torch.from_numpy(s))) for m in masks]
        expected += references.disarm(pair, *masks, a) / 2
        losses += pair
    leaf = torch.from_numpy(s)[None].requires_grad_()
    step = step_on(
        leaf, lambda m, q: wild(m, q.detach()), noise=lambda *_, **__: torch.from_numpy(u)[None, :, None]
    )
    value = DisARM(TEMPERATURE, 2)(step)
    close(value.detach(), [[np.mean(losses)]])
    vjp = references.through_threshold(
        expected, a, TEMPERATURE, lambda a: references.logistic(a) * references.logistic(-a)
    )
    close(torch.autograd.grad(value.sum(), leaf)[0], vjp[None], 1e-8)


@pytest.mark.parametrize(("p", "variance"), [(0.1, 1.29e-5), (0.3, 1.18e-5), (0.5, 0.0)])
def test_the_toy_of_arms(p, variance, monkeypatch):
    """(z - .49)^2 of one gate: the variance of DisARM in the published script's toy, 200,000 draws."""
    leaf = torch.full((1, 1), np.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(bernoulli, "levels", lambda scores, *_: scores)
    u, mass = nodes(torch.tensor([p], dtype=torch.float64), 1)
    each = leaf.detach().expand(len(u), 1).clone().requires_grad_()
    loss = DisARM()(step_on(each, lambda z, _: (z[..., 0] - 0.49).square(), k=1, noise=given(u)))
    g = torch.autograd.grad(loss.sum(), each)[0][:, 0]
    mean = (mass * g).sum()
    close(mean, (1 - 2 * 0.49) * p * (1 - p))
    assert (mass * (g - mean).square()).sum().item() == pytest.approx(variance, abs=1e-7)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_rebar_of_one_row(eta):
    s, u, softness = rows(N).numpy(), np.array([0.9, 0.3, 0.55]), 0.4
    a = references.levels(s, K, TEMPERATURE, references.logistic)
    q = torch.from_numpy(s)

    def loss(mask):
        return float(wild(torch.from_numpy(mask), q))

    def slope(mask):
        return grad(lambda m: wild(m, q))(torch.from_numpy(mask)).numpy()

    g = references.rebar(loss, slope, u, a, softness, eta)
    vjp = references.through_threshold(
        g, a, TEMPERATURE, lambda a: references.logistic(a) * references.logistic(-a)
    )
    leaf = q[None].clone().requires_grad_()
    step = step_on(leaf, lambda m, q: wild(m, q.detach()), noise=given(torch.from_numpy(u)[None]))
    value = REBAR(TEMPERATURE, softness, eta)(step)
    b = (np.log(u / (1 - u)) + a > 0).astype(float)
    close(value.detach(), [[loss(b)]])
    close(torch.autograd.grad(value.sum(), leaf)[0], vjp[None], 1e-6)


def test_the_pair_and_the_control_variate_lower_the_variance():
    def loss(mask, _):
        return (mask - A).square().sum(-1) + 5

    each = rows(4, seed=4).expand(4000, 4).clone().requires_grad_()
    plain, pair, control = (
        torch.autograd.grad(m(step_on(each, loss)).sum(), each)[0].var(0).sum()
        for m in (REBAR(TEMPERATURE, eta=0.0), DisARM(TEMPERATURE), REBAR(TEMPERATURE))
    )
    assert pair < 0.2 * plain
    assert control < 0.2 * plain
