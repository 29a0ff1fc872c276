import dataclasses

import numpy as np
import pytest
import torch
from conftest import built
from sklearn.datasets import load_digits

from topkbench.choices import ConfigError
from topkbench.evaluate import evaluate, hard_loss
from topkbench.methods import Hard
from topkbench.operators import hard_mask
from topkbench.optimizers import Adam
from topkbench.randomness import Normals
from topkbench.step import gradients
from topkbench.tasks import Learns
from topkbench.tasks._digits_binary import halves
from topkbench.train import Logging, Training, train


def case(rows=30, clean=False, seeds=(0, 1, 2), learned=None, **changes):
    task = built("task", "autoencoder", **changes)
    normals = Normals(list(seeds), dtype=torch.float64)
    teacher = task.teacher(normals.child("teacher"))
    W = task.start(normals.child("start"))
    others = task.others(teacher, normals.child("others"), W) if learned is None else learned(teacher)
    batch = task.sample(teacher, normals.child("x"), rows, clean=clean)
    return task, dataclasses.replace(batch, learned=others), W, normals


def numpy_loss(task, W, D, b, x, weight=0.0):
    """One replicate, a row at a time."""
    D = D / np.linalg.norm(D, axis=1, keepdims=True)
    q = x @ W.T + b
    kept = np.argsort(-q, axis=1)[:, : task.k]
    dead = np.array([i for i in range(task.n) if i not in kept], dtype=int)
    most = max(1, task.d // 2)
    losses = []
    for row in range(len(x)):
        error = x[row] - q[row, kept[row]] @ D[kept[row]]
        losses.append(error @ error / 2)
        if weight and len(dead):
            best = dead[np.argsort(-q[row, dead])[:most]]
            rest = error - q[row, best] @ D[best]
            losses[-1] += weight * min(1, len(dead) / most) * (rest @ rest) / 2
    return np.array(losses)


@pytest.mark.parametrize(("auxiliary", "rows"), [(0.0, 30), (0.5, 2), (0.5, 60)])
def test_the_loss_is_that_of_the_definition(auxiliary, rows):
    task, batch, W, normals = case(rows, n=9, auxiliary=auxiliary)
    D = 2.5 * batch.learned["D"]  # its length does not matter
    b = 0.3 * normals("b", 9)
    losses = hard_loss(task, W, dataclasses.replace(batch, learned={"D": D, "b": b}))
    for r in range(3):
        given = (each[r].numpy() for each in (W, D, b, batch.x))
        expected = numpy_loss(task, *given, auxiliary)
        np.testing.assert_allclose(losses[r].numpy(), expected, rtol=1e-12)


def test_the_planted_dictionary_is_perfect_where_its_atoms_are_independent():
    def learned(teacher):
        return {"D": teacher["D"], "b": torch.zeros_like(teacher["D"][..., 0])}

    task, batch, _, normals = case(200, clean=True, n=5, d=6, k=2, learned=learned)
    columns = evaluate(Hard(), task, batch.teacher["W"], batch, normals)
    for name, perfect in {"hard_loss": 0, "fvu": 0, "dead": 0, "recovery": 1, "found": 1}.items():
        torch.testing.assert_close(columns[name], torch.full((3,), float(perfect)).double())


def test_another_dictionary_is_not():
    task, batch, W, normals = case(200, clean=True, n=5, d=6, k=2)
    columns = evaluate(Hard(), task, W, batch, normals)
    assert (columns["fvu"] > 0.3).all()
    assert (columns["recovery"] < 0.9).all()


def test_a_planted_row_is_k_atoms_and_noise_in_training_alone():
    _, batch, _, _ = case(500, clean=True, n=5, d=6, k=2)
    codes = batch.x @ batch.teacher["W"].mT
    assert ((codes.abs() > 1e-9).sum(-1) == 2).all()
    active = codes[codes.abs() > 1e-9]
    assert 0.5 <= active.min() < 0.55
    assert 1.45 < active.max() <= 1.5
    _, noisy, _, _ = case(500, n=5, d=6, k=2, noise=0.1)
    noise = noisy.x - batch.x
    assert abs(noise.std().item() - 0.1) < 0.005


def test_a_dead_atom_gets_no_hard_gradient_and_the_auxiliary_term_gives_it_one():
    for auxiliary in (0.0, 0.1):
        task, batch, W, normals = case(3, n=20, auxiliary=auxiliary)
        dead = hard_mask(task.scores(W, batch), task.k).sum(1) == 0
        assert dead.any(1).all()
        _, grads = gradients(Hard(), task, {"W": W, **batch.learned}, batch, normals)
        for grad in grads.values():
            touched = (grad != 0).reshape(3, 20, -1).any(-1)
            assert touched[~dead].all()
            assert touched[dead].any() == bool(auxiliary)


def test_the_auxiliary_term_moves_dead_atoms_alone_and_is_not_evaluated():
    task, batch, W, normals = case(3, n=20, auxiliary=0.1)
    plain = dataclasses.replace(task, auxiliary=0.0)
    both, without = (
        gradients(Hard(), task, {"W": W, **batch.learned}, dataclasses.replace(batch, given=given), normals)[
            1
        ]
        for given in (batch.given, {})
    )
    living = hard_mask(task.scores(W, batch), task.k).sum(1) > 0
    torch.testing.assert_close(both["W"][living], without["W"][living], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(both["D"][living], without["D"][living], rtol=1e-12, atol=1e-15)
    held_out = case(30, clean=True, n=20, auxiliary=0.1)[1]
    assert torch.equal(hard_loss(task, W, held_out), hard_loss(plain, W, held_out))


def test_samples_in_front():
    task, batch, W, _ = case(auxiliary=0.1, n=20)
    scores = task.scores(W, batch)
    masks = torch.rand(4, 2, *scores.shape, dtype=torch.float64)
    losses = task.loss(masks, scores, batch)
    assert losses.shape == (4, 2, 3, 30)
    torch.testing.assert_close(losses[3, 1], task.loss(masks[3, 1], scores, batch))


def test_digits_are_split_without_leakage():
    train_rows, held_out = halves(torch.float64, torch.device("cpu"))
    assert (len(train_rows), len(held_out)) == (1257, 540)
    every = torch.as_tensor(load_digits().data) / 16
    assert torch.equal(every.sort(0).values, torch.cat([train_rows, held_out]).sort(0).values)
    _, batch, _, _ = case(2000, d=64, data="digits")
    mean = train_rows.mean(0)
    seen = {tuple(row) for row in (batch.x + mean).flatten(0, 1).mul(16).round().int().tolist()}
    assert seen <= {tuple(row) for row in train_rows.mul(16).round().int().tolist()}
    assert not seen & {tuple(row) for row in held_out.mul(16).round().int().tolist()}
    test = case(2000, clean=True, d=64, data="digits")[1]
    assert test.x.shape == (3, 540, 64)
    torch.testing.assert_close(test.x[1] + mean, held_out)
    assert not torch.equal(batch.x[0], batch.x[1])


def test_fvu_of_digits_is_a_share_of_their_variance():
    task, test, W, normals = case(540, clean=True, d=64, n=70, k=3, data="digits")
    columns = evaluate(Hard(), task, W, test, normals)
    assert set(columns) == {"hard_loss", "relaxed_loss", "fvu", "dead"}
    variance = test.x[0].var(0, correction=0).sum()
    torch.testing.assert_close(columns["fvu"], 2 * columns["hard_loss"] / variance)


def trained(method, steps=300, **changes):
    task = built("task", "autoencoder", **{"n": 24, "d": 16, "k": 2, **changes})
    result = train(
        built("method", method), task, Adam(0.01), range(3), Training(steps, 32), Logging(2, 0, 512)
    )
    return result.points[0][2], result.points[-1][2]


def test_straight_through_finds_more_of_the_dictionary_than_the_hard_gradient():
    assert isinstance(built("task", "autoencoder"), Learns)
    before, hard = trained("hard", 600, n=48)
    _, through = trained("ste_sparsemax", 600, n=48)
    assert (hard["fvu"] < 0.4 * before["fvu"]).all()
    assert (through["fvu"] < hard["fvu"]).all()
    assert through["recovery"].mean() > hard["recovery"].mean() + 0.01
    assert through["dead"].mean() < hard["dead"].mean() - 0.1


def test_w_and_d_start_as_the_same_unit_vectors_and_the_bias_at_0():
    _, batch, W, _ = case()
    torch.testing.assert_close(W.norm(dim=-1), torch.ones(3, 6).double())
    assert torch.equal(batch.learned["D"], W)
    assert not batch.learned["b"].any()


def test_digits_are_learned():
    before, after = trained("hard", 100, n=64, d=64, k=8, data="digits")
    assert (after["fvu"] < 0.6 * before["fvu"]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, r"n must be >= 1, got 0"),
        ({"d": 0}, r"d must be >= 1, got 0"),
        ({"k": 7}, r"k must be in \[1, n\] = \[1, 6\], got 7"),
        ({"data": "digits"}, r"d must be 64 for digits, got 5"),
        ({"noise": -1.0}, r"noise must be >= 0 and finite, got -1\.0"),
        ({"auxiliary": float("inf")}, r"auxiliary must be >= 0 and finite, got inf"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(built("task", "autoencoder"), **change)


def test_an_unknown_kind_of_data_is_refused():
    with pytest.raises(ConfigError, match=r"data must be .*digits.*, got 'faces'"):
        built("task", "autoencoder", data="faces")
