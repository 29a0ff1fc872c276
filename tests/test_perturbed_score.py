import itertools
import math

import numpy as np
import pytest
import torch
from references import hard_selection

from topkbench.methods import PerturbedScore, Step
from topkbench.randomness import Normals

N, K, MANY = 5, 2, 40_000


def step_of(scores, loss, wants="mask", k=K):
    """Two replicates of three rows of five scores."""
    nothing = scores.new_zeros
    noise = Normals([0, 1], dtype=scores.dtype)
    return Step(nothing(2, N, 4), nothing(2, 3, 4), scores, k, wants, loss, noise)


def one_row_often(scores, loss, count=MANY, k=K):
    rows = scores.expand(1, count, len(scores)).clone().requires_grad_()
    W, x = rows.new_zeros(1, len(scores), 3), rows.new_zeros(1, count, 3)
    step = Step(W, x, rows, k, "mask", lambda part: loss(part, rows), Normals([0], dtype=rows.dtype))
    return step, rows


def reference(s, z, sigma, loss, law, antithetic):
    """One row: the losses of the noisy choices, and the formula."""
    z = np.concatenate([z, -z]) if antithetic else z
    losses = np.array([loss(hard_selection(s + sigma * noise, K)) for noise in z])
    vjp = np.zeros_like(s)
    for i, noise in enumerate(z):
        baseline = 0 if antithetic else np.delete(losses, i).mean()
        slope = noise if law == "normal" else 1 - np.exp(-noise)
        vjp += slope * (losses[i] - baseline) / (sigma * len(z))
    return losses.mean(), vjp


@pytest.mark.parametrize("wants", ["mask", "values"])
@pytest.mark.parametrize(("law", "antithetic"), [("normal", False), ("gumbel", False), ("normal", True)])
def test_the_formula(law, antithetic, wants):
    scores, g = (
        torch.randn(2, 3, N, dtype=torch.float64, requires_grad=True),
        np.array([1.0, -2.0, 0.5, 3.0, 0.2]),
    )
    g = g if wants == "mask" else g[:K]
    weight = torch.tensor(g)
    method = PerturbedScore(0.7, 6, law, antithetic)
    loss = method(step_of(scores, lambda part: (part @ weight).square(), wants))
    grad = torch.autograd.grad(loss.sum(), scores)[0]
    count = 3 if antithetic else 6
    noise = Normals([0, 1], dtype=torch.float64)("perturbation", count, 3, N, law=law).numpy()
    for row in itertools.product(range(2), range(3)):
        s = scores[row].detach().numpy()

        def of(P, s=s):
            return ((P.sum(0) if wants == "mask" else P @ s) @ g) ** 2

        value, vjp = reference(s, noise[row[0], :, row[1]], 0.7, of, law, antithetic)
        if wants == "values":  # the values are the scores themselves, and have their gradient
            z = noise[row[0], :, row[1]]
            for one in np.concatenate([z, -z]) if antithetic else z:
                P = hard_selection(s + 0.7 * one, K)
                vjp = vjp + 2 * (P @ s @ g) * (g @ P) / 6
        assert loss[row].item() == pytest.approx(value)
        np.testing.assert_allclose(grad[row], vjp, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("antithetic", [False, True])
def test_normal_noise_of_two_scores_is_the_normal_law(antithetic):
    """`P(first) = Phi((s_1 - s_2) / (sigma sqrt 2))`; the loss is anything of the choice and the scores."""
    s, sigma = torch.tensor([0.3, -0.2], dtype=torch.float64), 0.6
    step, rows = one_row_often(s, lambda mask, q: 5 * mask[..., 0].square() + (mask * q).sum(-1), k=1)
    gradients = torch.autograd.grad(PerturbedScore(sigma, 4, antithetic=antithetic)(step).sum(), rows)[0][0]

    def mean_loss(s):
        p = torch.special.ndtr((s[0] - s[1]) / (sigma * math.sqrt(2)))
        return p * (5 + s[0]) + (1 - p) * s[1]

    truth = torch.func.grad(mean_loss)(s)
    error = gradients.std(0) / MANY**0.5
    assert ((gradients.mean(0) - truth) / error).abs().max() < 4
    assert ((gradients.mean(0) - 1.1 * truth) / error).abs().max() > 4


def test_gumbel_noise_is_the_plackett_luce_law():
    s, sigma = torch.randn(N, dtype=torch.float64), 0.8
    A, B = torch.randn(N, dtype=torch.float64), torch.randn(N, N, dtype=torch.float64)

    def loss(mask, q):
        return (mask @ A).exp() + ((mask * q) @ B).square().sum(-1)

    def mean_loss(s):
        total = 0.0
        for i, j in itertools.permutations(range(N), 2):
            w = (s / sigma).exp()
            p = w[i] / w.sum() * w[j] / (w.sum() - w[i])
            mask = torch.zeros(N, dtype=torch.float64)
            mask[[i, j]] = 1
            total = total + p * loss(mask, s)
        return total

    step, rows = one_row_often(s, loss)
    value = PerturbedScore(sigma, 4, "gumbel")(step)[0]
    gradients = torch.autograd.grad(value.sum(), rows)[0][0]
    truth = torch.autograd.functional.jacobian(mean_loss, s)
    error = gradients.std(0) / MANY**0.5
    assert ((gradients.mean(0) - truth) / error).abs().max() < 4
    assert ((gradients.mean(0) - 1.1 * truth) / error).abs().max() > 4
    assert (value.mean() - mean_loss(s)).abs() < 4 * value.std() / MANY**0.5


def test_a_constant_added_to_the_loss_changes_nothing():
    scores = torch.randn(2, 3, N, dtype=torch.float64, requires_grad=True)
    for method in (PerturbedScore(), PerturbedScore(noise="gumbel"), PerturbedScore(antithetic=True)):
        grads = [
            torch.autograd.grad(method(step_of(scores, lambda mask, c=c: mask[..., 0] + c)).sum(), scores)[0]
            for c in (0.0, 100.0)
        ]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_alone_is_the_same(dtype):
    scores = torch.randn(2, 3, N, dtype=dtype)
    value = PerturbedScore()(step_of(scores.clone().requires_grad_(), lambda mask: mask[..., 1]))
    with torch.no_grad():
        torch.testing.assert_close(
            PerturbedScore()(step_of(scores, lambda mask: mask[..., 1])), value.detach()
        )
    assert value.dtype == dtype


def test_bad_arguments_are_refused():
    for arguments, message in (
        ({"temperature": -1.0}, "temperature must be > 0 and finite, got -1"),
        ({"samples": 1}, "samples must be >= 2 where they are centred, got 1"),
        ({"samples": 3, "antithetic": True}, "samples must be even and >= 1, got 3"),
        (
            {"noise": "gumbel", "antithetic": True},
            "antithetic draws need symmetric noise: normal, got gumbel",
        ),
        ({"noise": "cauchy"}, "noise must be normal or gumbel, got cauchy"),
    ):
        # Where signatures are checked as well (jaxtyping), a wrong word is refused by that text.
        with pytest.raises((ValueError, TypeError), match=f"{message}|typechecking parameter"):
            PerturbedScore(**arguments)
