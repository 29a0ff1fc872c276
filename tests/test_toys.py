"""`subset_toy` and `polynomial` against brute force, and what is known of estimators on them."""

import dataclasses
import importlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from topkbench.evaluate import evaluate, hard_loss
from topkbench.gradients import Sampling, measure, true_gradient
from topkbench.methods import Hard, Oracle, ReinMaxK, ScoreFunction, Simple, TaylorControl
from topkbench.optimizers import SGD
from topkbench.randomness import Normals
from topkbench.step import surrogate
from topkbench.tasks import KnownExpectation, Polynomial, SubsetToy
from topkbench.train import Logging, Training, train

LAWS = ("conditional_poisson", "plackett_luce")


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "experiments"))
        yield importlib.import_module("published_toys")


def at(task, seeds=(0, 1), dtype=torch.float64):
    normals = Normals(list(seeds), dtype=dtype)
    return task.start(normals.child("start")), task.teacher(normals.child("teacher")), normals


# By brute force, one replicate at a time


def enumerated(theta, k, law):
    """The law of subsets: probability by mask."""
    n, table = len(theta), {}
    if law == "plackett_luce":
        for order in itertools.permutations(range(n), k):
            p, left = 1.0, np.exp(theta).sum()
            for i in order:
                p, left = p * np.exp(theta[i]) / left, left - np.exp(theta[i])
            table[tuple(sorted(order))] = table.get(tuple(sorted(order)), 0) + p
    else:
        for subset in itertools.combinations(range(n), k):
            table[subset] = np.exp(theta[list(subset)].sum())
    total = sum(table.values())
    return {tuple(int(i in subset) for i in range(n)): p / total for subset, p in table.items()}


def mean_and_least(theta, b, k, law, power):
    losses = {z: (np.abs(np.array(z) - b) ** power).sum() for z in enumerated(theta, k, law)}
    mean = sum(p * losses[z] for z, p in enumerated(theta, k, law).items())
    return mean, min(losses.values())


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (6, 2), (6, 4), (5, 5)])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("law", LAWS)
def test_the_exact_mean_is_that_over_all_subsets(law, power, n, k):
    task = SubsetToy(n, k, law=law, power=power)
    W, teacher, normals = at(task)
    test = task.sample(teacher, normals, 3, clean=True)
    columns = evaluate(Hard(), task, W, test, normals)
    for r in range(2):
        mean, least = mean_and_least(W[r, :, 0].numpy(), teacher["b"][r].numpy(), k, law, power)
        assert columns["hard_loss"][r].item() == pytest.approx(mean, rel=1e-12)
        assert columns["gap"][r].item() == pytest.approx(mean - least, rel=1e-9, abs=1e-12)


def test_the_two_laws_of_four_weights():
    W = torch.tensor([1.0, 2.0, 3.0, 4.0]).double().log()[None, :, None]
    poisson, luce = (SubsetToy(4, 2, law=law).probabilities(W)[0] for law in LAWS)
    torch.testing.assert_close(poisson * 35, torch.tensor([2.0, 3, 4, 6, 8, 12]).double())
    published = torch.tensor([0.0472, 0.0762, 0.1111, 0.1607, 0.2333, 0.3714]).double()
    torch.testing.assert_close(luce, published, atol=5e-5, rtol=0)


def test_the_exact_mean_of_a_polynomial_is_that_over_all_samples():
    task = Polynomial(d=4, power=1.5, c=0.3)
    W, teacher, _ = at(task)
    p = torch.softmax(100 * W, dim=1)[:, 0].numpy()
    for r in range(2):
        mean = 0.0
        for z in itertools.product((0, 1), repeat=4):
            chance = np.prod([p[r, j] if z[j] else 1 - p[r, j] for j in range(4)])
            mean += chance * np.mean([abs(each - 0.3) ** 1.5 for each in z])
        assert task.population_loss(100 * W, task.population(teacher))[r].item() == pytest.approx(
            mean, rel=1e-12
        )


TOYS = [SubsetToy(6, 2, law=law, power=power) for law in LAWS for power in (1.5, 2.0)] + [Polynomial(d=4)]


@pytest.mark.parametrize("task", TOYS)
def test_the_truth_is_the_derivative_of_the_exact_mean(task):
    W, teacher, normals = at(task)
    truth = true_gradient(task, W, teacher, normals)
    assert truth.error.max() == 0
    h = 1e-5
    for i, j in itertools.product(range(W.shape[1]), range(W.shape[2])):
        step = torch.zeros_like(W)
        step[:, i, j] = h
        slope = (
            task.population_loss(W + step, task.population(teacher))
            - task.population_loss(W - step, task.population(teacher))
        ) / (2 * h)
        torch.testing.assert_close(truth.mean[:, i, j], slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("task", TOYS)
def test_the_oracle_follows_the_truth_exactly(task):
    assert isinstance(task, KnownExpectation)
    W, teacher, normals = at(task)
    columns = measure(
        Oracle(), task, W, teacher, normals, Sampling(3, 2), truth=true_gradient(task, W, teacher, normals)
    )
    assert columns["rel_mse"].abs().max() < 1e-20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("task", TOYS)
def test_the_dtype_is_that_of_W(task, dtype):
    W, teacher, normals = at(task, dtype=dtype)
    assert task.population_loss(W, task.population(teacher)).dtype == dtype
    batch = task.sample(teacher, normals, 2)
    assert hard_loss(task, W, batch).dtype == surrogate(Simple(), task, W, batch, normals).dtype == dtype


def test_the_exact_mean_survives_large_scores():
    for law in LAWS:
        task = SubsetToy(6, 3, law=law)
        W, teacher, normals = at(task, dtype=torch.float32)
        for size in (1e4, 1e-4):
            loss = task.population_loss(size * W, task.population(teacher))
            grad = true_gradient(task, size * W, teacher, normals).mean
            assert loss.isfinite().all()
            assert grad.isfinite().all()


# The joint loss of polynomial


def test_a_row_has_its_own_slope_and_the_loss_of_its_sample():
    task = Polynomial(d=3, power=3.0, c=0.3)
    W, teacher, normals = at(task)
    batch = task.sample(teacher, normals, 5)
    scores = task.scores(W, batch)
    assert batch.x.shape == (2, 15, 3)
    torch.testing.assert_close(scores, batch.x @ W.mT)
    part = torch.rand(7, 2, 15, 2, dtype=torch.float64, requires_grad=True)
    loss = task.loss(part, scores, batch)
    together = (part[..., 0] - 0.3).abs().pow(3).reshape(7, 2, 5, 3).sum(-1)
    torch.testing.assert_close(loss.reshape(7, 2, 5, 3), together.unsqueeze(-1).expand(7, 2, 5, 3))
    (slope,) = torch.autograd.grad(loss.sum(), part)
    own = 3 * (part[..., 0] - 0.3).abs().square() * (part[..., 0] - 0.3).sign()
    torch.testing.assert_close(slope, torch.stack([own, torch.zeros_like(own)], -1).detach())


def test_held_out_rows_come_in_whole_samples(monkeypatch):
    task = Polynomial(d=3)
    W, teacher, normals = at(task)
    test = task.sample(teacher, normals, 20, clean=True)
    assert test.x.shape[1] == 21
    assert [piece.x.shape[1] for piece in test.pieces(8)] == [9, 9, 3]
    whole = evaluate(Hard(), task, W, test, normals)
    monkeypatch.setattr("topkbench.evaluate.AT_ONCE", 7)
    pieces = evaluate(Hard(), task, W, test, normals)
    for column, value in whole.items():
        torch.testing.assert_close(pieces[column], value)


# Estimators: the bias in its own standard errors


def statistics(method, task, samples=20_000, seeds=(0, 1)):
    W, teacher, normals = at(task, seeds)
    if isinstance(task, Polynomial):
        W = 100 * W  # as far apart as after training
    truth = true_gradient(task, W, teacher, normals)
    return measure(method, task, W, teacher, normals, Sampling(1, samples), truth=truth)


def bias_z(method, task):
    columns = statistics(method, task)
    return (columns["rel_bias2"] / columns["rel_bias2_se"]).tolist()


LOO = ScoreFunction(samples=4, baseline="leave_one_out")
LUCE = ScoreFunction(law="plackett_luce", samples=4, baseline="leave_one_out")


@pytest.mark.parametrize("method", [ReinMaxK(), ScoreFunction(), LOO, TaylorControl()])
@pytest.mark.parametrize("task", [SubsetToy(6, 2), Polynomial(d=4)])
def test_what_is_unbiased_on_a_quadratic_toy(method, task):
    assert max(map(abs, bias_z(method, task))) < 4


@pytest.mark.parametrize("task", [SubsetToy(6, 2), Polynomial(d=4)])
def test_what_is_biased_on_a_quadratic_toy(task):
    assert min(bias_z(Simple(), task)) > 5


def test_reinmax_is_biased_beyond_a_quadratic():
    """As strongly as it is unbiased above: the test there can fail."""
    task = SubsetToy(6, 2, power=5.0)
    assert min(bias_z(ReinMaxK(), task)) > 5
    assert max(map(abs, bias_z(LOO, task))) < 4


def test_each_law_has_its_own_score_function():
    luce, poisson = SubsetToy(6, 2, law="plackett_luce"), SubsetToy(6, 2)
    assert max(map(abs, bias_z(LUCE, luce))) < 4
    assert min(bias_z(LUCE, poisson)) > 5
    assert min(bias_z(LOO, luce)) > 5


def test_following_the_exact_gradient_closes_the_gap():
    for task, lr in ((SubsetToy(6, 2), 1.0), (Polynomial(d=4), 50.0)):
        result = train(Oracle(), task, SGD(lr), range(3), Training(300, 1), Logging(4, 0, 1))
        gaps = torch.stack([columns["gap"] for *_, columns in result.points])
        assert (gaps.diff(dim=0) < 0).all()
        assert (gaps[-1] < 0.05 * gaps[0]).all()


# Published numbers


@pytest.mark.parametrize("name", ["STE, exact draw", "I-MLE", "SoftSub", "SIMPLE-F", "SIMPLE-B", "SIMPLE"])
def test_bias_variance_and_error_of_the_published_toy(script, name):
    """Within 5 standard errors and the rounding of what is printed; fewer draws than the script's."""
    toy, seeds = script.numbers.SIMPLE[name], script.numbers.SEEDS
    theta, b = (torch.from_numpy(np.array(each)) for each in zip(*map(script.planted, seeds), strict=True))
    task, W, teacher, normals = SubsetToy(10, 5), theta.unsqueeze(-1), {"b": b}, Normals(seeds)
    normals.dtype = torch.float64
    truth = true_gradient(task, W, teacher, normals).mean.squeeze(-1)
    grads = script.drawn(toy.method, task, W, teacher, normals, 2000)
    whole = script.by_cosine(grads, truth)
    blocks = grads.unflatten(0, (10, 200))
    without = [script.by_cosine(torch.cat([*blocks[:i], *blocks[i + 1 :]]), truth) for i in range(10)]
    for (column, value), theirs in zip(whole.items(), toy.again, strict=False):
        error = np.std([each[column] for each in without]) * math.sqrt(9)
        rounding = 0.5 * 10 ** -len(f"{theirs:g}".split(".")[1])
        assert abs(value - theirs) < 5 * error * math.sqrt(1 + 1 / 5) + rounding, column
        assert error < 0.05 * theirs, column  # else anything would do


def test_the_gap_the_published_convergence_starts_from(script):
    task = script.Given(10, 5)
    W, teacher, normals = at(task)
    gap = task.metrics(W, task.sample(teacher, normals, 1))["gap"]
    assert gap.tolist() == pytest.approx([4.1142] * 2, abs=1e-4)
    least = task.population_loss(W, task.population(teacher)) - gap
    assert least.tolist() == pytest.approx([1.12515] * 2, abs=1e-5)


def test_one_of_eight_has_the_truth_it_is_compared_with(script):
    """And a factor of published code scales what it scales: bias is measured against that truth."""
    task, normals = script.Quadratic(), Normals([0], dtype=torch.float64)
    W, teacher = task.fixture()
    unbiased = script.by_size(ReinMaxK(), task, W, teacher, normals, 20_000)
    twice = script.by_size(script.Times(ReinMaxK(), 2.0), task, W, teacher, normals, 20_000)
    assert abs(unbiased["bias_z"]) < 4
    assert twice["rel_bias"] == pytest.approx(1, abs=0.1)


# What is refused

SUBSET, BINARY = SubsetToy(6, 2), Polynomial()


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (SUBSET, {"n": 0}, "n must be >= 1, got 0"),
        (SUBSET, {"k": 0}, r"k must be in \[1, n\] = \[1, 6\], got 0"),
        (SUBSET, {"k": 7}, r"k must be in \[1, n\] = \[1, 6\], got 7"),
        (SUBSET, {"d": 5}, r"d must be 1 \(x is the number 1\), got 5"),
        (SUBSET, {"law": "poisson"}, "law must be one of conditional_poisson, plackett_luce, got 'poisson'"),
        (SUBSET, {"power": 0.5}, r"power must be >= 1 and finite, got 0\.5"),
        (SUBSET, {"power": math.nan}, "power must be >= 1 and finite, got nan"),
        (SUBSET, {"n": 30, "k": 15}, r"C\(30, 15\) = 155117520 subsets; the limit is 200000"),
        (SUBSET, {"n": 18, "k": 12, "law": "plackett_luce"}, r"\+ C\(18, 12\) = 249527 subsets; the limit"),
        (BINARY, {"n": 6}, r"n must be 2 and k 1 \(latents are binary\), got n = 6, k = 1"),
        (BINARY, {"k": 2}, r"n must be 2 and k 1 \(latents are binary\), got n = 2, k = 2"),
        (BINARY, {"d": 0}, "d must be >= 1, got 0"),
        (BINARY, {"power": 0.9}, r"power must be >= 1 and finite, got 0\.9"),
        (BINARY, {"c": 1.5}, r"c must be in \[0, 1\], got 1\.5"),
    ],
)
def test_bad_arguments_are_refused(task, change, message):
    # Where signatures are checked as well (jaxtyping), an unknown name is refused by that text.
    with pytest.raises((ValueError, TypeError), match=f"{message}|typechecking parameter 'law'"):
        dataclasses.replace(task, **change)
