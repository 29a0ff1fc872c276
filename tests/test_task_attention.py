"""Associative recall by top-k attention: the memory that is drawn, the loss in NumPy, what can be learned."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import built

from topkbench.config import misfit
from topkbench.evaluate import evaluate, hard_loss
from topkbench.methods import Hard, Oracle
from topkbench.operators import hard_mask
from topkbench.optimizers import Adam
from topkbench.randomness import Normals
from topkbench.step import gradient, surrogate
from topkbench.tasks import Attention
from topkbench.train import Logging, Training, train

WEIGHTS = ("uniform", "softmax")


def planted(rows=200, seeds=(0, 1, 2), **changes):
    task = built("task", "attention", **changes)
    normals = Normals(list(seeds), dtype=torch.float64)
    teacher = task.teacher(normals.child("teacher"))
    return task, teacher, task.sample(teacher, normals.child("x"), rows, clean=True), normals


def test_the_teacher_is_orthogonal():
    task, teacher, _, _ = planted()
    gram = teacher["W"].mT @ teacher["W"]
    torch.testing.assert_close(gram, torch.eye(task.d, dtype=torch.float64).expand_as(gram))


def test_a_row_is_what_the_docstring_says():
    task, teacher, batch, _ = planted(rows=3000)
    row = task.row(batch.x)
    assert (row.cue.shape, row.keys.shape, row.values.shape) == (
        (3, 3000, task.d), (3, 3000, task.n, task.d), (3, 3000, task.n, task.m),
    )  # fmt: skip
    a = torch.nn.functional.normalize(row.cue @ teacher["W"], dim=-1)
    along = (row.keys * a.unsqueeze(-2)).sum(-1)
    right = (along > task.strength / 2).double()
    assert (right.sum(-1) == task.k).all()
    torch.testing.assert_close(along, task.strength * right)
    torch.testing.assert_close(batch.target, (right.unsqueeze(-1) * row.values).sum(-2) / task.k)
    across = row.keys - along.unsqueeze(-1) * a.unsqueeze(-2)  # d - 1 standard normals
    assert abs(across.square().sum(-1).mean().item() / (task.d - 1) - 1) < 0.02
    share = right.mean((0, 1))  # every slot is as likely to be right
    assert (share - task.k / task.n).abs().max() < 4 * (share[0] * (1 - share[0]) / 9000) ** 0.5


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_loss_in_plain_numpy(weights):
    task, _, batch, normals = planted(rows=4, weights=weights)
    W = task.start(normals.child("start"))
    found = hard_loss(task, W, batch)
    for r in range(3):
        for b in range(4):
            x = batch.x[r, b].numpy()
            cue, keys, values = np.split(x, [task.d, task.d + task.n * task.d])
            keys, values = keys.reshape(task.n, task.d), values.reshape(task.n, task.m)
            q = keys @ (W[r].numpy().T @ cue) / task.d**0.5
            kept = np.argsort(-q)[: task.k]
            share = (
                np.exp(q[kept]) / np.exp(q[kept]).sum()
                if weights == "softmax"
                else np.full(task.k, 1 / task.k)
            )
            error = share @ values[kept] - batch.target[r, b].numpy()
            assert found[r, b].item() == pytest.approx((error**2).sum() / 2, rel=1e-10)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_samples_in_front_are_samples_one_by_one(weights):
    task, _, batch, normals = planted(rows=5, weights=weights)
    scores = task.scores(task.start(normals.child("start")), batch)
    masks = normals("masks", 4, 5, 6, law="uniform").movedim(1, 0)
    together = task.loss(masks, scores, batch)
    assert together.shape == (4, 3, 5)
    for mask, loss in zip(masks, together, strict=True):
        torch.testing.assert_close(task.loss(mask, scores, batch), loss)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("sizes", [{}, {"n": 64, "d": 32, "k": 8}, {"n": 5, "d": 2, "k": 5}])
def test_the_planted_association_is_perfect_at_any_scale(weights, sizes):
    task, teacher, batch, normals = planted(rows=300, weights=weights, **sizes)
    for factor in (0.01, 1.0, 50.0):
        columns = evaluate(Hard(), task, factor * teacher["W"], batch, normals)
        for column, perfect in (("hard_loss", 0.0), ("recall", 1.0), ("accuracy", 1.0)):
            torch.testing.assert_close(columns[column], torch.full((3,), perfect, dtype=torch.float64))


def test_another_association_is_near_chance():
    task, _, batch, normals = planted(rows=4000, n=12, d=16, k=3)
    columns = evaluate(Hard(), task, task.start(normals.child("start")), batch, normals)
    assert ((columns["recall"] - task.k / task.n).abs() < 0.15).all()
    assert (columns["accuracy"] < 0.1).all()
    assert (columns["hard_loss"] > 0.5).all()


def test_the_hard_gradient_is_zero_with_uniform_weights_alone():
    for weights, zero in (("uniform", True), ("softmax", False)):
        task, _, batch, normals = planted(weights=weights)
        grad = gradient(Hard(), task, task.start(normals.child("start")), batch, normals)[1]
        assert (grad == 0).all() == zero, weights


def test_scaled_softmax_with_uniform_weights_is_dense_attention():
    task, _, batch, normals = planted(rows=20)
    W = task.start(normals.child("start"))
    method = dataclasses.replace(built("method", "scaled_softmax"), temperature=0.7)
    row = task.row(batch.x)
    logits = torch.einsum("rbd,rde,rbne->rbn", row.cue, W, row.keys) / (0.7 * task.d**0.5)
    recalled = torch.einsum("rbn,rbnm->rbm", logits.softmax(-1), row.values)
    expected = (recalled - batch.target).square().sum(-1) / 2
    torch.testing.assert_close(surrogate(method, task, W, batch, normals), expected)


def test_there_is_no_true_gradient():
    assert "needs a task whose true gradient is known" in str(misfit(Oracle(), built("task", "attention")))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_relaxation_learns_and_the_hard_gradient_does_not(weights):
    task = built("task", "attention", n=12, d=6, k=3, weights=weights)
    relaxed = dataclasses.replace(built("method", "entropic"), temperature=0.3)
    settings = Training(150, 32), Logging(2, 0, 500)
    points = train(relaxed, task, Adam(0.01), range(3), *settings).points
    first, last = (points[i][2] for i in (0, -1))
    assert (last["hard_loss"] < first["hard_loss"] / 4).all()
    assert (last["recall"] > first["recall"] + 0.3).all()
    stuck = train(Hard(), task, Adam(0.01), range(3), Training(20, 32), Logging(2, 0, 500)).points
    unmoved = torch.equal(stuck[0][2]["hard_loss"], stuck[-1][2]["hard_loss"])
    assert unmoved == (weights == "uniform")


def test_held_out_rows_are_not_training_rows():
    task, teacher, _, normals = planted()
    batches = (task.sample(teacher, normals.child(name), 50) for name in ("train", "test"))
    seen, held_out = (batch.x.flatten(0, 1) for batch in batches)
    assert torch.cdist(seen, held_out).min() > 1e-3


def test_evaluation_in_pieces_is_evaluation_in_one():
    task, _, batch, normals = planted(rows=150)  # more than one piece
    W = task.start(normals.child("start"))
    ours, right = (hard_mask(task.scores(each, batch), task.k) for each in (W, batch.teacher["W"]))
    found = (ours * right).sum(-1)
    metrics = task.metrics(W, batch)
    torch.testing.assert_close(metrics["recall"], found.mean(-1) / task.k)
    torch.testing.assert_close(metrics["accuracy"], (found == task.k).double().mean(-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, r"n must be >= 1, got 0"),
        ({"d": 1}, r"d must be >= 2, got 1"),
        ({"m": 0}, r"m must be >= 1, got 0"),
        ({"k": 7}, r"k must be in \[1, n\] = \[1, 6\], got 7"),
        ({"strength": 0.0}, r"strength must be > 0 and finite, got 0\.0"),
        ({"strength": float("inf")}, r"strength must be > 0 and finite, got inf"),
        ({"weights": "hard"}, r"weights must be one of uniform, softmax, got hard"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    # Where signatures are checked as well (jaxtyping), an unknown word is refused by that text.
    with pytest.raises((ValueError, TypeError), match=f"{message}|typechecking parameter"):
        Attention(**{"n": 6, "d": 5, "k": 2, **change})
