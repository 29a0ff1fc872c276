import dataclasses

import numpy as np
import pytest
import torch
from conftest import built
from references import hard_selection

from topkbench import gradients
from topkbench.evaluate import evaluate
from topkbench.methods import AdaptiveIMLE, BlackBox, ImplicitMLE, Step
from topkbench.methods.noises import TERMS, draws, sum_of_gammas
from topkbench.optimizers import Adam
from topkbench.randomness import Normals
from topkbench.step import gradient
from topkbench.train import Logging, Training, train

K = 2


def step_of(scores, loss, wants="mask", memory=None, k=K):
    """Three replicates of five rows of six scores."""
    nothing = scores.new_zeros
    normals = Normals([0, 1, 2], dtype=scores.dtype)
    memory = {} if memory is None else memory
    return Step(nothing(3, 6, 4), nothing(3, 5, 4), scores, k, wants, loss, normals, memory)


def scores_and_cotangent(dtype=torch.float64):
    return torch.randn(3, 5, 6, dtype=dtype, requires_grad=True), torch.randn(6, dtype=dtype)


def of(loss, scores):
    return torch.autograd.grad(loss.sum(), scores, retain_graph=True)[0]


def masks(scores, k=K):
    """The hard masks of rows, by the reference."""
    rows = [hard_selection(row, k).sum(0) for row in scores.reshape(-1, scores.shape[-1])]
    return np.stack(rows).reshape(scores.shape)


@pytest.mark.parametrize("strength", [0.1, 1.0, 20.0])
def test_black_box_is_the_formula(strength):
    scores, g = scores_and_cotangent()
    loss = BlackBox(strength)(step_of(scores, lambda mask: mask @ g))
    s = scores.detach().numpy()
    np.testing.assert_allclose(loss.detach(), masks(s) @ g.numpy(), rtol=1e-12)
    expected = (masks(s) - masks(s - strength * g.numpy())) / strength
    np.testing.assert_allclose(of(loss, scores), expected, rtol=1e-12)


def test_what_flows_beside_the_mask_is_kept():
    scores, g = scores_and_cotangent()
    loss = BlackBox(0.5)(step_of(scores, lambda mask: ((mask * scores) @ g).square()))
    s, c = scores.detach().numpy(), g.numpy()
    mask = masks(s)
    outer = 2 * ((mask * s) @ c)[..., None] * c
    expected = outer * mask + (mask - masks(s - 0.5 * outer * s)) / 0.5
    np.testing.assert_allclose(of(loss, scores), expected, rtol=1e-10, atol=1e-12)


def test_values_are_those_of_nested_masks():
    scores, p = scores_and_cotangent()[0], torch.tensor([1.0, -0.5], dtype=torch.float64)
    loss = BlackBox(0.5)(step_of(scores, lambda values: (values @ p).square(), "values"))
    s = scores.detach().numpy()
    nested = np.stack([masks(s, j) for j in (1, 2)], -2)
    rows = np.diff(nested, axis=-2, prepend=0)
    values = (rows * s[..., None, :]).sum(-1)
    outer = 2 * (values @ p.numpy())[..., None] * p.numpy()
    of_rows = outer[..., None] * s[..., None, :]
    of_masks = [of_rows[..., 0, :] - of_rows[..., 1, :], of_rows[..., 1, :]]
    moved = [masks(s - 0.5 * g, j) for j, g in zip((1, 2), of_masks, strict=True)]
    expected = (rows * outer[..., None]).sum(-2) + (nested - np.stack(moved, -2)).sum(-2) / 0.5
    np.testing.assert_allclose(of(loss, scores), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("law", ["gamma", "gumbel", "normal", "none"])
def test_implicit_mle_moves_the_scores_under_the_same_noise(law, symmetric):
    scores, g = scores_and_cotangent()
    method = ImplicitMLE(strength=0.8, noise=law, scale=0.5, samples=3, symmetric=symmetric)
    step = step_of(scores, lambda mask: mask @ g)
    loss = method(step)
    s, c = scores.detach().numpy(), g.numpy()
    noisy = s + 0.5 * draws(step_of(scores, torch.zeros_like), "perturbation", law, 3).numpy()
    np.testing.assert_allclose(loss.detach(), (masks(noisy) @ c).mean(0), rtol=1e-12)
    ahead = masks(noisy + 0.8 * c) if symmetric else masks(noisy)
    expected = (ahead - masks(noisy - 0.8 * c)).mean(0) / (1.6 if symmetric else 0.8)
    np.testing.assert_allclose(of(loss, scores), expected, rtol=1e-12, atol=1e-14)
    assert method.stochastic == (law != "none")


def test_the_sum_of_gammas_over_k_has_the_moments_of_its_limit():
    """The sum of k is sum_i E_i / i - log m with standard exponentials E_i: nearly Gumbel."""
    step = step_of(torch.zeros(3, 5, 6, dtype=torch.float64), torch.zeros_like, k=3)
    noise = sum_of_gammas(step, "noise", 40_000, 3).sum(-1).flatten()
    harmonic = sum(1 / i for i in range(1, TERMS + 1))
    variance = sum(1 / i**2 for i in range(1, TERMS + 1))
    error = (variance / len(noise)) ** 0.5
    assert noise.mean().item() == pytest.approx(harmonic - np.log(TERMS), abs=4 * error)
    # The excess kurtosis of a Gumbel is 2.4: the variance of the variance is (2 + 2.4) V^2 / N.
    assert noise.var().item() == pytest.approx(variance, rel=4 * (4.4 / len(noise)) ** 0.5)


def test_adaptive_is_the_published_rule():
    """One replicate after another, as the published class does it for one."""
    scores, g = scores_and_cotangent()
    method = AdaptiveIMLE(strength=0.3, noise="none", rate=0.1, decay=0.5)
    memory, grads = {}, []
    for _ in range(4):
        grads.append(of(method(step_of(scores, lambda mask: mask @ g, memory=memory)), scores))
    for r in range(3):
        beta, average, s = 0.3, 1.0, scores[r].detach().numpy()
        for grad in grads:
            dy = np.broadcast_to(g.numpy(), s.shape)
            strength = beta * np.linalg.norm(s) / np.linalg.norm(dy)
            difference = masks(s) - masks(s - strength * dy)
            expected = difference / strength if strength > 0 else difference
            np.testing.assert_allclose(grad[r], expected, rtol=1e-10, atol=1e-12)
            average = 0.5 * average + 0.5 * np.count_nonzero(difference) / len(s)
            beta = max(beta + (0.1 if average < 1 else -0.1), 0)
        assert memory["beta"][r].item() == pytest.approx(beta, abs=1e-12)
        assert memory["non-zeros"][r].item() == pytest.approx(average)


@pytest.mark.parametrize("wants", ["mask", "values"])
@pytest.mark.parametrize("samples", [1, 3])
def test_adaptive_strength_is_the_same_whatever_the_scale_of_the_loss(wants, samples):
    scores, _ = scores_and_cotangent()
    p = torch.randn(6 if wants == "mask" else 2, dtype=torch.float64)
    grads = [
        of(AdaptiveIMLE(samples=samples)(step_of(scores, lambda part, c=c: c * (part @ p), wants)), scores)
        for c in (1.0, 100.0)
    ]
    torch.testing.assert_close(grads[1], 100 * grads[0], rtol=1e-9, atol=1e-12)


def test_a_gradient_of_zero_is_no_nan():
    scores, _ = scores_and_cotangent()
    for method in (BlackBox(), ImplicitMLE(), AdaptiveIMLE()):
        grad = of(method(step_of(scores, lambda mask: 0 * mask.sum(-1))), scores)
        assert torch.equal(grad, torch.zeros_like(grad))


SHORT = {"training": Training(steps=12, batch=4), "dtype": torch.float64}
ADAPTIVE = AdaptiveIMLE(rate=0.05)


@pytest.mark.parametrize("task", ["mask", "values"])
def test_what_a_replicate_remembers_is_its_own(task):
    task = built("task", task)
    together = train(ADAPTIVE, task, Adam(0.01), [0, 1, 2], logging=Logging(3, 4, 16), **SHORT)
    alone = train(ADAPTIVE, task, Adam(0.01), [1], logging=Logging(3, 4, 16), **SHORT)
    torch.testing.assert_close(together.W[1], alone.W[0], rtol=1e-9, atol=1e-12)
    for (_, _, all_columns), (_, _, columns) in zip(together.points, alone.points, strict=True):
        for name, column in columns.items():
            torch.testing.assert_close(all_columns[name][1:2], column, rtol=1e-7, atol=1e-10, equal_nan=True)


def test_looking_more_often_changes_nothing():
    task = built("task", "mask")
    runs = [
        train(ADAPTIVE, task, Adam(0.01), [0, 1], logging=logging, **SHORT).W
        for logging in (Logging(2, 0, 16), Logging(13, 4, 16))
    ]
    assert torch.equal(*runs)


def test_training_remembers_and_looking_does_not():
    task = built("task", "mask")
    normals = Normals([0, 1], dtype=torch.float64)
    teacher, W = task.teacher(normals.child("teacher")), task.start(normals.child("start"))
    memory = {}
    batch = task.sample(teacher, normals, 4)
    gradient(ADAPTIVE, task, W, batch, normals, memory)
    assert set(memory) == {"beta", "non-zeros"}
    before = {name: tensor.clone() for name, tensor in memory.items()}
    gradients.measure(ADAPTIVE, task, W, teacher, normals.child("a"), gradients.Sampling(4, 5), memory=memory)
    evaluate(ADAPTIVE, task, W, task.sample(teacher, normals, 300, clean=True), normals.child("b"), memory)
    for name, tensor in memory.items():
        assert torch.equal(tensor, before[name])
    gradient(ADAPTIVE, task, W, batch, normals, memory)
    assert not torch.equal(memory["beta"], before["beta"])


@pytest.mark.parametrize("method", [BlackBox(), ImplicitMLE(samples=2), AdaptiveIMLE()])
def test_without_gradients_there_is_the_loss_alone(method):
    scores, g = scores_and_cotangent(torch.float32)
    memory = {}
    with torch.no_grad():
        value = method(step_of(scores, lambda mask: mask @ g, memory=memory))
    assert not memory
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, method(step_of(scores, lambda mask: mask @ g)).detach())


def test_bad_arguments_are_refused():
    for method in (BlackBox, ImplicitMLE, AdaptiveIMLE):
        with pytest.raises(ValueError, match=r"strength must be > 0 and finite, got 0"):
            method(strength=0.0)
    for change, message in (
        ({"scale": -1.0}, r"scale must be > 0 and finite, got -1"),
        ({"samples": 0}, r"samples must be >= 1, got 0"),
        (
            {"noise": "cauchy"},
            r"noise must be one of none, gumbel, normal, gamma, got cauchy|parameter 'noise'",
        ),
        ({"rate": 0.0}, r"rate must be > 0 and finite, got 0"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1"),
        ({"target": 0.0}, r"target must be > 0 and finite, got 0"),
    ):
        # Where signatures are checked as well, a wrong word is refused by that text.
        with pytest.raises((ValueError, TypeError), match=message):
            dataclasses.replace(AdaptiveIMLE(), **change)
