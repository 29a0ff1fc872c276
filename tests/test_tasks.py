import dataclasses
import itertools

import pytest
import torch
from conftest import TASKS, built

from topkbench.evaluate import evaluate, hard_loss
from topkbench.methods import Hard
from topkbench.randomness import Normals
from topkbench.tasks import Gate, Mask, Values
from topkbench.tasks.planted import recall


def planted(name, seeds=(0, 1, 2), rows=200, **changes):
    task = built("task", name, **changes)
    normals = Normals(list(seeds), dtype=torch.float64)
    teacher = task.teacher(normals.child("teacher"))
    return task, teacher, task.sample(teacher, normals.child("x"), rows, clean=True), normals


@pytest.mark.parametrize("name", TASKS)
def test_the_planted_solution_is_perfect(name):
    task, teacher, batch, normals = planted(name)
    columns = evaluate(Hard(), task, teacher["W"], batch, normals)
    for column, perfect in (("hard_loss", 0), ("relaxed_loss", 0), ("recall", 1), ("distance", 0)):
        torch.testing.assert_close(columns[column], torch.full((3,), float(perfect), dtype=torch.float64))


@pytest.mark.parametrize("name", TASKS)
def test_another_solution_is_not(name):
    task, _, batch, normals = planted(name)
    columns = evaluate(Hard(), task, task.start(normals.child("start")), batch, normals)
    assert (columns["hard_loss"] > 0.1).all()
    assert (columns["distance"] > 0.1).all()
    assert (columns["recall"] < 0.95).all()


def test_values_does_not_tell_rows_apart():
    task, teacher, batch, _ = planted("values")
    shuffled = teacher["W"][:, torch.randperm(task.n)]
    assert hard_loss(task, shuffled, batch).max() < 1e-30
    matched = task.match(shuffled, teacher)
    assert torch.equal(matched, teacher["W"])
    assert recall(task.k, matched, batch).min() == 1


def test_rows_are_matched_as_well_as_any_order_can():
    task, teacher, _, normals = planted("values", n=5)
    W = normals.child("other")("W", 5, task.d)
    best = torch.stack(
        [task.distance(W[:, list(order)], teacher) for order in itertools.permutations(range(5))]
    ).amin(0)
    torch.testing.assert_close(task.distance(task.match(W, teacher), teacher), best)


def test_gate_does_not_tell_scale_and_common_shift_apart():
    task, teacher, batch, normals = planted("gate")
    other = 3.7 * teacher["W"] + normals.child("shift")("row", 1, task.d)
    assert hard_loss(task, other, batch).max() == 0
    torch.testing.assert_close(task.distance(other, teacher), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(task.distance(-other, teacher), torch.ones(3, dtype=torch.float64))


def test_mask_tells_all_of_them_apart():
    task, teacher, batch, _ = planted("mask")
    assert hard_loss(task, 1.1 * teacher["W"], batch).min() > 0
    torch.testing.assert_close(task.distance(1.1 * teacher["W"], teacher), torch.full((3,), 0.1).double())


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_is_what_the_docstring_says(name):
    task, teacher, batch, normals = planted(name, rows=4)
    W = task.start(normals.child("start"))
    for r, b in itertools.product(range(3), range(4)):
        x = batch.x[r, b]
        vectors = []
        for matrix in (W[r], teacher["W"][r]):
            q = matrix @ x
            top = q.argsort(descending=True)[: task.k]
            kept = torch.zeros(task.n, dtype=torch.float64).index_fill(0, top, 1.0)
            by_task = {
                Values: q[top] * torch.linspace(1, 0.5, task.k, dtype=torch.float64),
                Mask: kept * q,
                Gate: kept * teacher["c"][r] if "c" in teacher else None,
            }
            vectors.append(by_task[type(task)])
        expected = (vectors[0] - vectors[1]).square().sum() / 2
        torch.testing.assert_close(hard_loss(task, W, batch)[r, b], expected)


@pytest.mark.parametrize("name", TASKS)
def test_noise_is_on_training_targets_only(name):
    task, teacher, clean, normals = planted(name, noise=0.3, rows=2000)
    noisy = task.sample(teacher, normals.child("x"), 2000)
    assert torch.equal(noisy.x, clean.x)
    difference = noisy.target - clean.target
    count = difference.numel()
    assert abs(difference.std().item() - 0.3) < 4 * 0.3 / (2 * count) ** 0.5
    assert abs(difference.mean().item()) < 4 * 0.3 / count**0.5


def test_evaluation_in_pieces_is_evaluation_in_one(monkeypatch):
    task, _, batch, normals = planted("mask")
    W = task.start(normals.child("start"))
    whole = evaluate(Hard(), task, W, batch, normals)
    monkeypatch.setattr("topkbench.evaluate.AT_ONCE", 7)
    pieces = evaluate(Hard(), task, W, batch, normals)
    for column, value in whole.items():
        torch.testing.assert_close(pieces[column], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, r"n must be >= 1, got 0"),
        ({"d": 0}, r"d must be >= 1, got 0"),
        ({"k": 0}, r"k must be in \[1, n\] = \[1, 6\], got 0"),
        ({"k": 7}, r"k must be in \[1, n\] = \[1, 6\], got 7"),
        ({"noise": -0.1}, r"noise must be >= 0 and finite, got -0\.1"),
        ({"noise": float("nan")}, r"noise must be >= 0 and finite, got nan"),
    ],
)
@pytest.mark.parametrize("name", TASKS)
def test_sizes_that_cannot_be_are_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(built("task", name), **change)
