import dataclasses

import numpy as np
import pytest
import torch
from conftest import built
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

from topkbench.choices import ConfigError
from topkbench.evaluate import evaluate, hard_loss
from topkbench.methods import Hard, Relaxed
from topkbench.operators import entropic
from topkbench.optimizers import Adam
from topkbench.randomness import Normals
from topkbench.step import gradient
from topkbench.tasks import KNN
from topkbench.tasks.knn import accuracy, baselines
from topkbench.train import Logging, Training, train

SMALL = KNN(n=30, k=4, nuisance=5)
QUIET = Logging(2, 0, 540)


def case(task=SMALL, rows=20, clean=False, seeds=(0, 1, 2)):
    normals = Normals(list(seeds), dtype=torch.float64)
    teacher = task.teacher(normals.child("teacher"))
    batch = task.sample(teacher, normals.child("x"), rows, clean=clean)
    return task.start(normals.child("start")), batch, normals


def digits(half):
    """The pixels and labels of one half of scikit-learn's split."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, labels, test_size=0.3, stratify=labels, random_state=0)
    return parts[half], parts[2 + half]


def table(tmp_path, classes=3, rows=60, seed=0):
    """A file whose class is the largest of so many columns, beside one that says nothing."""
    draw = np.random.default_rng(seed)
    y = np.arange(rows) % classes
    x = np.column_stack([np.eye(classes)[y], draw.normal(size=rows)])
    lines = [",".join([*map(str, row.tolist()), f"kind {label}"]) for row, label in zip(x, y, strict=True)]
    file = tmp_path / "table.csv"
    header = ",".join([*(f"c{i}" for i in range(classes)), "other", "kind"])
    file.write_text("\n".join([header, *lines]))
    return str(file)


@pytest.mark.parametrize("clean", [False, True])
def test_the_loss_is_the_share_of_neighbours_of_another_class(clean):
    W, batch, _ = case(clean=clean)
    losses, scores = hard_loss(SMALL, W, batch), SMALL.scores(W, batch)
    for r in range(3):
        matrix, c = W[r].numpy(), batch.given["candidates"][r].numpy()
        for b, x in enumerate(batch.x[r].numpy()):
            distances = np.array([((matrix @ (x - each)) ** 2).sum() for each in c])
            np.testing.assert_allclose(scores[r, b].numpy(), -distances, rtol=1e-9, atol=1e-12)
            votes = batch.given["classes"][r].numpy()[np.argsort(distances)[:4]]
            assert losses[r, b].item() == pytest.approx((votes != batch.target[r, b].item()).mean())


def test_samples_of_the_mask_may_stand_in_front():
    W, batch, _ = case()
    scores = SMALL.scores(W, batch)
    masks = torch.rand(4, 2, *scores.shape, dtype=torch.float64)
    losses = SMALL.loss(masks, scores, batch)
    assert losses.shape == (4, 2, 3, 20)
    torch.testing.assert_close(losses[3, 1], SMALL.loss(masks[3, 1], scores, batch))


def test_the_hard_gradient_is_exactly_zero():
    W, batch, normals = case()
    loss, grad = gradient(Hard(), SMALL, W, batch, normals)
    assert loss.min() > 0
    assert torch.equal(grad, torch.zeros_like(W))


@pytest.mark.parametrize("clean", [False, True])
def test_rows_are_those_of_the_table_with_their_class(clean):
    _, batch, _ = case(rows=300, clean=clean)
    pixels, labels = digits(int(clean))
    known = {tuple(row): label for row, label in zip(pixels, labels, strict=True)}
    for r in range(3):
        asked = [known[tuple(row)] for row in batch.x[r, :, :64].tolist()]
        assert asked == batch.target[r, :, 0].tolist()
    if clean:
        assert np.array_equal(batch.x[1, :, :64].numpy(), pixels[:300])


def test_no_held_out_row_is_trained_on_and_none_is_its_own_neighbour():
    _, test, normals = case(rows=10**4, clean=True)
    assert test.x.shape == (3, 540, 69)
    train_rows, _ = digits(0)
    pixels = {row.tobytes() for row in train_rows}
    assert not pixels & {row.numpy().tobytes() for row in test.x[0, :, :64]}
    for rows in (20, 2000):  # more than there are
        batch = SMALL.sample(test.teacher, normals.child("train"), rows)
        for r in range(3):
            asked, candidates = (
                {row.numpy().tobytes() for row in part[r]} for part in (batch.x, batch.given["candidates"])
            )
            assert len(candidates) == 30
            assert len(asked) == min(rows, 1257 - 30)
            assert not asked & candidates
            mine = {row.numpy().tobytes() for row in SMALL.training(test.teacher)[0][r]}
            assert asked | candidates <= mine
    assert {row.numpy().tobytes() for row in test.given["candidates"][0]} <= {
        row.numpy().tobytes() for row in SMALL.training(test.teacher)[0][0]
    }


def test_candidates_are_drawn_anew_and_rows_keep_their_nuisance():
    _, first, normals = case(rows=1227)
    second = SMALL.sample(first.teacher, normals.child("x"), 1227)
    third = SMALL.sample(first.teacher, normals.child("y"), 1227)
    assert torch.equal(first.x, second.x)
    assert not torch.equal(first.given["candidates"], third.given["candidates"])
    both = (torch.cat([batch.x, batch.given["candidates"]], 1) for batch in (first, third))
    one, other = ({row.numpy().tobytes() for row in rows[2]} for rows in both)
    assert one == other
    nuisance = first.x[..., 64:]
    assert abs(nuisance.std().item() - 0.5) < 4 * 0.5 / (2 * nuisance.numel()) ** 0.5
    assert not torch.equal(first.teacher["train"][0], first.teacher["train"][1])


def test_a_replicate_is_what_it_is_alone():
    for clean in (False, True):
        _, together, _ = case(clean=clean)
        _, alone, _ = case(clean=clean, seeds=[2])
        assert torch.equal(together.x[2:], alone.x)
        for name, value in alone.given.items():
            torch.testing.assert_close(together.given[name][2:], value)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_accuracy_is_scikit_learns(k):
    task = KNN(n=30, k=k, nuisance=20)
    W, test, _ = case(task, 540, clean=True)
    columns = task.metrics(W, test)
    train_rows, classes = task.training(test.teacher)
    for r in range(3):
        x, y, held, truth = (
            part.numpy() for part in (train_rows[r], classes[r], test.x[r], test.target[r, :, 0])
        )
        pca = PCA(8, svd_solver="full").fit(x).components_
        for name, matrix in {
            "accuracy": W[r].numpy(),
            "accuracy_raw": np.eye(84),
            "accuracy_pca": pca,
        }.items():
            model = KNeighborsClassifier(k).fit(x @ matrix.T, y)
            assert columns[name][r].item() == pytest.approx(model.score(held @ matrix.T, truth), abs=1e-12)
    assert np.array_equal(classes[0].numpy(), digits(0)[1])


def test_equal_votes_go_to_the_first_class():
    train_rows = torch.tensor([[[0.0], [1.0], [2.0], [9.0]]])
    classes = torch.tensor([[2.0, 1.0, 0.0, 0.0]])
    x = torch.tensor([[[0.1]]])
    for k, expected in {1: 2, 2: 1, 3: 0}.items():
        for label in range(3):
            right = accuracy(train_rows, classes, x, torch.tensor([[float(label)]]), k)
            assert right.item() == (label == expected)


def test_a_space_where_classes_are_apart_is_perfect(tmp_path):
    task = KNN(n=20, k=3, embedding=3, nuisance=10, noise=2.0, data=table(tmp_path), target="kind")
    W, test, normals = case(task, 18, clean=True)
    perfect = torch.zeros_like(W)
    perfect[:, range(3), range(3)] = 1
    columns = evaluate(Hard(), task, perfect, test, normals)
    assert (columns["accuracy"] == 1).all()
    assert (columns["hard_loss"] == 0).all()
    worse = evaluate(Hard(), task, W, test, normals)
    assert (worse["accuracy"] < 1).all()
    assert (worse["accuracy_raw"] < 1).all()


def test_a_relaxation_learns_where_the_hard_gradient_does_not():
    task = KNN(n=100)
    settings = Adam(0.01), range(2), Training(120, 50), QUIET
    result = train(Relaxed(entropic, 0.3), task, *settings)
    before, after = (columns for _, _, columns in (result.points[0], result.points[-1]))
    assert (before["accuracy"] < 0.5).all()
    assert (after["accuracy"] > before["accuracy"] + 0.4).all()
    assert (after["accuracy"] > after["accuracy_raw"]).all()
    assert (after["hard_loss"] < 0.5 * before["hard_loss"]).all()
    stuck = train(Hard(), task, Adam(0.01), range(2), Training(2, 50), QUIET).points[-1][2]
    assert torch.equal(stuck["accuracy"], before["accuracy"])


def test_baselines():
    task = KNN(n=30, k=9, nuisance=0, data="breast_cancer")
    found = baselines(task, 0)
    assert set(found) == {"raw", "pca", "nca"}
    assert all(0.9 < value <= 1 for value in found.values())
    _, test, _ = case(task, 540, clean=True, seeds=[0])
    assert found["raw"] == test.given["accuracy_raw"].item()


def test_a_csv_file_is_standardised_by_its_training_rows(tmp_path):
    task = built("task", "knn", data=table(tmp_path), target="kind", n=20, k=3, nuisance=2)
    _, test, _ = case(task, 100, clean=True)
    x, classes = task.training(test.teacher)
    assert task.d == x.shape[-1] == 6
    assert (x.shape[1], test.x.shape[1]) == (42, 18)
    torch.testing.assert_close(x[0, :, :4].mean(0), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(x[0, :, :4].std(0, correction=0), torch.ones(4, dtype=torch.float64))
    assert np.bincount(classes[0].int().numpy()).tolist() == [14] * 3


def test_a_constant_column_is_left_alone(tmp_path):
    file = tmp_path / "constant.csv"
    file.write_text("a,b,y\n" + "\n".join(f"{i},7.3,{'uv'[i % 2]}" for i in range(20)))
    task = KNN(n=5, k=2, nuisance=0, data=str(file), target="y")
    _, batch, _ = case(task)
    assert batch.x.isfinite().all()
    assert batch.x[..., 1].abs().max() < 1e-12


def test_what_is_wrong_with_a_csv_file_is_one_line(tmp_path):
    file = tmp_path / "t.csv"
    for text, message in {
        "a,y\n1,u\nx,v\n": r"t\.csv: row 3, column 'a': 'x' is not a finite number",
        "a,y\n1,1.5\n2,2.5\n3,3.5\n": r"column 'y' is a quantity: it must be a class",
        "a,y\n1,u\n2,u\n3,u\n4,v\n": r"20-t\.csv: class 'v' has 1 row: 4 are needed",
    }.items():
        own = file.with_name(f"{len(text)}-t.csv")
        own.write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            built("task", "knn", data=str(own), target="y", n=2, k=1)
        assert "\n" not in str(caught.value)


def test_the_ending_of_a_file_may_be_in_capitals(tmp_path):
    table(tmp_path)
    file = (tmp_path / "table.csv").rename(tmp_path / "TABLE.CSV")
    assert built("task", "knn", data=str(file), target="kind", n=5, k=1).d == 4 + 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, r"n must be >= 1, got 0"),
        ({"k": 31}, r"k must be in \[1, n\] = \[1, 30\], got 31"),
        ({"n": 1257}, r"n must be <= 1256, the training rows of digits but one, got 1257"),
        ({"embedding": 0}, r"embedding must be >= 1, got 0"),
        ({"nuisance": -1}, r"nuisance must be >= 0, got -1"),
        ({"noise": float("inf")}, r"noise must be >= 0 and finite, got inf"),
        ({"data": "digit"}, r"unknown data 'digit'; did you mean digits\?.*or the path of a \.csv file"),
        ({"data": "linear"}, r"unknown data 'linear'; .*allowed: breast_cancer, digits, or the path"),
        ({"target": "y"}, r"target names a column of a \.csv file, got target y for digits"),
        ({"data": "a.csv"}, r"target names a column of a \.csv file, got target None for a\.csv"),
        ({"data": "no.csv", "target": "y"}, r"there is no file no\.csv"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_all_training_rows_but_one_may_be_candidates():
    _, batch, _ = case(dataclasses.replace(SMALL, n=1256), 3)
    assert (batch.x == batch.x[:, :1]).all()
