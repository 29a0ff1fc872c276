import dataclasses

import numpy as np
import pytest
import torch
from conftest import built
from sklearn.datasets import load_digits
from sklearn.metrics import top_k_accuracy_score
from sklearn.model_selection import train_test_split

from topkbench.choices import ConfigError
from topkbench.evaluate import evaluate, hard_loss
from topkbench.methods import Hard
from topkbench.operators import hard_mask
from topkbench.optimizers import Adam
from topkbench.randomness import Normals
from topkbench.step import gradients
from topkbench.tasks import Learns
from topkbench.tasks.classification import FLOOR, surprise
from topkbench.train import Logging, Training, train

SYNTHETIC = {"data": "synthetic", "n": 12, "d": 7, "k": 3}
MASKS, SCORES = ("mask", "error"), ("cross_entropy", "smooth_svm", "hinge")


def case(rows=30, clean=False, **changes):
    task = built("task", "classification", **changes)
    normals = Normals([0, 1, 2], dtype=torch.float64)
    teacher = task.teacher(normals.child("teacher"))
    W = task.start(normals.child("start"))
    others = task.others(teacher, normals.child("others"), W)
    batch = task.sample(teacher, normals.child("x"), rows, clean=clean)
    return task, dataclasses.replace(batch, learned=others), W, normals


def planted(teacher):
    """W* and what goes with it."""
    return teacher["centres"], {"A": teacher["A"], "b": teacher["b"]}


def numpy_loss(objective, q, label, k):
    """One row."""
    rest = np.sort(np.delete(q, label))[::-1]
    if objective == "cross_entropy":
        return np.log(np.exp(q).sum()) - q[label]
    if objective == "hinge":
        return max(0, 1 + (rest[k - 1] - q[label]) / k)
    inside = label in np.argsort(-q)[:k]
    return (0.0 if inside else 1.0) if objective == "error" else (0.0 if inside else 1 - np.log(1e-6))


@pytest.mark.parametrize("data", [{}, SYNTHETIC])
@pytest.mark.parametrize("objective", [name for name in (*MASKS, *SCORES) if name != "smooth_svm"])
def test_the_hard_loss_is_that_of_the_definition(objective, data):
    task, batch, W, normals = case(objective=objective, **data)
    b = normals("b", task.n)
    batch = dataclasses.replace(batch, learned={**batch.learned, "b": b})
    losses = hard_loss(task, W, batch)
    for r in range(3):
        A, labels = batch.learned["A"][r].numpy(), batch.target[r, :, 0].numpy().astype(int)
        for row, x in enumerate(batch.x[r].numpy()):
            q = W[r].numpy() @ (A @ x) + b[r].numpy()
            expected = numpy_loss(objective, q, labels[row], task.k)
            assert losses[r, row].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_smooth_svm_has_the_hinge_as_its_limit_and_differs_from_it_at_one():
    task, batch, W, _ = case(objective="hinge", **SYNTHETIC)
    hinge = hard_loss(task, W, batch)
    for temperature, near in ((1e-3, True), (1.0, False)):
        smooth = dataclasses.replace(task, objective="smooth_svm", temperature=temperature)
        assert torch.allclose(hard_loss(smooth, W, batch), hinge, atol=2e-2) == near


def test_the_loss_of_a_relaxed_mask_is_minus_the_logarithm_of_the_labels_part():
    task, batch, W, _ = case()
    scores = task.scores(W, batch)
    mask = torch.rand_like(scores)
    own = mask.gather(-1, batch.target.long()).squeeze(-1)
    torch.testing.assert_close(task.loss(mask, scores, batch), -own.log())
    error = dataclasses.replace(task, objective="error")
    torch.testing.assert_close(error.loss(mask, scores, batch), 1 - own)


def test_below_the_floor_is_the_tangent():
    part = torch.tensor([-0.5, 0.0, 0.5 * FLOOR, FLOOR, 2 * FLOOR, 0.3, 1.5]).double().requires_grad_()
    loss = surprise(part)
    (slope,) = torch.autograd.grad(loss.sum(), part)
    below = part < FLOOR
    expected = torch.where(below, 1 - part / FLOOR - np.log(FLOOR), -part.clamp(min=FLOOR).log())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(slope[~(part == FLOOR)], (-1 / part.clamp(min=FLOOR))[~(part == FLOOR)])


@pytest.mark.parametrize("objective", MASKS)
def test_the_hard_gradient_is_exactly_zero_for_all_that_is_learned(objective):
    task, batch, W, normals = case(objective=objective)
    learned = {"W": W, **batch.learned}
    loss, grads = gradients(Hard(), task, learned, batch, normals)
    assert (loss > 0).all()
    assert all(torch.equal(grads[name], torch.zeros_like(learned[name])) for name in learned)


@pytest.mark.parametrize("objective", SCORES)
def test_objectives_of_the_scores_do_not_look_at_the_mask(objective):
    task, batch, W, normals = case(objective=objective)
    scores = task.scores(W, batch)
    masks = torch.rand(2, *scores.shape, dtype=torch.float64)
    hard = task.loss(hard_mask(scores, task.k), scores, batch)
    torch.testing.assert_close(task.loss(masks, scores, batch), hard.expand(2, 3, 30))
    _, grads = gradients(Hard(), task, {"W": W, **batch.learned}, batch, normals)
    assert all((grad != 0).flatten(1).any(1).all() for grad in grads.values())


def test_scaled_softmax_is_the_cross_entropy_less_a_constant():
    task, batch, W, normals = case()
    other = dataclasses.replace(task, objective="cross_entropy")
    learned = {"W": W, **batch.learned}
    method = built("method", "scaled_softmax", temperature=1.0)
    loss, grads = gradients(method, task, learned, batch, normals)
    entropy, expected = gradients(Hard(), other, learned, batch, normals)
    torch.testing.assert_close(loss, entropy - np.log(task.k))
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name])


def test_straight_through_moves_wrong_rows():
    task, batch, W, normals = case(rows=1)
    wrong = hard_loss(task, W, batch).squeeze(-1) > 0
    assert wrong.any()
    _, grads = gradients(built("method", "ste_entropic"), task, {"W": W, **batch.learned}, batch, normals)
    assert (grads["W"] != 0).flatten(1).any(1)[wrong].all()


@pytest.mark.parametrize("objective", [*MASKS, *SCORES])
def test_samples_in_front(objective):
    task, batch, W, _ = case(objective=objective)
    scores = task.scores(W, batch)
    masks = torch.rand(4, 2, *scores.shape, dtype=torch.float64)
    losses = task.loss(masks, scores, batch)
    assert losses.shape == (4, 2, 3, 30)
    torch.testing.assert_close(losses[3, 1], task.loss(masks[3, 1], scores, batch))


def test_the_planted_solution_is_perfect_and_the_start_is_not():
    task, batch, start, normals = case(300, clean=True, **SYNTHETIC, label_noise=0.4)
    W, others = planted(batch.teacher)
    columns = evaluate(Hard(), task, W, dataclasses.replace(batch, learned=others), normals)
    for name, perfect in {"hard_loss": 0, **{f"top_{j}": 1 for j in range(1, 6)}}.items():
        torch.testing.assert_close(columns[name], torch.full((3,), float(perfect)).double())
    assert (evaluate(Hard(), task, start, batch, normals)["top_3"] < 0.7).all()


def test_the_planted_label_is_the_nearest_centre():
    _, batch, _, _ = case(200, clean=True, **SYNTHETIC)
    A, centres = batch.teacher["A"], batch.teacher["centres"]
    nearest = torch.cdist(batch.x @ A.mT, centres).argmin(-1)
    assert torch.equal(batch.target.squeeze(-1), nearest.double())
    torch.testing.assert_close(A @ A.mT, torch.eye(2, dtype=torch.float64).expand(3, 2, 2))


@pytest.mark.parametrize("data", [{}, SYNTHETIC])
def test_accuracy_is_scikit_learns(data):
    task, batch, W, _ = case(400, clean=True, **data)
    columns = task.metrics(W, batch)
    assert list(columns) == [f"top_{j}" for j in range(1, 6)]
    scores = task.scores(W, batch).numpy()
    for r in range(3):
        for j in range(1, 6):
            labels = batch.target[r, :, 0].numpy()
            expected = top_k_accuracy_score(labels, scores[r], k=j, labels=np.arange(task.n))
            assert columns[f"top_{j}"][r].item() == pytest.approx(expected, abs=1e-12)


def test_few_classes_have_few_columns():
    task, batch, W, _ = case(50, clean=True, data="synthetic", n=3, d=4, k=2)
    columns = task.metrics(W, batch)
    assert list(columns) == ["top_1", "top_2", "top_3"]
    assert torch.equal(columns["top_3"], torch.ones(3, dtype=torch.float64))


def test_top_k_accuracy_is_one_less_the_error():
    task, batch, W, normals = case(400, clean=True, objective="error")
    columns = evaluate(Hard(), task, W, batch, normals)
    torch.testing.assert_close(columns["top_2"], 1 - columns["hard_loss"])


def rows_of(x, labels):
    """Rows as they can be looked up, pixels as whole numbers."""
    return {(*row, label) for row, label in zip(x.round().astype(int).tolist(), labels.tolist(), strict=True)}


def test_digits_are_split_without_leakage():
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x, y, test_size=0.3, stratify=y, random_state=0)
    x_train, x_test, y_train, y_test = parts
    scale = np.sqrt(np.mean((x_train - x_train.mean(0)) ** 2))
    _, batch, _, _ = case(4000)
    seen = batch.x * scale + torch.as_tensor(x_train.mean(0))
    for r in range(3):
        found = rows_of(seen[r].numpy(), batch.target[r, :, 0].numpy())
        assert found <= rows_of(x_train, y_train)
        assert not found & rows_of(x_test, y_test)
    assert not torch.equal(batch.x[0], batch.x[1])
    _, test, _, _ = case(4000, clean=True)
    assert test.x.shape == (3, 540, 64)
    np.testing.assert_allclose(test.x[1].numpy() * scale + x_train.mean(0), x_test, atol=1e-9)
    np.testing.assert_array_equal(test.target[2, :, 0].numpy(), y_test)


def test_label_noise_has_its_share_and_is_the_same_label_each_time_a_digit_is_drawn():
    task, batch, _, normals = case(label_noise=0.4)
    x, y = load_digits(return_X_y=True)
    y = train_test_split(x, y, test_size=0.3, stratify=y, random_state=0)[2]
    labels = batch.teacher["labels"]
    wrong = (labels != torch.as_tensor(y)).double()
    assert abs(wrong.mean().item() - 0.4 * 0.9) < 4 * (0.36 * 0.64 / wrong.numel()) ** 0.5
    counts = torch.bincount(labels[wrong > 0].long(), minlength=10) / wrong.sum()
    assert (counts - 0.1).abs().max() < 0.03
    assert not torch.equal(labels[0], labels[1])
    many = task.sample(batch.teacher, normals.child("many"), 4000)
    for r in range(3):
        pairs = rows_of(100 * many.x[r].numpy(), many.target[r, :, 0].numpy())
        assert len(pairs) == len({row[:-1] for row in pairs})
    held_out = case(4000, clean=True, label_noise=0.4)[1]
    assert torch.equal(held_out.target, case(4000, clean=True)[1].target)


def test_planted_rows_are_fresh_and_their_labels_noisy_in_training_alone():
    task, noisy, _, normals = case(2000, **SYNTHETIC, label_noise=0.3)
    _, clean, _, _ = case(2000, clean=True, **SYNTHETIC)
    assert torch.equal(noisy.x, clean.x)
    wrong = (noisy.target != clean.target).double().mean().item()
    assert abs(wrong - 0.3 * 11 / 12) < 4 * (0.275 * 0.725 / 6000) ** 0.5
    assert noisy.target.min() >= 0
    assert noisy.target.max() <= 11
    again = task.sample(noisy.teacher, normals.child("test"), 100, clean=True)
    assert not (again.x.unsqueeze(2) == noisy.x.unsqueeze(1)).all(-1).any()


@pytest.mark.parametrize(
    ("method", "objective", "data"),
    [
        ("lapsum", "mask", {}),
        ("ste_lapsum", "mask", {}),
        ("hard", "cross_entropy", {}),
        ("lapsum", "mask", {**SYNTHETIC, "label_noise": 0.2}),
    ],
)
def test_w_is_learned(method, objective, data):
    task = built("task", "classification", objective=objective, **data)
    assert isinstance(task, Learns)
    result = train(built("method", method), task, Adam(0.03), range(4), Training(200, 32), Logging(2, 0, 540))
    before, after = (columns for _, _, columns in (result.points[0], result.points[-1]))
    name = f"top_{task.k}"
    assert (after[name] > before[name] + 0.3).all()
    assert (after[name] > 0.7).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, r"n must be >= 1, got 0"),
        ({"bottleneck": 0}, r"bottleneck must be >= 1, got 0"),
        ({"bottleneck": 65}, r"bottleneck must be in \[1, d\] = \[1, 64\], got 65"),
        ({"k": 11}, r"k must be in \[1, n\] = \[1, 10\], got 11"),
        ({"n": 11}, r"digits have n = 10 and d = 64, got n = 11 and d = 64"),
        ({"d": 5}, r"digits have n = 10 and d = 64, got n = 10 and d = 5"),
        ({"label_noise": 1.0}, r"label_noise must be in \[0, 1\), got 1\.0"),
        ({"label_noise": float("nan")}, r"label_noise must be in \[0, 1\), got nan"),
        ({"temperature": 0.0}, r"temperature must be > 0 and finite, got 0\.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(built("task", "classification"), **change)


@pytest.mark.parametrize(("name", "word"), [("objective", "recall"), ("data", "letters")])
def test_an_unknown_word_is_refused_in_a_configuration(name, word):
    with pytest.raises(ConfigError, match=rf"{name} must be one of .*, got '{word}'"):
        built("task", "classification", **{name: word})
