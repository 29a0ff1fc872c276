import numpy as np
import pytest
import torch
from scipy import stats

from topkbench.randomness import AHEAD, Normals, Repeated


def test_draws_do_not_depend_on_the_other_replicates():
    together = Normals([3, 7, 11])("x", 4, 5)
    alone = Normals([7])("x", 4, 5)
    assert torch.equal(together[1:2], alone)


def test_draws_do_not_depend_on_how_many_are_made_at_once():
    one_by_one = Normals([0, 1])
    singles = torch.stack([one_by_one("x", 3) for _ in range(7)])
    pieces = Normals([0, 1])
    chunks = torch.cat([pieces.take(2, "x", 3), pieces.take(5, "x", 3)])
    assert torch.equal(singles, chunks)


def test_draws_do_not_depend_on_the_size_of_the_store(monkeypatch):
    far_ahead = torch.stack([(normals := Normals([5]))("x", 2)] + [normals("x", 2) for _ in range(9)])
    monkeypatch.setattr("topkbench.randomness.AHEAD", 1)
    assert AHEAD > 1
    step_by_step = torch.stack([(normals := Normals([5]))("x", 2)] + [normals("x", 2) for _ in range(9)])
    assert torch.equal(far_ahead, step_by_step)


@pytest.mark.parametrize(
    "other",
    [
        lambda n: n("y", 4),
        lambda n: n.child("a")("x", 4),
        lambda n: n.child(4)("x", 4),
        lambda n: n("x", 4, 1).flatten(1),
    ],
    ids=["name", "word", "number", "shape"],
)
def test_every_purpose_is_a_stream_of_its_own(other):
    normals = Normals([0])
    assert not torch.isclose(normals("x", 4), other(Normals([0])), rtol=0, atol=1e-6).any()


def test_a_child_starts_again_and_its_parent_goes_on():
    normals = Normals([0])
    first = normals.child("a")("x", 3)
    assert torch.equal(normals.child("a")("x", 3), first)
    assert not torch.equal(normals("x", 3), normals("x", 3))


def test_copies_are_the_draws_in_turn():
    copies = Repeated(Normals([0, 1]), 3)("x", 4)
    assert torch.equal(copies, Normals([0, 1]).take(3, "x", 4).flatten(0, 1))


def test_float64_sees_the_numbers_of_float32():
    wide, narrow = (Normals([0], dtype=dtype)("x", 9) for dtype in (torch.float64, torch.float32))
    assert wide.dtype == torch.float64
    assert torch.equal(wide, narrow.double())


def test_they_are_standard_normal_and_replicates_are_uncorrelated():
    draws = Normals(range(2))("x", 20_000).numpy()
    assert stats.kstest(draws[0], "norm").pvalue > 1e-3
    assert abs(np.corrcoef(draws)[0, 1]) < 4 / np.sqrt(20_000)
