import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import built
from sklearn.datasets import load_digits

from topkbench.gradients import true_gradient
from topkbench.methods import Hard, Relaxed
from topkbench.operators import hard_mask
from topkbench.operators.subset import log_normalizer, log_probability, marginals
from topkbench.optimizers import Adam
from topkbench.randomness import Normals
from topkbench.step import gradients
from topkbench.tasks._digits_binary import black_and_white, halves
from topkbench.train import Logging, Training, train


def case(rows=20, clean=False, seeds=(0, 1, 2), dtype=torch.float64, **changes):
    task = built("task", "subset_vae", **changes)
    normals = Normals(list(seeds), dtype=dtype)
    teacher = task.teacher(normals.child("teacher"))
    batch = task.sample(teacher, normals.child("x"), rows, clean=clean)
    W = 4 * task.start(normals.child("start"))
    others = task.others(teacher, normals.child("others"), W)
    others["V"] = 4 * others["V"]  # a code that matters
    return task, dataclasses.replace(batch, learned=others), W, normals


def numpy_bound(n, k, W, V, c, x):
    """-E log p(x | z), KL, -log p(x): one row, a subset at a time."""
    subsets = [list(subset) for subset in itertools.combinations(range(n), k)]
    theta = W @ np.append(x, 1.0)
    weights = np.array([math.exp(theta[subset].sum()) for subset in subsets])
    q = weights / weights.sum()
    likelihood = []
    for subset in subsets:
        p = 1 / (1 + np.exp(-(V[subset].sum(0) + c)))
        likelihood.append(np.prod(np.where(x > 0, p, 1 - p)))
    prior = 1 / len(subsets)
    return (
        -(q * np.log(likelihood)).sum(),
        (q * np.log(q / prior)).sum(),
        -math.log(prior * sum(likelihood)),
    )


def test_the_bound_is_that_of_the_definition():
    task, batch, W, _ = case(rows=3, n=6, k=2)
    V, c = batch.learned["V"], batch.learned["c"]
    bounds = task.population_loss(W, batch)
    columns = task.metrics(W, batch)
    for r in range(3):
        rows = [
            numpy_bound(6, 2, *(part[r].numpy() for part in (W, V, c)), batch.target[r, b].numpy())
            for b in range(3)
        ]
        error, kl, nll = np.mean(rows, axis=0)
        assert bounds[r].item() == pytest.approx(error + kl, rel=1e-12)
        assert columns["kl"][r].item() == pytest.approx(kl, rel=1e-12)
        assert columns["nll"][r].item() == pytest.approx(nll, rel=1e-12)
        assert columns["gap"][r].item() == pytest.approx(error + kl - nll, rel=1e-9)


def test_the_mean_of_the_loss_over_the_law_is_the_bound_and_so_is_its_gradient():
    """The law and the KL as the operators have them: by recursion, not by enumeration."""
    task, batch, W, _ = case(n=7, k=3)
    W.requires_grad_()
    scores = task.scores(W, batch)
    every = torch.tensor([[i in s for i in range(7)] for s in itertools.combinations(range(7), 3)]).double()
    masks = every[:, None, None].expand(-1, *scores.shape)
    chances = log_probability(scores, masks, 3).exp()
    torch.testing.assert_close(chances, task.log_q(scores).exp().movedim(-1, 0))
    mean = (chances * task.loss(masks, scores, batch)).sum(0).mean(-1)
    exact = task.population_loss(W, batch)
    torch.testing.assert_close(mean, exact, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(each.sum(), W, retain_graph=True)[0] for each in (exact, mean))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    kl = (scores * marginals(scores, 3)).sum(-1) - log_normalizer(scores, 3) + math.log(35)
    torch.testing.assert_close(kl.mean(-1), task.metrics(W.detach(), batch)["kl"])


def test_the_bound_is_differentiable_in_all_that_is_learned():
    task, batch, W, _ = case(rows=2, seeds=(0,), n=4, k=2)
    names = list(batch.learned)

    def bound(W, *others):
        learned = dict(zip(names, others, strict=True))
        return task.population_loss(W, dataclasses.replace(batch, learned=learned))

    inputs = [each.clone().requires_grad_() for each in (W, *batch.learned.values())]
    assert torch.autograd.gradcheck(bound, inputs, fast_mode=True)


def test_the_posterior_of_a_decoder_that_shares_no_pixel_is_perfect():
    """Then -log p(x | z) is linear in z, and so the posterior is one that the encoder has."""
    task, batch, W, _ = case(540, clean=True)
    c = batch.learned["c"]
    owner = torch.arange(64) % task.n
    V = batch.learned["V"] * (owner == torch.arange(task.n)[:, None])
    shift = torch.nn.functional.softplus(V + c[:, None]) - torch.nn.functional.softplus(c)[:, None]
    planted = torch.cat([V, -shift.sum(-1, keepdim=True)], -1)
    batch = dataclasses.replace(batch, learned={"V": V, "c": c})
    columns = task.metrics(planted, batch)
    torch.testing.assert_close(columns["gap"], torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(task.population_loss(planted, batch), columns["nll"])
    assert (task.metrics(W, batch)["gap"] > 0.1).all()


def test_no_code_is_the_baseline():
    task, batch, W, _ = case(540, clean=True)
    batch = dataclasses.replace(batch, learned={**batch.learned, "V": 0 * batch.learned["V"]})
    columns = task.metrics(0 * W, batch)
    torch.testing.assert_close(columns["nll"], columns["baseline_nll"])
    torch.testing.assert_close(columns["reconstruction"], columns["baseline_nll"])
    for name in ("gap", "kl"):
        torch.testing.assert_close(columns[name], torch.zeros(3).double(), rtol=0, atol=1e-9)


def test_the_hard_gradient_in_w_is_that_of_the_kl_alone():
    task, batch, W, normals = case()
    _, grads = gradients(Hard(), task, {"W": W, **batch.learned}, batch, normals)
    W = W.requires_grad_()
    kl = task._kl(task.log_q(task.scores(W, batch))).mean(-1)
    torch.testing.assert_close(grads["W"], torch.autograd.grad(kl.sum(), W)[0])
    assert all((grads[name] != 0).any() for name in ("V", "c"))


def test_reconstruction_is_that_of_the_hard_subset():
    task, batch, W, _ = case()
    mask = hard_mask(task.scores(W, batch), task.k)
    logits = mask @ batch.learned["V"] + batch.learned["c"].unsqueeze(1)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.target, reduction="none")
    torch.testing.assert_close(task.metrics(W, batch)["reconstruction"], expected.sum(-1).mean(-1))


def test_samples_in_front():
    task, batch, W, _ = case()
    scores = task.scores(W, batch)
    masks = torch.rand(4, 2, *scores.shape, dtype=torch.float64)
    losses = task.loss(masks, scores, batch)
    assert losses.shape == (4, 2, 3, 20)
    torch.testing.assert_close(losses[3, 1], task.loss(masks[3, 1], scores, batch))


def test_rows_are_split_without_leakage():
    task, batch, _, _ = case(3000)
    train_rows, held_out = (black_and_white(half) for half in halves(torch.float64, torch.device("cpu")))
    whole = black_and_white(torch.as_tensor(load_digits().data) / 16)
    assert torch.equal(whole.sum(0), train_rows.sum(0) + held_out.sum(0))
    assert {*batch.target.unique().tolist()} == {0, 1}
    assert (batch.x[..., -1] == 1).all()
    assert torch.equal(batch.x[..., :-1], batch.target)
    known = {tuple(row) for row in train_rows.int().tolist()}
    assert {tuple(row) for row in batch.target.flatten(0, 1).int().tolist()} <= known
    test = case(3000, clean=True)[1]
    assert torch.equal(test.target[1], held_out)
    population = task.population(batch.teacher)
    assert torch.equal(population.target[2], train_rows)
    share = (train_rows.sum(0) + 1) / (1257 + 2)
    torch.testing.assert_close(batch.teacher["mean"][0], share)


def test_the_mean_over_the_population_is_that_of_its_mini_batches():
    task, batch, W, _ = case(20_000, seeds=(0,))
    exact = task.population_loss(
        W, dataclasses.replace(task.population(batch.teacher), learned=batch.learned)
    )
    spread = torch.stack([task.population_loss(W, piece) for piece in batch.pieces(500)])
    error = spread.std(0) / len(spread) ** 0.5
    assert (spread.mean(0) - exact).abs() < 4 * error


def test_the_truth_is_the_gradient_over_the_population():
    task, batch, W, normals = case()
    truth = true_gradient(task, W, batch.teacher, normals, learned=batch.learned)
    leaf = W.clone().requires_grad_()
    rows = dataclasses.replace(task.population(batch.teacher), learned=batch.learned)
    (expected,) = torch.autograd.grad(task.population_loss(leaf, rows).sum(), leaf)
    torch.testing.assert_close(truth.mean, expected)
    assert (truth.error == 0).all()


@pytest.mark.parametrize("method", ["oracle", "score_function_loo", "simple"])
def test_a_code_is_learned(method):
    task = built("task", "subset_vae")
    settings = Training(200, 64), Logging(2, 0, 540)
    result = train(built("method", method), task, Adam(0.02), range(3), *settings)
    before, after = (columns for _, _, columns in (result.points[0], result.points[-1]))
    for name in ("nll", "hard_loss"):
        assert (after[name] < before[name] - 1).all()
    assert (after["nll"] < after["baseline_nll"] - 1).all()
    assert (after["gap"] >= 0).all()


def test_relaxed_is_the_relaxation_in_the_decoder():
    task, batch, W, normals = case()
    loss, _ = gradients(Relaxed(marginals), task, {"W": W, **batch.learned}, batch, normals)
    scores = task.scores(W, batch)
    torch.testing.assert_close(loss, task.loss(marginals(scores, task.k), scores, batch).mean(-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, r"n must be >= 1, got 0"),
        ({"k": 13}, r"k must be in \[1, n\] = \[1, 12\], got 13"),
        ({"d": 64}, r"d must be 65 \(64 pixels and a 1\), got 64"),
        ({"n": 30, "k": 10}, r"C\(30, 10\) = 30045015 subsets; the limit is 20000"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(built("task", "subset_vae"), **change)
