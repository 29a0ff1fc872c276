import resource
from dataclasses import dataclass

import pytest
import torch
from conftest import PAIRS, built

from topkbench.gradients import Sampling, measure
from topkbench.randomness import Normals
from topkbench.step import gradient


def at(task, seeds=(0, 1)):
    normals = Normals(list(seeds), dtype=torch.float64)
    teacher = task.teacher(normals.child("teacher"))
    return task.start(normals.child("start")), teacher, normals.child("gradients", 0)


@dataclass(frozen=True)
class Noisy:
    """A gradient with normal noise of a known size added to every row of x."""

    size: float
    stochastic = True

    def __call__(self, step):
        noise = step.noise("noise", *step.scores.shape[1:])
        return (step.scores * self.size * noise).sum(-1)


def by_hand(method, task, W, teacher, normals, batch, samples):
    """All gradients side by side, then the textbook formulas."""
    grads = torch.stack(
        [
            gradient(method, task, W, task.sample(teacher, data, batch), data)[1]
            for data in [normals.child("data")]
            for _ in range(samples)
        ]
    )
    mean = grads.mean(0)
    total = (grads - mean).square().sum((0, 2, 3)) / (samples - 1)
    power = mean.square().sum((1, 2))
    return power.sqrt(), total, (power - total / samples).clamp(min=0) / total


@pytest.mark.parametrize(
    ("method", "task"), [pair for pair in PAIRS if not built("method", pair[0]).stochastic]
)
def test_the_streamed_statistics_are_the_textbooks(method, task, monkeypatch):
    method, task = built("method", method), built("task", task)
    W, teacher, normals = at(task)
    monkeypatch.setattr(
        "topkbench.step.BUDGET", 2 * 2 * 4 * task.n * (task.k if task.wants == "values" else 1)
    )
    columns = measure(method, task, W, teacher, normals, Sampling(4, 7))  # in pieces of 2, 2, 2, 1
    norm, total, snr = by_hand(method, task, W, teacher, normals, 4, 7)
    torch.testing.assert_close(columns["grad_norm"], norm)
    torch.testing.assert_close(columns["grad_variance"], total)
    torch.testing.assert_close(columns["grad_snr"], snr, equal_nan=True)
    assert torch.equal(columns["grad_variance_data"], columns["grad_variance"])
    assert (columns["grad_variance_method"] == 0).all()


def test_the_hard_gradient_of_gate_does_not_vary():
    task = built("task", "gate")
    W, teacher, normals = at(task)
    columns = measure(built("method", "hard"), task, W, teacher, normals, Sampling(8, 5))
    assert columns["grad_norm"].tolist() == columns["grad_variance"].tolist() == [0, 0]
    assert columns["grad_snr"].isnan().all()


def test_the_variance_is_split_by_its_source():
    """g = size * sum_b noise_b x_b^T / B: given x, its variance is the method's, and there is no other."""
    task = built("task", "mask")
    W, teacher, normals = at(task)
    samples, batch, size = 4000, 8, 0.7
    columns = measure(Noisy(size), task, W, teacher, normals, Sampling(batch, samples))
    expected = size**2 * task.n * task.d / batch
    # Standard errors of a few per cent of the whole at M = 4000: 5 of them.
    for name, value in (("grad_variance", expected), ("grad_variance_method", expected)):
        assert columns[name].tolist() == pytest.approx([value] * 2, rel=5 * (2 / samples) ** 0.5)
    assert (columns["grad_variance_data"].abs() < 5 * 2 * expected / samples**0.5).all()


def test_both_sources_at_once():
    @dataclass(frozen=True)
    class Both(Noisy):
        def __call__(self, step):
            return super().__call__(step) + step.scores.sum(-1)

    task = built("task", "mask")
    W, teacher, normals = at(task)
    samples, batch, size = 4000, 8, 0.7
    columns = measure(Both(size), task, W, teacher, normals, Sampling(batch, samples))
    method, data = size**2 * task.n * task.d / batch, task.n * task.d / batch
    assert columns["grad_variance_method"].tolist() == pytest.approx([method] * 2, rel=0.1)
    assert columns["grad_variance_data"].tolist() == pytest.approx([data] * 2, rel=0.15)


def test_it_does_not_depend_on_the_pieces(monkeypatch):
    task = built("task", "mask", noise=0.1)
    W, teacher, _ = at(task)
    whole, single = (Normals([0, 1], ("gradients", 0), dtype=torch.float64) for _ in range(2))
    expected = measure(Noisy(1.0), task, W, teacher, whole, Sampling(4, 9))
    monkeypatch.setattr("topkbench.step.BUDGET", 1)
    for name, column in measure(Noisy(1.0), task, W, teacher, single, Sampling(4, 9)).items():
        torch.testing.assert_close(column, expected[name])


def test_a_thousand_samples_take_no_more_memory_than_ten():
    task = built("task", "values", n=64, d=32, k=8)
    normals = Normals(range(8))
    teacher, W = task.teacher(normals.child("t")), task.start(normals.child("s"))
    measure(built("method", "hard"), task, W, teacher, normals.child("a"), Sampling(32, 64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measure(built("method", "hard"), task, W, teacher, normals.child("b"), Sampling(32, 1000))
    # All of them side by side would be 1000 * 8 * 64 * 32 floats = 65 MB for the gradients alone.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB


def test_one_sample_has_no_variance():
    task = built("task", "mask")
    W, teacher, normals = at(task)
    with pytest.raises(ValueError, match=r"the variance of a gradient needs at least 2 samples, got 1"):
        measure(built("method", "hard"), task, W, teacher, normals, Sampling(4, 1))
