"""Rows to train on, rows held out to tune, and rows held out to evaluate: no row is two of these."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import built
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from topkbench.choices import ConfigError
from topkbench.randomness import Normals
from topkbench.tasks._digits import breast_cancer, digits
from topkbench.tasks._digits_binary import black_and_white
from topkbench.tasks._split import common, own
from topkbench.tasks.features import Features
from topkbench.tasks.knn import KNN

DIGITS = {
    "knn": {"n": 30, "k": 4},
    "classification": {},
    "autoencoder": {"data": "digits", "d": 64},
    "subset_vae": {},
    "retrieval": {"data": "digits", "d": 64, "n": 40},
}
PLANTED = {"classification": {"data": "synthetic"}, "autoencoder": {}, "retrieval": {}, "features": {}}
PIXELS, LABELS = load_digits(return_X_y=True)
SPLITS = ("evaluation", "tuning")


def parts():
    """Digits to train on when tuning, held out for tuning, held out for evaluation: by scikit-learn alone."""
    rest, evaluation = train_test_split(np.arange(1797), test_size=0.3, stratify=LABELS, random_state=0)
    train, tuning = train_test_split(rest, test_size=0.3, stratify=LABELS[rest], random_state=1)
    return train, tuning, evaluation


def shown(name, task):
    """Rows of the first replicate, many of those trained on and all that are held out, and the teacher."""
    normals = Normals([0, 1], dtype=torch.float64)
    teacher = task.teacher(normals.child("teacher"))
    seen = task.sample(teacher, normals.child("train"), 3000)
    test = task.sample(teacher, normals.child("test"), 3000, clean=True)
    candidates = seen.given.get("candidates", seen.x[:, :0])
    train, held_out = torch.cat([seen.x, candidates], 1)[0, :, :64], test.x[0, :, :64]
    if name == "autoencoder":
        train, held_out = (rows + teacher["mean"][0] for rows in (train, held_out))
    return train, held_out


def places(rows, like):
    """Which digits these rows are."""
    distances = torch.cdist(rows, like)
    assert distances.amin(1).max() < 1e-6
    return set(distances.argmin(1).tolist())


def scaled(pixels, train):
    """As `classification` has them."""
    mean = pixels[train].mean(0)
    return (pixels - mean) / (pixels[train] - mean).square().mean().sqrt()


@pytest.mark.parametrize("name", sorted(set(DIGITS) - {"subset_vae"}))
@pytest.mark.parametrize("split", SPLITS)
def test_a_task_on_digits_shows_the_rows_of_its_split_alone(name, split):
    train, tuning, evaluation = parts()
    if split == "evaluation":
        train, tuning = np.concatenate([train, tuning]), evaluation
    like = torch.as_tensor(PIXELS) / 16
    like = scaled(like, train) if name == "classification" else like
    seen, held_out = (
        places(rows, like) for rows in shown(name, built("task", name, **DIGITS[name], split=split))
    )
    assert held_out == set(tuning.tolist())
    assert seen <= set(train.tolist())
    assert len(seen) > 0.8 * len(train)


@pytest.mark.parametrize("split", SPLITS)
def test_black_and_white_digits_are_those_of_the_split(split):
    train, tuning, evaluation = parts()
    if split == "evaluation":
        train, tuning = np.concatenate([train, tuning]), evaluation
    task, pixels = built("task", "subset_vae", split=split), black_and_white(torch.as_tensor(PIXELS) / 16)
    teacher = task.teacher(Normals([0], dtype=torch.float64))
    held_out = task.sample(teacher, Normals([0], dtype=torch.float64), 3000, clean=True)
    assert torch.equal(held_out.target[0].sum(0), pixels[tuning].sum(0))
    assert torch.equal(task.population(teacher).target[0].sum(0), pixels[train].sum(0))
    torch.testing.assert_close(teacher["mean"][0], (pixels[train].sum(0) + 1) / (len(train) + 2))


@pytest.mark.parametrize("table", [digits(), breast_cancer()], ids=["digits", "breast_cancer"])
def test_the_three_parts_are_disjoint_and_all_there_is(table):
    rest, evaluation = common(table, "evaluation", "a table")
    train, tuning = common(table, "tuning", "a table")
    assert sorted([*train, *tuning]) == sorted(rest)
    assert sorted([*train, *tuning, *evaluation]) == list(range(len(table.y)))
    for part, share in ((train, 0.49), (tuning, 0.21), (evaluation, 0.3)):
        expected = share * np.bincount(table.y.astype(int))
        assert np.abs(np.bincount(table.y[part].astype(int)) - expected).max() <= 1.5


@pytest.mark.parametrize("data", ["breast_cancer", "digits"])
def test_a_replicate_of_features_has_three_disjoint_parts_of_its_own(data):
    task = Features(n=64, k=4, data=data)
    taught = {}
    for split in SPLITS:
        other = dataclasses.replace(task, split=split)
        taught[split] = other.teacher(Normals([0, 1, 2], dtype=torch.float64).child("teacher"))
    table = {"breast_cancer": breast_cancer, "digits": digits}[data]()
    counts, held_out = np.bincount(table.y.astype(int)), []
    for r in range(3):
        train, tuning, evaluation = (
            part[r].tolist()
            for part in (
                taught["tuning"]["train"],
                taught["tuning"]["held_out"],
                taught["evaluation"]["held_out"],
            )
        )
        assert sorted([*train, *tuning]) == sorted(taught["evaluation"]["train"][r].tolist())
        assert sorted([*train, *tuning, *evaluation]) == list(range(len(table.y)))
        for part, share in ((train, 0.49), (tuning, 0.21), (evaluation, 0.3)):
            assert np.abs(np.bincount(table.y[part].astype(int)) - share * counts).max() <= 1
        held_out.append(set(evaluation))
    assert held_out[0] != held_out[1]
    inside = task._rows(taught["tuning"], taught["tuning"]["train"]).x
    assert inside.mean(1).abs().max() < 1e-9


def test_rows_of_every_class_are_among_the_first_that_are_held_out():
    _, held_out = own(Normals([0, 1], dtype=torch.float64), digits(), "evaluation")
    for r in range(2):
        assert len(set(digits().y[held_out[r, :100].numpy()])) == 10


@pytest.mark.parametrize("split", SPLITS)
def test_a_replicate_is_split_as_it_is_alone(split):
    together = own(Normals([3, 4], dtype=torch.float64), digits(), split)
    alone = own(Normals([4], dtype=torch.float64), digits(), split)
    assert all(torch.equal(one[1:], other) for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize("name", [*DIGITS, "features"])
def test_an_unknown_split_is_refused(name):
    changes = DIGITS.get(name, {"data": "breast_cancer", "n": 30})
    with pytest.raises(ConfigError, match=r"split must be .*tuning.*, got 'test'"):
        built("task", name, **changes, split="test")


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_needs_no_split(name):
    with pytest.raises(
        ConfigError, match=r"split must be evaluation for planted data .*other seeds.*got 'tuning'"
    ):
        built("task", name, **PLANTED[name], split="tuning")


def file_of(tmp_path, counts):
    """A file with so many rows of each class."""
    labels = [name for name, count in counts.items() for _ in range(count)]
    file = tmp_path / f"{'-'.join(map(str, counts.values()))}.csv"
    file.write_text("\n".join(["a,kind", *(f"{i % 7},{label}" for i, label in enumerate(labels))]))
    return str(file)


@pytest.mark.parametrize("task", [KNN(n=2, k=1), Features(n=64, k=1, data="digits")], ids=["knn", "features"])
@pytest.mark.parametrize(
    ("counts", "split", "message"),
    [
        ({"u": 20, "v": 1}, "evaluation", r"20-1\.csv: class 'v' has 1 row: 4 are needed"),
        ({"u": 3, "v": 9, "w": 9}, "evaluation", r"3-9-9\.csv: class 'u' has 3 rows: 4 are needed"),
        (
            {"u": 20, "v": 4},
            "tuning",
            r"20-4\.csv: class 'v' has 3 rows beside those set aside: 4 are needed",
        ),
    ],
)
def test_a_class_with_too_few_rows_is_named(tmp_path, task, counts, split, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(task, data=file_of(tmp_path, counts), target="kind", split=split)


@pytest.mark.parametrize("split", SPLITS)
def test_a_class_with_just_enough_rows_is_in_every_part(tmp_path, split):
    data = file_of(tmp_path, {"u": 4 if split == "evaluation" else 6, "v": 60, "w": 7})
    for task in (KNN(n=2, k=1, nuisance=0), Features(n=64, k=1, data="digits")):
        task = dataclasses.replace(task, data=data, target="kind", split=split)
        normals = Normals([0, 1, 2], dtype=torch.float64)
        teacher = task.teacher(normals.child("teacher"))
        for clean in (False, True):
            y = task.sample(teacher, normals.child("x"), 1000, clean=clean).target
            y = y if y.shape[-1] == 1 else y.argmax(-1, keepdim=True)
            assert all(set(rows.flatten().int().tolist()) == {0, 1, 2} for rows in y)


def test_a_table_with_too_few_rows_of_a_quantity_is_refused(tmp_path):
    file = tmp_path / "few.csv"
    file.write_text("a,price\n" + "\n".join(f"{i},{i}.5" for i in range(4)))
    with pytest.raises(ValueError, match=r"few\.csv: the table has 4 rows: 5 are needed"):
        Features(n=1, k=1, data=str(file), target="price")
