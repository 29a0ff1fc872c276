"""The statistics of a gradient against their definitions, and that they notice a gradient that is wrong."""

from dataclasses import dataclass

import pytest
import torch

from topkbench.gradients import Sampling, Truth, measure, true_gradient
from topkbench.methods import Oracle, Relaxed
from topkbench.operators import entropic
from topkbench.randomness import Normals
from topkbench.step import gradient
from topkbench.tasks import Gate


@dataclass(frozen=True)
class Scaled:
    """The oracle, wrong by a factor."""

    factor: float
    stochastic = False

    def __call__(self, step):
        return self.factor * Oracle()(step)


def setting(seeds=(0, 1, 2), error=0.02):
    task = Gate(6, 4, 2)
    normals = Normals(list(seeds), dtype=torch.float64)
    teacher, W = task.teacher(normals.child("t")), task.start(normals.child("s"))
    return task, teacher, W, normals, true_gradient(task, W, teacher, normals.child("truth"), error)


@pytest.mark.parametrize("factor", [-1.0, 1.1, 0.9])
def test_a_wrong_gradient_is_caught(factor):
    """A sign or a tenth: the bias is above 4 standard errors, and as large as it must be."""
    task, teacher, W, normals, truth = setting(error=0.015)
    columns = measure(Scaled(factor), task, W, teacher, normals.child("m"), Sampling(64, 1000), truth=truth)
    assert (columns["rel_bias2"] > 4 * columns["rel_bias2_se"]).all()
    off = (columns["rel_bias2"] - (factor - 1) ** 2).abs()
    assert (off < 4 * columns["rel_bias2_se"]).all()


def test_a_gradient_that_is_not_a_number_is_not_a_bad_one():
    """Or a broken method would look like a useless one."""

    @dataclass(frozen=True)
    class Broken:
        stochastic = False

        def __call__(self, step):
            return step.scores.sum(-1) * torch.nan

    task, teacher, W, normals, truth = setting(error=1.0)
    columns = measure(Broken(), task, W, teacher, normals.child("m"), Sampling(4, 4), truth=truth)
    assert columns["rho"].isnan().all()
    assert columns["cos_sample"].isnan().all()


def test_every_column_is_its_definition():
    task, teacher, W, normals, truth = setting()
    method, sampling = Relaxed(entropic, 0.5), Sampling(8, 40)
    columns = measure(method, task, W, teacher, normals.child("m"), sampling, truth=truth)
    data = normals.child("m").child("data")
    g = torch.stack(
        [gradient(method, task, W, task.sample(teacher, data, 8), data)[1].flatten(1) for _ in range(40)]
    )
    star, v = truth.mean.flatten(1), truth.variance
    mean, inner = g.mean(0), (g * truth.mean.flatten(1)).sum(-1)
    S2 = (g - mean).square().sum((0, 2)) / 39
    power = star.square().sum(1) - v
    bias2 = (mean - star).square().sum(1) - S2 / 40 - v
    groups = inner.unflatten(0, (10, 4)).mean(1)
    spread = (groups - inner.mean(0)).square().sum(0) / 90
    expected = {
        "grad_variance": S2,
        "true_norm": power.sqrt(),
        "grad_bias2": bias2,
        "grad_mse": bias2 + S2,
        "rel_bias2": bias2 / power,
        "rel_variance": S2 / power,
        "cos_mean": inner.mean(0) / ((mean.square().sum(1) - S2 / 40) * power).sqrt(),
        "cos_sample": (inner / (g.norm(dim=-1) * star.norm(dim=1))).mean(0),
        "rho": (inner.mean(0).square() - spread) / (power * g.square().sum(-1).mean(0)),
    }
    for name, value in expected.items():
        torch.testing.assert_close(columns[name], value, msg=name)


def test_standard_errors_are_those_of_repetition():
    """200 replicates of one W: the spread of each statistic is what its own standard error says."""
    task = Gate(4, 3, 2)
    normals = Normals(range(200), dtype=torch.float64)
    one = Normals([7], dtype=torch.float64)
    teacher = {name: part.expand(200, *part.shape[1:]) for name, part in task.teacher(one.child("t")).items()}
    W = task.start(one.child("s")).expand(200, 4, 3).contiguous()
    exact = true_gradient(task, W[:1], {n: p[:1] for n, p in teacher.items()}, one, 0.004).mean
    truth = Truth(exact.expand(1, 200, 4, 3))
    method = Relaxed(entropic, 0.5)
    columns = measure(method, task, W, teacher, normals, Sampling(8, 200), truth=truth)
    for name in ("grad_norm", "grad_variance", "rel_bias2", "rel_mse", "cos_mean", "cos_sample", "rho"):
        spread, told = columns[name].std(), columns[f"{name}_se"].square().mean().sqrt()
        assert 0.75 < told / spread < 1.35, (name, told, spread)


def test_a_replicates_truth_does_not_depend_on_the_others():
    task, teacher, W, _, truth = setting(error=0.05)
    alone = Normals([1], dtype=torch.float64)
    own = true_gradient(
        task, W[1:2], {name: part[1:2] for name, part in teacher.items()}, alone.child("truth"), 0.05
    )
    torch.testing.assert_close(own.blocks, truth.blocks[:, 1:2])


def test_a_truth_does_not_depend_on_the_threads():
    task, teacher, W, normals, _ = setting(error=1.0)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(true_gradient(task, W, teacher, normals.child("threads"), 0.1, rows=2000).blocks)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("rows", [100, 1000])
def test_a_truth_draws_no_more_rows_than_it_may(rows):
    task, teacher, W, normals, _ = setting(error=1.0)
    few = true_gradient(task, W, teacher, normals, error=1e-9, rows=rows)
    assert (few.error > 1e-9).all()
    task, teacher, W, normals, _ = setting(error=1.0)
    again = true_gradient(task, W, teacher, normals, error=1e-9, rows=rows)
    torch.testing.assert_close(few.blocks, again.blocks)
    drawn = []

    class Counting(Gate):
        def sample(self, teacher, noise, rows, clean=False):
            drawn.append(rows)
            return super().sample(teacher, noise, rows, clean)

    counting = Counting(task.n, task.d, task.k)
    true_gradient(counting, W, teacher, normals, error=1e-9, rows=rows)
    assert sum(drawn) == rows


def test_training_and_standing_keep_to_the_rows_of_a_truth():
    from topkbench.gradients import measure_at
    from topkbench.optimizers import SGD
    from topkbench.train import Logging, Training, train

    task, settings = Gate(6, 4, 2), {"truth": 1e-9, "truth_rows": 100}
    result = train(Oracle(), task, SGD(0.1), [0], Training(1, 4), Logging(2, 2, 8, **settings))
    assert all("rho" in columns for _, _, columns in result.points)
    points = []
    measure_at(Oracle(), task, Normals([0]), [0.0], Sampling(4, 2), points, error=1e-9, rows=100)
    assert points[0][2]["true_error"].item() > 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0, "samples": 4}, r"batch must be >= 1, got 0"),
        ({"batch": 4, "samples": 1}, r"the variance of a gradient needs at least 2 samples, got 1"),
    ],
)
def test_what_cannot_be_sampled(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)


@pytest.mark.parametrize(("options", "message"), [((0.0,), "error must be > 0"), ((0.1, 0), "rows must be")])
def test_what_cannot_be_a_truth(options, message):
    task, teacher, W, normals, _ = setting(error=1.0)
    with pytest.raises(ValueError, match=message):
        true_gradient(task, W, teacher, normals, *options)
