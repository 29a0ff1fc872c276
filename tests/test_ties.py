"""Which pairs tie: found row by row, in passes over tensors, and one by one in plain Python."""

import itertools
import math

import pytest
import torch

from topkbench.methods import Oracle, _ties
from topkbench.methods._ties import Pairs, Ties
from topkbench.randomness import Normals
from topkbench.step import gradient
from topkbench.tasks import Gate, Mask

ROUTES = ["by row", "in passes"]
N, D = 12, 4
KS = [1, 2, 5, N - 2, N - 1]


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    """Each way to find ties in turn."""
    if request.param == "in passes":
        monkeypatch.setattr(_ties, "_compiled", lambda: None)
    else:
        assert _ties._compiled() is not None  # Numba comes with the tests
    return request.param


def draw(dtype=torch.float64, replicates=3, rows=7):
    W, x = (Normals(list(range(replicates)), dtype=dtype)(*shape) for shape in (("W", N, D), ("x", rows, D)))
    return W, x


def found(W, x, k, near):
    blocks, find = Pairs(W, near).search(x, k)
    return Ties(*(torch.cat(parts) for parts in zip(*map(find, blocks), strict=True)))


def one_by_one(W, x, k, near):
    """`(replicate, row, i, j)`, i below j, to the mask with i, where they tie, and |w_i - w_j|."""
    ties = {}
    for r, row in itertools.product(range(len(W)), range(x.shape[1])):
        for i, j in itertools.combinations(range(N), 2):
            difference = W[r, i] - W[r, j]
            distance = difference @ x[r, row] / difference.norm()
            if distance.abs() >= near:
                continue
            there = x[r, row] - distance * difference / difference.norm()
            scores = W[r] @ there
            above = [m for m in range(N) if m not in (i, j) and scores[m] > scores[i]]
            if len(above) == k - 1:
                ties[r, row, i, j] = ({*above, i}, there, difference.norm())
    return ties


@pytest.mark.parametrize("near", [0.1, 0.7, math.inf])
@pytest.mark.parametrize("k", KS)
def test_all_that_tie_are_found(route, k, near):
    W, x = draw()
    ties, expected = found(W, x, k, near), one_by_one(W, x, k, near)
    assert expected
    assert (ties.replicate.diff() >= 0).all()
    seen = set()
    for r, row, i, j, with_i, with_j, there, direction, length in zip(*ties, strict=True):
        r, row, i, j = (int(each) for each in (r, row, i, j))
        mask, at, apart = expected[r, row, min(i, j), max(i, j)]
        seen.add((r, row, min(i, j), max(i, j)))
        others = mask - {min(i, j)}
        assert set(with_i.nonzero().flatten().tolist()) == {*others, i}
        assert set(with_j.nonzero().flatten().tolist()) == {*others, j}
        torch.testing.assert_close(there, at)
        torch.testing.assert_close(length, apart)
        torch.testing.assert_close(direction * length, W[r, i] - W[r, j])
    assert seen == set(expected)
    assert len(ties.row) == len(expected)


@pytest.mark.parametrize("near", [0.2, math.inf])
def test_blocks_do_not_change_the_flux(route, near, monkeypatch):
    task, normals = Mask(8, 5, 3), Normals([0, 1, 2], dtype=torch.float64)
    teacher, W = task.teacher(normals.child("teacher")), task.start(normals.child("start"))
    batch = task.sample(teacher, normals, 40)
    whole = gradient(Oracle(near), task, W, batch, normals)[1]
    for most in (10, 100, 3000):
        monkeypatch.setattr(_ties, "PIECE", most)
        monkeypatch.setattr(_ties, "MASKS", most)
        torch.testing.assert_close(gradient(Oracle(near), task, W, batch, normals)[1], whole)


def test_threads_do_not_change_the_flux(route, monkeypatch):
    task, normals = Gate(8, 5, 3), Normals([0, 1, 2], dtype=torch.float64)
    teacher, W = task.teacher(normals.child("teacher")), task.start(normals.child("start"))
    batch = task.sample(teacher, normals, 40)
    monkeypatch.setattr(_ties, "PIECE", 500)
    monkeypatch.setattr(_ties, "MASKS", 500)
    alone = gradient(Oracle(), task, W, batch, normals)[1]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = gradient(Oracle(), task, W, batch, normals)[1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)


def test_single_precision_finds_the_same_but_for_rounding(route):
    W, x = draw(rows=300)
    precise, ours = found(W, x, 3, 0.5), found(W.float(), x.float(), 3, 0.5)
    assert {part.dtype for part in ours[4:]} == {torch.float32}
    pairs = [
        {tuple(sorted(tie[2:])) + tie[:2] for tie in zip(*(part.tolist() for part in ties[:4]), strict=True)}
        for ties in (precise, ours)
    ]
    assert len(pairs[0] ^ pairs[1]) <= 0.001 * len(pairs[0])
