import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import built

from topkbench.evaluate import evaluate, hard_loss
from topkbench.methods import Hard, Relaxed
from topkbench.operators import lapsum
from topkbench.optimizers import Adam
from topkbench.randomness import Normals
from topkbench.step import gradients
from topkbench.tasks import Features
from topkbench.tasks._csv import read
from topkbench.tasks.features import baseline
from topkbench.train import Logging, Training, train

SEEDS = [0, 1, 2]
LINEAR = Features(n=6, k=2)
EVERY = [
    LINEAR,
    Features(n=6, k=3, hidden=4),
    Features(n=7, k=2, data="xor"),
    Features(n=7, k=3, data="orange", hidden=0),
    Features(n=7, k=4, data="additive", rows=9),
    Features(n=33, k=4, data="breast_cancer"),
    Features(n=64, k=4, data="digits", hidden=5),
]
NAMES = [f"{task.data}-{task.units}" for task in EVERY]


def case(task, rows=50, clean=True, seeds=SEEDS):
    normals = Normals(list(seeds), dtype=torch.float64)
    teacher = task.teacher(normals.child("teacher"))
    batch = task.sample(teacher, normals.child("x"), rows, clean=clean)
    W = task.start(normals.child("start"))
    learned = task.others(teacher, normals.child("others"), W)
    return W, dataclasses.replace(batch, learned=learned), normals


def solved(task, batch):
    """W and batch at the planted solution of `linear`."""
    others = {"beta": batch.teacher["b"].unsqueeze(-1), "bias": torch.zeros(3, 1, dtype=torch.float64)}
    return batch.teacher["support"].unsqueeze(-1), dataclasses.replace(batch, learned=others)


@pytest.mark.parametrize("task", EVERY, ids=NAMES)
def test_the_loss_is_what_the_docstring_says(task):
    W, batch, _ = case(task, rows=4)
    losses = hard_loss(task, W, batch)
    for r in range(3):
        learned = {name: value[r].numpy() for name, value in batch.learned.items()}
        kept = np.zeros(task.n)
        kept[np.argsort(-W[r, :, 0].numpy())[: task.k]] = 1
        for b in range(4):
            h, y = kept * batch.x[r, b].numpy(), batch.target[r, b].numpy()
            if task.units:
                h = np.maximum(h @ learned["weight"] + learned["shift"], 0)
            made = h @ learned["beta"] + learned["bias"]
            if task.classes:
                expected = -(y * (made - np.log(np.exp(made).sum()))).sum()
            else:
                expected = ((made - y) ** 2).sum() / 2
            assert losses[r, b].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("task", EVERY, ids=NAMES)
def test_samples_of_the_mask_may_stand_in_front(task):
    W, batch, _ = case(task, rows=4)
    scores = task.scores(W, batch)
    masks = torch.rand(2, 5, *scores.shape, dtype=torch.float64)
    together = task.loss(masks, scores, batch)
    assert together.shape == (2, 5, 3, 4)
    torch.testing.assert_close(together[1, 3], task.loss(masks[1, 3], scores, batch))


def test_the_planted_solution_is_perfect():
    W, batch = solved(LINEAR, case(LINEAR)[1])
    columns = evaluate(Hard(), LINEAR, W, batch, Normals(SEEDS))
    perfect = {"hard_loss": 0, "error": 0, "support": 1, "exact": 1, "median_rank": 1.5}
    for name, value in perfect.items():
        torch.testing.assert_close(columns[name], torch.full((3,), float(value), dtype=torch.float64))


def test_another_solution_is_not():
    W, batch = solved(LINEAR, case(LINEAR)[1])
    columns = evaluate(Hard(), LINEAR, -W, batch, Normals(SEEDS))
    assert (columns["error"] > 0.5).all()
    assert (columns["support"] == 0).all()
    assert (columns["exact"] == 0).all()
    assert (columns["median_rank"] == 5.5).all()


@pytest.mark.parametrize("task", EVERY, ids=NAMES)
def test_the_hard_gradient_reaches_the_predictor_alone(task):
    W, batch, normals = case(task, clean=False)
    learned = {"W": W, **batch.learned}
    _, grads = gradients(Hard(), task, learned, batch, normals)
    assert not grads.pop("W").any()
    assert all(grad.any() for grad in grads.values())


def test_planted_columns_are_correlated_as_said():
    task = Features(n=5, k=2, rho=0.7)
    x = case(task, rows=40000, seeds=[0])[1].x[0]
    lag = np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
    assert np.abs(np.cov(x.T.numpy()) - 0.7**lag).max() < 0.03  # 4 standard errors and a bit


def test_noise_is_on_training_targets_only():
    task = Features(n=6, k=2, noise=0.3)
    _, clean, _ = case(task, rows=2000)
    _, noisy, _ = case(task, rows=2000, clean=False)
    difference = noisy.target - clean.target
    assert torch.equal(noisy.x, clean.x)
    assert abs(difference.std().item() - 0.3) < 4 * 0.3 / (2 * difference.numel()) ** 0.5


@pytest.mark.parametrize(
    ("data", "log_odds"),
    [
        ("xor", lambda x: x[0] * x[1]),
        ("orange", lambda x: sum(x[i] ** 2 for i in range(4)) - 4),
        (
            "additive",
            lambda x: -100 * math.sin(0.2 * x[0]) + abs(x[1]) + x[2] + math.exp(-x[3]) - 2.4,
        ),
    ],
)
def test_classes_have_the_probabilities_of_their_source(data, log_odds):
    task = Features(n=7, k=2, data=data, rho=0.0)
    _, clean, _ = case(task, rows=20)
    places = clean.teacher["columns"]
    for r in range(3):
        for b in range(20):
            odds = math.exp(min(log_odds(clean.x[r, b, places[r]].tolist()), 500))
            assert clean.target[r, b, 0].item() == pytest.approx(odds / (1 + odds), abs=1e-9)
    _, drawn, _ = case(task, rows=4000, clean=False)
    _, clean, _ = case(task, rows=4000)
    assert torch.equal(drawn.x, clean.x)
    assert ((drawn.target == 0) | (drawn.target == 1)).all()
    assert abs((drawn.target - clean.target)[..., 0].mean().item()) < 4 * 0.5 / 12000**0.5


def test_a_limited_number_of_rows_is_seen_again_and_never_held_out():
    task = Features(n=6, k=2, rows=10)
    _, first, _ = case(task, rows=200, clean=False)
    assert all(len(first.x[r].unique(dim=0)) <= 10 for r in range(3))
    held_out = case(task, rows=200)[1]
    assert all(len(held_out.x[r].unique(dim=0)) == 200 for r in range(3))


@pytest.mark.parametrize("data", ["breast_cancer", "digits"])
def test_rows_of_a_table_are_trained_on_or_held_out(data):
    task = Features(n=64, k=4, data=data)
    _, test, normals = case(task, rows=10**6)
    inner, outer = test.teacher["train"], test.teacher["held_out"]
    count = inner.shape[1] + outer.shape[1]
    assert (torch.cat([inner, outer], 1).sort(-1).values == torch.arange(count)).all()
    assert not torch.equal(outer[0], outer[1])  # a split of its own
    assert test.x.shape[1] == round(0.3 * count)
    seen = task.sample(test.teacher, normals.child("train"), 5000).x
    for r in range(3):
        mine = {row.numpy().tobytes() for row in seen[r]}
        inside = task._rows(test.teacher, inner).x[r]
        assert mine <= {row.numpy().tobytes() for row in inside}
        assert len(mine) > 0.9 * len(inside)
        assert inside.mean(0).abs().max() < 1e-9
        spread = inside.std(0, correction=0)
        assert (((spread - 1).abs() < 1e-6) | (spread < 1e-6)).all()


def test_decoys_are_shuffled_columns():
    task = Features(n=64, k=4, data="breast_cancer")
    x = task._table(torch.zeros((), dtype=torch.float64))[0]
    for j in range(30, 64):
        torch.testing.assert_close(x[:, j].sort().values, x[:, j % 30].sort().values)
        assert not torch.equal(x[:, j], x[:, j % 30])
    W, batch, _ = case(task)
    assert (batch.teacher["support"].sum(-1) == 30).all()
    assert "support" in task.metrics(W, batch)
    assert "median_rank" not in task.metrics(W, batch)
    plain = Features(n=30, k=4, data="breast_cancer")
    assert set(plain.metrics(*case(plain)[:2])) == {"accuracy"}


def test_a_relaxation_finds_the_columns_where_the_hard_gradient_does_not():
    task = Features(n=12, k=3)
    found = {}
    for method in (Hard(), Relaxed(lapsum, 0.3)):
        result = train(method, task, Adam(0.02), range(4), Training(300, 32), Logging(2, 0, 256))
        found[type(method)] = result.points[-1][2]
    assert found[Relaxed]["support"].mean() > 0.9
    assert found[Relaxed]["error"].mean() < 0.1
    assert found[Hard]["support"].mean() < 0.7


def test_all_columns_together_do_well():
    assert baseline(LINEAR, 0) < 0.01
    assert baseline(Features(n=30, k=2, data="breast_cancer"), 0) > 0.94
    assert 0.5 < baseline(Features(n=8, k=2, data="xor", rho=0.0), 0, rows=4000) <= 1
    assert baseline(dataclasses.replace(LINEAR, rows=100), 0) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, r"n must be >= 1, got 0"),
        ({"k": 0}, r"k must be in \[1, n\] = \[1, 6\], got 0"),
        ({"k": 7}, r"k must be in \[1, n\] = \[1, 6\], got 7"),
        ({"d": 2}, r"d must be 1 .*got 2"),
        ({"noise": -1.0}, r"noise must be >= 0 and finite, got -1\.0"),
        ({"rho": 1.0}, r"rho must be in \[0, 1\), got 1\.0"),
        ({"rows": 0}, r"rows must be >= 1.*got 0"),
        ({"hidden": -1}, r"hidden must be >= 0.*got -1"),
        ({"data": "liner"}, r"unknown data 'liner'; did you mean linear\?.*or the path of a \.csv file"),
        ({"data": "orange", "n": 3}, r"n must be >= 4, the columns that matter of orange, got 3"),
        ({"data": "breast_cancer"}, r"n must be >= 30, the columns of breast_cancer, got 6"),
        ({"target": "y"}, r"target names a column of a \.csv file, got target y for linear"),
        ({"data": "a.csv"}, r"target names a column of a \.csv file, got target None for a\.csv"),
        ({"data": "no.csv", "target": "y"}, r"there is no file no\.csv"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LINEAR, **change)


def test_a_csv_file_is_a_task(tmp_path):
    file = tmp_path / "table.csv"
    draw = np.random.default_rng(0)
    x = draw.normal(size=(60, 3)) * (1, 1000, 1) + (0, 1e6, 0)
    rows = [f"{a!r},{b!r},{c!r},{3 * b!r}" for a, b, c in x.tolist()]
    file.write_text("\n".join(["a,b,c,price", *rows]))
    task = built("task", "features", data=str(file), target="price", n=5, k=1)
    assert task.classes == 0
    W, batch, normals = case(task)
    assert batch.x.shape == (3, 18, 5)
    second = torch.zeros_like(W).index_fill(1, torch.tensor([1]), 1.0)
    others = {name: value.roll(0) for name, value in batch.learned.items()}
    others["beta"] = torch.ones_like(others["beta"])
    columns = evaluate(Hard(), task, second, dataclasses.replace(batch, learned=others), normals)
    assert columns["error"].max() < 1e-10  # the standardised price is the standardised second column
    assert (columns["support"] == 1).all()


def csv(tmp_path, text):
    file = tmp_path / "t.csv"
    file.write_text(text)
    return str(file)


def test_a_csv_file_is_read(tmp_path):
    table = read(csv(tmp_path, '\ufeffa, b,kind\n1,2e1,dog\n\n-3,.5,cat\n4,5,"cat"\n0,0,dog\n'), "kind")
    assert (table.names, table.labels) == (("a", "b"), ("cat", "dog"))
    assert table.x.tolist() == [[1, 20], [-3, 0.5], [4, 5], [0, 0]]
    assert (table.classes, table.y.tolist()) == (2, [1, 0, 0, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"t\.csv is empty"),
        ("a,y\n1,1\n2,1\n", r"column 'y' has one value alone"),
        ("a,y\n1,1\n", r"must have at least 2 rows under its header, got 1"),
        ("a,a,y\n1,1,1\n2,2,2\n", r"two columns are called 'a'"),
        ("y\n1\n2\n", r"has no column beside 'y'"),
        ("a,why\n1,1\n2,2\n", r"unknown column 'y'; .*allowed: a, why"),
        ("a,y\n1,1\n\nx,2\n", r"t\.csv: row 4, column 'a': 'x' is not a finite number"),
        ("a,y\n1,1\n,2\n", r"row 3, column 'a': '' is not a finite number"),
        ("a,y\n1,1\nnan,2\n", r"row 3, column 'a': 'nan' is not a finite number"),
        ("a,y\n1,1\n2,\n", r"row 3, column 'y' is empty"),
        ("a,y\n1,1\n2,3,4\n", r"row 3 has 3 cells, the header 2"),
        ("a,y\n1,u\n2,v\n3,w\n", r"column 'y' has 3 different values in 3 rows"),
        ("a,y\n1,1.5\n2,inf\n", r"row 3, column 'y': 'inf' is not a finite number"),
        ("a,y\n1,1.5\n2,2.5\n3,12.5x\n", r"row 4, column 'y': '12\.5x' is not a number, as 2 of its 3 cells"),
        ("a,y\n1,0\n2,NA\n3,?\n4,1\n", r"row 3, column 'y': 'NA' is not a number, as 2 of its 4 cells are"),
        ("a,y\n1,?\n2,nan\n3,2.5\n", r"row 2, column 'y': '\?' is not a number"),
        ('a,y\n1,u\n2,"v\n3,u\n4,v\n', r"t\.csv: row 3 cannot be read as CSV: a quote is not closed"),
        ('a,y\n1,"u\n"x\n2,v\n', r"t\.csv: row 2 cannot be read as CSV: ',' expected after"),
        ('a,y\n1,u\n"2\n",v\nx,v\n', r"row 5, column 'a': 'x' is not a finite number"),
        ('a,y\n1,u\n"x\n",v\n2,v\n', r"row 3, column 'a': 'x\\n' is not a finite number"),
        ("a;y\n1;2\n2;3\n", r"unknown column 'y'; .*: is it separated by semicolons\? it must be by commas"),
        ("a\ty\n1\t2\n2\t3\n", r"unknown column 'y'; .*: is it separated by tabs\?"),
    ],
)
def test_what_is_wrong_with_a_csv_file_is_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(csv(tmp_path, text), "y")
    assert "\n" not in str(caught.value)
    read.cache_clear()


def test_classes_may_have_numbers_among_their_names(tmp_path):
    table = read(csv(tmp_path, "a,y\n" + "1,u\n2,v\n3,3\n" * 4), "y")
    assert (table.classes, table.labels) == (3, ("3", "u", "v"))
    file = tmp_path / "whole.csv"
    file.write_text("a,y\n" + "1,1\n2,2.0\n3,-1\n" * 4)
    assert read(str(file), "y").labels == ("-1", "1", "2")


def test_the_ending_of_a_file_may_be_in_capitals(tmp_path):
    file = tmp_path / "TABLE.Csv"
    file.write_text("a,y\n" + "1,u\n2,v\n" * 4)
    assert built("task", "features", data=str(file), target="y", n=1, k=1).classes == 2


def test_a_target_that_is_the_same_in_all_held_out_rows_is_refused(tmp_path):
    file = tmp_path / "rare.csv"
    file.write_text("a,y\n" + "\n".join(f"{i},{1.5 * (i == 0)}" for i in range(40)))
    task = Features(n=1, k=1, data=str(file), target="y")
    with pytest.raises(
        ValueError, match=r"rare\.csv: the target is the same in every held-out row \(of 12\)"
    ):
        case(task, seeds=range(8))
    assert case(task, seeds=range(8), clean=False)[1].target.isfinite().all()
    with pytest.raises(ValueError, match=r"linear: the target is the same in every held-out row \(of 1\)"):
        case(LINEAR, rows=1)


def test_a_missing_target_column_gets_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"unknown column 'prize'; did you mean price\?"):
        read(csv(tmp_path, "price,a\n1,1\n2,2\n"), "prize")
