"""The boundary flux against central differences of the mean hard loss, and against an exact integral."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from conftest import built

from topkbench.config import IncompatibleError, misfit
from topkbench.evaluate import hard_loss
from topkbench.gradients import Sampling, measure, true_gradient
from topkbench.methods import Hard, Oracle, Swap
from topkbench.randomness import Normals
from topkbench.step import gradient
from topkbench.tasks import Gate, Mask, Values

SIZES = [(2, 3, 1), (6, 4, 2), (8, 5, 3), (16, 6, 5), (5, 2, 4)]


@dataclass(frozen=True)
class Cube(Gate):
    """`gate` with x uniform on the cube [-1, 1]^d: its density along a line is 1 over the chord's length."""

    def sample(self, teacher, noise, rows, clean=False):
        x = torch.erf(super().sample(teacher, noise, rows, clean).x / math.sqrt(2))
        return dataclasses.replace(
            super().sample(teacher, noise, 1), x=x, target=self.target(x @ teacher["W"].mT, teacher)
        )

    def line_density(self, x, direction):
        ends = torch.stack([(side - x) / direction for side in (-1, 1)])
        chord = ends.amax(0).amin(-1) - ends.amin(0).amax(-1)  # < 0: the line misses the cube
        return torch.where((chord > 0) & (x.abs() <= 1).all(-1), 1 / chord, 0)

    def line_mass(self, x, direction, near):
        ends = torch.stack([(side - x) / direction for side in (-1, 1)])
        low, high = ends.amin(0).amax(-1), ends.amax(0).amin(-1)
        return (high.clamp(max=near) - low.clamp(min=-near)) / (high - low)


class Unknown(Gate):
    """Of its x nothing is known."""

    moved = None


def ends(task, seeds=(0, 1, 2)):
    normals = Normals(list(seeds), dtype=torch.float64)
    teacher = task.teacher(normals.child("teacher"))
    return teacher, 2 * task.start(normals.child("start")), normals


def along(task, method, teacher, W, direction, normals, batches=20, rows=1000):
    """The mean of a method's gradient along a direction, with its standard error."""
    drawn = (task.sample(teacher, normals, rows) for _ in range(batches))
    grads = [gradient(method, task, W, batch, normals)[1] for batch in drawn]
    values = torch.stack([(grad * direction).sum((1, 2)) for grad in grads])
    return values.mean(0), values.std(0) / batches**0.5


def by_differences(task, teacher, W, direction, normals, batches=20, rows=20000, h=5e-3):
    """Central differences of the mean hard loss on the same rows, with their standard error."""
    values = []
    for _ in range(batches):
        batch = task.sample(teacher, normals, rows)
        high, low = (hard_loss(task, W + sign * h * direction, batch).mean(-1) for sign in (1, -1))
        values.append((high - low) / (2 * h))
    values = torch.stack(values)
    return values.mean(0), values.std(0) / batches**0.5


@pytest.mark.parametrize(("n", "d", "k"), SIZES)
@pytest.mark.parametrize(
    ("kind", "near"),
    [(Gate, math.inf), (Mask, math.inf), (Cube, math.inf), (Gate, 0.3), (Cube, 0.3), (Cube, 1.5)],
)
def test_the_oracle_is_the_derivative_of_the_mean_hard_loss(kind, near, n, d, k):
    task = kind(n, d, k, **({"noise": 0.3} if kind is Mask else {}))
    teacher, W, normals = ends(task)
    direction = normals.child("direction")("D", n, d)
    ours, error = along(task, Oracle(near), teacher, W, direction, normals.child("a"))
    theirs, other = by_differences(task, teacher, W, direction, normals.child("b"))
    z = (ours - theirs) / (error.square() + other.square()).sqrt()
    assert (z.abs() < 4).all(), z


def test_the_hard_gradient_of_mask_is_not():
    """So the test above can fail: the same comparison without the flux."""
    task = Mask(8, 5, 3)
    teacher, W, normals = ends(task)
    direction = normals.child("direction")("D", 8, 5)
    ours, error = along(task, Hard(), teacher, W, direction, normals.child("a"))
    theirs, other = by_differences(task, teacher, W, direction, normals.child("b"))
    assert ((ours - theirs).abs() / (error.square() + other.square()).sqrt()).max() > 6


def test_two_scores_of_which_one_is_kept_are_an_angle():
    """n = 2, k = 1 on `gate`: F is a multiple of the angle between w_1 - w_2 and that of the teacher.

    With u = w_1 - w_2, the loss is (c_1^2 + c_2^2) / 2 where u x and u* x differ in sign, which has
    probability angle(u, u*) / pi: F = (c_1^2 + c_2^2) angle / (2 pi), and dF/dw_1 = -dF/dw_2 by one line.
    """
    task = Gate(2, 4, 1)
    teacher, W, normals = ends(task)
    leaf = W.clone().requires_grad_()
    u, v = (w[:, 0] - w[:, 1] for w in (leaf, teacher["W"]))
    angle = torch.acos(torch.nn.functional.cosine_similarity(u, v, dim=-1))
    exact = torch.autograd.grad((teacher["c"].square().sum(-1) * angle / (2 * math.pi)).sum(), leaf)[0]
    truth = true_gradient(task, W, teacher, normals, error=0.02)
    assert (truth.error <= 0.02).all()
    distance = (truth.mean - exact).flatten(1).norm(dim=1)
    assert (distance < 3 * truth.variance.sqrt()).all()


@pytest.mark.parametrize("kind", [Gate, Mask, Values])
def test_the_oracle_has_no_bias(kind):
    """Against a truth from other rows: the mean over replicates within 3 standard errors."""
    task = kind(6, 4, 2)
    teacher, W, normals = ends(task, range(4))
    truth = true_gradient(task, W, teacher, normals.child("truth"), error=0.02)
    for method in (Oracle(), Hard()) if kind is Values else (Oracle(),):
        columns = measure(method, task, W, teacher, normals.child("m"), Sampling(32, 500), truth=truth)
        bias, error = columns["rel_bias2"], columns["rel_bias2_se"]
        assert bias.sum().abs() < 3 * error.square().sum().sqrt()
        assert (bias.abs() < 5 * error).all()  # of a jackknife with 10 blocks: as rare as 3 of many
        assert (columns["cos_mean"] > 0.95).all()


def test_hard_on_gate_is_all_bias():
    task = Gate(6, 4, 2)
    teacher, W, normals = ends(task)
    truth = true_gradient(task, W, teacher, normals.child("truth"), error=0.02)
    columns = measure(Hard(), task, W, teacher, normals.child("m"), Sampling(8, 10), truth=truth)
    torch.testing.assert_close(columns["rel_bias2"], torch.ones(3, dtype=torch.float64), rtol=1e-12, atol=0)
    assert columns["rho"].tolist() == columns["grad_variance"].tolist() == [0, 0, 0]
    assert columns["grad_zero_rows"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("k", [1, 3, 4])
def test_the_flux_is_that_of_every_pair_looked_at_one_by_one(k):
    """All pairs of one row of x, in plain Python: what is pruned was not needed."""
    task = Gate(4, 3, k)
    teacher, W, normals = ends(task, [3])
    batch = task.sample(teacher, normals, 50)
    found = gradient(Oracle(), task, W, batch, normals)[1][0]
    expected = torch.zeros_like(W[0])
    for x in batch.x[0]:
        for i in range(4):
            for j in range(i + 1, 4):
                u = (W[0, i] - W[0, j]) / (W[0, i] - W[0, j]).norm()
                there = x - u * (u @ x)
                q, q_star = W[0] @ there, teacher["W"][0] @ there
                above = [m for m in range(4) if m not in (i, j) and q[m] > q[i]]
                if len(above) != k - 1:
                    continue
                target = torch.zeros(4, dtype=torch.float64)
                target[q_star.topk(k).indices] = 1
                losses = []
                for kept in (i, j):
                    mask = torch.zeros(4, dtype=torch.float64)
                    mask[[*above, kept]] = 1
                    losses.append(((mask - target) * teacher["c"][0]).square().sum() / 2)
                rho = 1 / (math.sqrt(2 * math.pi) * (W[0, i] - W[0, j]).norm())
                jump = rho * (losses[0] - losses[1]) * there / 50
                expected[i] += jump
                expected[j] -= jump
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("near", [0.1, 0.5, 2.0])
def test_ranks_that_are_left_out_do_not_tie(near, monkeypatch):
    task = Gate(24, 6, 5)
    teacher, W, normals = ends(task)
    batch = task.sample(teacher, normals, 300)
    monkeypatch.setattr("topkbench.methods._ties._compiled", lambda: None)  # row by row none is left out
    found = gradient(Oracle(near), task, W, batch, normals)[1]
    everyone = torch.triu_indices(24, 24, 1)
    monkeypatch.setattr("topkbench.methods._ties._ranks", lambda _: everyone)
    torch.testing.assert_close(gradient(Oracle(near), task, W, batch, normals)[1], found)


@pytest.mark.parametrize("kind", [Gate, Cube])
@pytest.mark.parametrize("near", [0.3, 2.0, 10.0])
def test_near_does_not_change_the_mean(kind, near):
    """Its projection on the mean of all ties, within 4 standard errors of the whole."""
    task = kind(6, 4, 2)
    teacher, W, normals = ends(task)
    mean = sum(
        gradient(Oracle(), task, W, task.sample(teacher, normals.child("all"), 2000), normals)[1]
        for _ in range(20)
    )
    ours, error = along(task, Oracle(near), teacher, W, mean / 20, normals.child("near"))
    whole, other = along(task, Oracle(), teacher, W, mean / 20, normals.child("whole"))
    assert ((ours - whole).abs() < 4 * (error.square() + other.square()).sqrt()).all()
    assert (error < 0.05 * whole).all()


def test_a_replicate_that_is_no_number_harms_no_other():
    task = Gate(6, 4, 2)
    teacher, W, normals = ends(task)
    batch = task.sample(teacher, normals, 50)
    alone = gradient(Oracle(0.5), task, W, batch, normals)[1]
    W[1, 2, 0] = torch.nan
    beside = gradient(Oracle(0.5), task, W, batch, normals)[1]
    torch.testing.assert_close(beside[[0, 2]], alone[[0, 2]])
    assert beside[1].isnan().any()


def test_a_common_part_of_the_rows_costs_no_digits():
    task = Gate(12, 5, 3)
    teacher, W, normals = ends(task)
    batch = task.sample(teacher, normals, 200)
    exact = gradient(Oracle(), task, W, batch, normals)[1]
    single = {name: part.float() for name, part in teacher.items()}
    rows = dataclasses.replace(batch, x=batch.x.float(), target=batch.target.float(), teacher=single)
    shifted = (W - W.mean(1, keepdim=True) + 100).float()
    found = gradient(Oracle(), task, shifted, rows, normals)[1].double()
    assert ((found - exact).flatten(1).norm(dim=1) < 2e-2 * exact.flatten(1).norm(dim=1)).all()


def test_near_is_more_than_nothing():
    with pytest.raises(ValueError, match=r"near must be > 0, got 0"):
        Oracle(0.0)


def test_rows_that_coincide_have_no_gradient():
    task = Gate(5, 3, 2)
    teacher, W, normals = ends(task)
    W[1, 4] = W[1, 2]
    with pytest.raises(ValueError, match=r"rows 2 and 4 of W coincide in replicate 1: the mean loss has no"):
        true_gradient(task, W, teacher, normals)
    grad = gradient(Oracle(), task, W, task.sample(teacher, normals, 10), normals)[1]
    assert grad[[0, 2]].isfinite().all()
    assert grad[1].isnan().any()


def test_swap_becomes_the_oracle():
    """At a small temperature its mean is the truth within its own error; at a large one it is not."""
    task = Gate(6, 4, 2)
    teacher, W, normals = ends(task)
    truth = true_gradient(task, W, teacher, normals.child("truth"), error=0.02)
    for kernel in ("rectangular", "triangular", "normal", "logistic"):
        near, far = (
            measure(Swap(t, kernel), task, W, teacher, normals.child("m"), Sampling(128, 800), truth=truth)
            for t in (0.02, 8.0)
        )
        assert (near["rel_bias2"] < 0.02 + 4 * near["rel_bias2_se"]).all(), kernel
        assert (far["rel_bias2"] > 0.05 + 4 * far["rel_bias2_se"]).all(), kernel


def test_a_task_without_a_truth_is_refused():
    with pytest.raises(ValueError, match=r"Unknown has no true gradient: bias cannot be measured on it"):
        true_gradient(Unknown(4, 3, 2), torch.zeros(1, 4, 3), {}, Normals([0]))
    assert "needs a task whose true gradient is known" in str(misfit(Oracle(), Unknown(4, 3, 2)))
    assert misfit(Oracle(), built("task", "gate")) is None
    assert issubclass(IncompatibleError, ValueError)


def test_the_oracle_learns_where_the_hard_gradient_is_zero():
    from topkbench.optimizers import SGD
    from topkbench.train import Logging, Training, train

    task = Gate(6, 6, 2)
    result = train(Oracle(), task, SGD(0.05), [0, 1], Training(300, 32), Logging(2, 0, 512))
    first, last = (result.points[i][2]["hard_loss"] for i in (0, -1))
    assert (last < first / 3).all()
