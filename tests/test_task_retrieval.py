import dataclasses

import numpy as np
import pytest
import torch
from conftest import built
from sklearn.datasets import load_digits
from sklearn.metrics import ndcg_score

from topkbench.choices import ConfigError
from topkbench.evaluate import evaluate, hard_loss
from topkbench.methods import Hard
from topkbench.operators import hard_mask
from topkbench.optimizers import Adam
from topkbench.randomness import Normals
from topkbench.step import gradient
from topkbench.tasks._digits_binary import halves
from topkbench.tasks.retrieval import ndcg, recall
from topkbench.train import Logging, Training, train

SIZES = {"n": 40, "d": 6, "k": 5, "embedding": 3}
DIGITS = {"data": "digits", "d": 64}
QUIET = Logging(2, 0, 540)
DOUBLE, CPU = torch.float64, torch.device("cpu")


def case(rows=30, clean=False, **changes):
    task = built("task", "retrieval", **{**SIZES, **changes})
    normals = Normals([0, 1, 2], dtype=torch.float64)
    teacher = task.teacher(normals.child("teacher"))
    batch = task.sample(teacher, normals.child("x"), rows, clean=clean)
    return task, batch, task.start(normals.child("start")), normals


@pytest.mark.parametrize("relevant", [None, 3, 9])
def test_the_loss_is_one_less_recall(relevant):
    task, batch, W, _ = case(relevant=relevant)
    losses = hard_loss(task, W, batch)
    for r in range(3):
        c, planted = batch.teacher["candidates"][r].numpy(), batch.teacher["W"][r].numpy()
        for b, x in enumerate(batch.x[r].numpy()):
            best = {
                side: set(np.argsort(-(c @ matrix.T @ (matrix @ x)))[:count].tolist())
                for side, matrix, count in (("ours", W[r].numpy(), 5), ("theirs", planted, relevant or 5))
            }
            expected = 1 - len(best["ours"] & best["theirs"]) / min(5, relevant or 5)
            assert losses[r, b].item() == pytest.approx(expected, abs=1e-12)


def test_the_planted_solution_is_perfect_at_any_scale_and_rotation():
    task, batch, W, normals = case(200, clean=True)
    rotation = torch.linalg.qr(normals("rotation", 3, 3)).Q
    for perfect in (batch.teacher["W"], 0.3 * rotation @ batch.teacher["W"]):
        columns = evaluate(Hard(), task, perfect, batch, normals)
        for name, value in {"hard_loss": 0, "recall": 1, "ndcg": 1, "distance": 0}.items():
            torch.testing.assert_close(columns[name], torch.full((3,), float(value)).double())
    columns = evaluate(Hard(), task, W, batch, normals)
    torch.testing.assert_close(columns["recall"], 1 - columns["hard_loss"])
    assert (columns["recall"] < 0.7).all()
    assert (columns["distance"] > 0.2).all()


def test_more_relevant_than_are_brought_back_is_perfect_too():
    task, batch, _, normals = case(50, relevant=9)
    columns = evaluate(Hard(), task, batch.teacher["W"], batch, normals)
    for name, value in {"hard_loss": 0, "recall": 1, "ndcg": 1}.items():
        torch.testing.assert_close(columns[name], torch.full((3,), float(value)).double())


@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("relevant", [1, 4, 7])
def test_ndcg_is_scikit_learns(k, relevant):
    scores = torch.randn(20, 12, dtype=torch.float64)
    places = torch.rand(20, 12).topk(relevant).indices
    truth = torch.zeros(20, 12).scatter(1, places, 1.0)
    ours = ndcg(scores, places, k)
    for row in range(20):
        expected = ndcg_score(truth[row : row + 1].numpy(), scores[row : row + 1].numpy(), k=k)
        assert ours[row].item() == pytest.approx(expected, rel=1e-12)


def test_recall_is_the_share_of_the_relevant():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    places = torch.tensor([[0, 3, 4]])
    assert [recall(scores, places, k).item() for k in (1, 2, 4, 5)] == pytest.approx([1, 0.5, 2 / 3, 1])


def test_recall_raw_is_that_of_the_identity():
    task, batch, W, _ = case(200, clean=True)
    identity = torch.eye(6, dtype=torch.float64).expand(3, -1, -1)
    own = task.metrics(identity, batch)["recall"]
    torch.testing.assert_close(task.metrics(W, batch)["recall_raw"], own)


def test_the_hard_gradient_is_exactly_zero():
    task, batch, W, normals = case()
    loss, grad = gradient(Hard(), task, W, batch, normals)
    assert loss.min() > 0
    assert torch.equal(grad, torch.zeros_like(W))


def test_the_cross_entropy_is_torchs_and_does_not_look_at_the_mask():
    task, batch, W, normals = case(objective="cross_entropy", relevant=4)
    scores = task.scores(W, batch)
    truth = torch.zeros_like(scores).scatter(-1, batch.target.long(), 1 / 4)
    expected = torch.nn.functional.cross_entropy(scores.flatten(0, 1), truth.flatten(0, 1), reduction="none")
    masks = torch.rand(2, *scores.shape, dtype=torch.float64)
    losses = task.loss(masks, scores, batch)
    torch.testing.assert_close(losses, expected.reshape(3, 30).expand(2, 3, 30))
    assert (gradient(Hard(), task, W, batch, normals)[1] != 0).all()


def test_samples_in_front():
    task, batch, W, _ = case()
    scores = task.scores(W, batch)
    masks = torch.rand(4, 2, *scores.shape, dtype=torch.float64)
    losses = task.loss(masks, scores, batch)
    assert losses.shape == (4, 2, 3, 30)
    torch.testing.assert_close(losses[3, 1], task.loss(masks[3, 1], scores, batch))


def test_queries_are_fresh_and_candidates_are_not():
    task, batch, _, normals = case(300)
    again = task.sample(batch.teacher, normals.child("test"), 300, clean=True)
    assert torch.equal(again.given["candidates"], batch.given["candidates"])
    assert not (again.x.unsqueeze(2) == batch.x.unsqueeze(1)).all(-1).any()
    ranked = task.scores(batch.teacher["W"], again)
    chosen = torch.zeros_like(ranked).scatter(-1, again.target.long(), 1.0)
    assert torch.equal(chosen, hard_mask(ranked, task.k))


@pytest.mark.parametrize(("method", "objective"), [("entropic", "recall"), ("hard", "cross_entropy")])
def test_w_is_learned(method, objective):
    task = built("task", "retrieval", **{**SIZES, "n": 200}, objective=objective)
    settings = Training(150, 32), Logging(2, 0, 256)
    result = train(built("method", method), task, Adam(0.03), range(4), *settings)
    before, after = (columns for _, _, columns in (result.points[0], result.points[-1]))
    assert (after["recall"] > before["recall"] + 0.3).all()
    assert (after["recall"] > after["recall_raw"]).all()
    assert (after["distance"] < 0.5 * before["distance"]).all()


def classes(x):
    """The labels of digits, by their pixels: no two images of different classes are the same."""
    pixels, labels = load_digits(return_X_y=True)
    known = {tuple(row): label for row, label in zip(pixels.astype(int), labels, strict=True)}
    return [[known[tuple(row)] for row in rows] for rows in (16 * x).round().int().tolist()]


@pytest.mark.parametrize("clean", [False, True])
def test_relevant_digits_are_those_of_the_same_class(clean):
    _, batch, _, _ = case(50, clean, **DIGITS)
    for rows, gallery, places in zip(
        classes(batch.x), classes(batch.given["candidates"]), batch.target, strict=True
    ):
        assert sorted(gallery) == sorted([*range(10)] * 4)
        for label, here in zip(rows, places.int().tolist(), strict=True):
            assert here == [j for j in range(40) if gallery[j] == label]


def test_digits_are_asked_for_without_leakage():
    train_rows, held_out = ({tuple(row) for row in half.tolist()} for half in halves(DOUBLE, CPU))
    _, batch, _, _ = case(2000, **DIGITS)
    _, test, _, _ = case(2000, clean=True, **DIGITS)
    assert test.x.shape == (3, 540, 64)
    for replicate in range(3):
        queries, gallery, asked = (
            {tuple(row) for row in rows[replicate].tolist()}
            for rows in (batch.x, batch.given["candidates"], test.x)
        )
        assert len(gallery) == 40
        assert queries <= train_rows - gallery
        assert gallery <= train_rows
        assert asked == held_out
    alone = built("task", "retrieval", **{**SIZES, **DIGITS}).teacher(
        Normals([2], dtype=torch.float64).child("teacher")
    )
    for name, value in alone.items():
        assert torch.equal(value[0], batch.teacher[name][2])


def test_digits_are_compared_by_cosines_and_have_no_distance():
    task, test, W, _ = case(100, clean=True, **DIGITS)
    x, c = test.x[1].numpy() @ W[1].numpy().T, test.given["candidates"][1].numpy() @ W[1].numpy().T
    cosines = x @ c.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(c, axis=1)
    np.testing.assert_allclose(task.scores(W, test)[1].numpy(), cosines, rtol=1e-10)
    columns = task.metrics(W, test)
    assert set(columns) == {"recall", "ndcg", "recall_raw"}
    assert (columns["recall_raw"] > 0.5).all()


@pytest.mark.parametrize(("method", "objective"), [("entropic", "recall"), ("hard", "cross_entropy")])
def test_digits_are_learned(method, objective):
    task = built("task", "retrieval", **{**SIZES, **DIGITS, "n": 200, "embedding": 8}, objective=objective)
    changes = {"temperature": 0.1} if method == "entropic" else {}
    result = train(built("method", method, **changes), task, Adam(0.01), range(2), Training(100, 32), QUIET)
    before, after = (columns for _, _, columns in (result.points[0], result.points[-1]))
    assert (after["recall"] > before["recall"] + 0.2).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": 5}, r"d must be 64 for digits, got 5"),
        ({"n": 45}, r"n must be a multiple of 10 in \[10, 1210\] for digits, got 45"),
        ({"n": 5}, r"n must be a multiple of 10 in \[10, 1210\] for digits, got 5"),
        ({"n": 1220}, r"n must be a multiple of 10 in \[10, 1210\] for digits, got 1220"),
        ({"relevant": 3}, r"relevant must be null for digits.*, got 3"),
    ],
)
def test_digits_that_cannot_be_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        built("task", "retrieval", **{**SIZES, **DIGITS, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 1}, r"n must be >= 2, got 1"),
        ({"d": 0}, r"d must be >= 1, got 0"),
        ({"embedding": 0}, r"embedding must be >= 1, got 0"),
        ({"k": 7}, r"k must be in \[1, n\] = \[1, 6\], got 7"),
        ({"relevant": 7}, r"relevant must be in \[1, n\] = \[1, 6\], got 7"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(built("task", "retrieval"), **change)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ConfigError, match=r"objective must be .*cross_entropy.*, got 'hinge'"):
        built("task", "retrieval", objective="hinge")
