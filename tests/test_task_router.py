"""The planted router: its loss in plain NumPy, what the hard gradient misses, and what balance adds."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import built

from topkbench.config import misfit
from topkbench.evaluate import evaluate, hard_loss
from topkbench.gradients import Sampling, measure, true_gradient
from topkbench.methods import Hard, Oracle
from topkbench.operators import hard_mask
from topkbench.optimizers import Adam
from topkbench.randomness import Normals
from topkbench.step import gradient, surrogate
from topkbench.tasks import Router
from topkbench.tasks.router import imbalance, softmax_over_kept
from topkbench.train import Logging, Training, train

GATES = ("uniform", "soft")


def planted(rows=200, seeds=(0, 1, 2), clean=True, **changes):
    task = built("task", "router", **changes)
    normals = Normals(list(seeds), dtype=torch.float64)
    teacher = task.teacher(normals.child("teacher"))
    return task, teacher, task.sample(teacher, normals.child("x"), rows, clean=clean), normals


def mixture(W, a, x, k, gate):
    """Of one row, in NumPy."""
    q, experts = W @ x, np.tanh(a @ x)
    kept = np.argsort(-q)[:k]
    share = np.full(k, 1 / k) if gate == "uniform" else np.exp(q[kept]) / np.exp(q[kept]).sum()
    return share @ experts[kept]


@pytest.mark.parametrize("gate", GATES)
def test_the_loss_is_what_the_docstring_says(gate):
    task, teacher, batch, normals = planted(rows=4, gate=gate)
    W = task.start(normals.child("start"))
    found = hard_loss(task, W, batch)
    for r in range(3):
        ours, star, a = (m[r].numpy() for m in (W, teacher["W"], teacher["a"]))
        for b in range(4):
            x = batch.x[r, b].numpy()
            y, y_star = (mixture(m, a, x, task.k, gate) for m in (ours, star))
            assert found[r, b].item() == pytest.approx((y - y_star) ** 2 / 2, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("gate", GATES)
def test_samples_in_front_are_samples_one_by_one(gate):
    task, _, batch, normals = planted(rows=5, gate=gate)
    scores = task.scores(task.start(normals.child("start")), batch)
    masks = normals("masks", 4, 5, 6, law="uniform").movedim(1, 0)
    together = task.loss(masks, scores, batch)
    assert together.shape == (4, 3, 5)
    for mask, loss in zip(masks, together, strict=True):
        torch.testing.assert_close(task.loss(mask, scores, batch), loss)


@pytest.mark.parametrize("gate", GATES)
def test_the_planted_router_is_perfect(gate):
    task, teacher, batch, normals = planted(rows=300, gate=gate)
    columns = evaluate(Hard(), task, teacher["W"], batch, normals)
    for column, perfect in (("hard_loss", 0.0), ("recall", 1.0), ("dead", 0.0)):
        torch.testing.assert_close(columns[column], torch.full((3,), perfect, dtype=torch.float64))
    start = evaluate(Hard(), task, task.start(normals.child("start")), batch, normals)
    assert (start["hard_loss"] > 0.01).all()
    assert (start["recall"] < 0.8).all()


def test_loads_by_hand():
    task, _, batch, normals = planted(rows=150)  # more than one piece
    W = task.start(normals.child("start"))
    W[0, 0], W[0, 1:] = 0, batch.x.new_zeros(5)  # all scores tie: the same k are taken for every row
    found = task.metrics(W, batch)
    for r in range(3):
        counts = hard_mask(batch.x[r] @ W[r].mT, task.k).sum(0).numpy()
        assert found["load_cv"][r].item() == pytest.approx(counts.std() / counts.mean())
        assert found["dead"][r].item() == pytest.approx((counts == 0).mean())
    # The ends of the ranges in the docstring.
    assert found["dead"][0].item() == pytest.approx(1 - task.k / task.n)
    assert found["load_cv"][0].item() == pytest.approx((task.n / task.k - 1) ** 0.5)


def test_the_hard_gradient_is_zero_with_the_uniform_gate_alone():
    for gate, zero in (("uniform", True), ("soft", False)):
        task, _, batch, normals = planted(gate=gate)
        W = task.start(normals.child("start"))
        grad = gradient(Hard(), task, W, batch, normals)[1]
        assert (grad == 0).all() == zero, gate


def test_the_soft_gate_is_softmax_over_what_is_kept():
    scores = 3 * torch.randn(4, 5, 6, dtype=torch.float64)
    mask = hard_mask(scores, 2)
    expected = scores.masked_fill(mask == 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(softmax_over_kept(mask, scores), expected)
    relaxed = torch.rand(4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(softmax_over_kept(relaxed, scores), (scores + relaxed.log()).softmax(-1))
    leaves = relaxed.requires_grad_(), scores.requires_grad_()
    assert torch.autograd.gradcheck(softmax_over_kept, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_soft_gate_stays_finite(dtype):
    """Huge scores, and a mask that leaves out the largest of them."""
    scores = torch.tensor([[[1e4, -1e4, 3.0, 2.0]]], dtype=dtype, requires_grad=True)
    mask = torch.tensor([[[0.0, 0, 1, 1]]], dtype=dtype, requires_grad=True)
    share = softmax_over_kept(mask, scores)
    expected = torch.tensor([[[0.0, 0.0, 3.0, 2.0]]], dtype=dtype)[..., 2:].softmax(-1)
    torch.testing.assert_close(share[..., 2:], expected)
    for grad in torch.autograd.grad(share.square().sum(), (mask, scores)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("n", "d", "k"), [(6, 4, 2), (5, 3, 1), (8, 5, 3)])
def test_the_true_gradient_is_that_of_central_differences(gate, n, d, k):
    task, teacher, _, normals = planted(gate=gate, n=n, d=d, k=k)
    W, direction, h = 2 * task.start(normals.child("start")), normals.child("direction")("D", n, d), 5e-3
    truth = true_gradient(task, W, teacher, normals.child("truth"), error=0.03)
    ours = (truth.blocks * direction).sum((2, 3))
    values = []
    for _ in range(10):
        batch = task.sample(teacher, normals, 20000)
        high, low = (hard_loss(task, W + sign * h * direction, batch).mean(-1) for sign in (1, -1))
        values.append((high - low) / (2 * h))
    theirs = torch.stack(values)
    error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    z = (ours.mean(0) - theirs.mean(0)) / error
    assert (z.abs() < 4).all(), z


@pytest.mark.parametrize("gate", GATES)
def test_the_hard_gradient_is_biased_and_the_oracle_is_not(gate):
    task, teacher, _, normals = planted(gate=gate)
    W = 2 * task.start(normals.child("start"))
    truth = true_gradient(task, W, teacher, normals.child("truth"), error=0.02)
    hard, oracle = (
        measure(method, task, W, teacher, normals.child("m"), Sampling(32, 300), truth=truth)
        for method in (Hard(), Oracle())
    )
    assert (oracle["rel_bias2"] < 4 * oracle["rel_bias2_se"]).all()
    assert (hard["rel_bias2"] > 0.05 + 4 * hard["rel_bias2_se"]).all()


def test_balance_in_plain_numpy_and_on_training_rows_alone():
    task, teacher, _, normals = planted(balance=0.3)
    plain = dataclasses.replace(task, balance=0.0)
    train_rows, clean = (task.sample(teacher, normals.child("same"), 50, clean=c) for c in (False, True))
    W = 3 * task.start(normals.child("start"))
    torch.testing.assert_close(hard_loss(task, W, clean), hard_loss(plain, W, clean))
    extra = hard_loss(task, W, train_rows) - hard_loss(plain, W, clean)
    for r in range(3):
        q = train_rows.x[r].numpy() @ W[r].numpy().T
        p = np.exp(q) / np.exp(q).sum(-1, keepdims=True)
        kept = np.argsort(-q, axis=-1)[:, : task.k]
        f = np.bincount(kept.flatten(), minlength=task.n) / kept.size
        np.testing.assert_allclose(extra[r].numpy(), 0.3 * task.n * p @ f, rtol=1e-10)


def test_balance_at_its_ends():
    scores = torch.zeros(1, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(imbalance(scores, 2), torch.ones(1, 3, dtype=torch.float64))
    scores[..., :2] = 1e3
    torch.testing.assert_close(imbalance(scores, 2), torch.full((1, 3), 3.0, dtype=torch.float64))


def test_following_the_balance_evens_loads():
    task, _, batch, normals = planted(rows=2000, n=8, d=3)
    leaf = (6 * task.start(normals.child("start"))).requires_grad_()
    before, optimizer = task.metrics(leaf.detach(), batch)["load_cv"], torch.optim.Adam([leaf], 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        imbalance(task.scores(leaf, batch), task.k).mean(-1).sum().backward()
        optimizer.step()
    assert (task.metrics(leaf.detach(), batch)["load_cv"] < before / 2).all()


def test_with_a_balance_there_is_no_true_gradient():
    task, _, batch, normals = planted(balance=1.0, clean=False)
    with pytest.raises(ValueError, match=r"Router has no true gradient with balance > 0, got 1\.0"):
        gradient(Oracle(), task, task.start(normals.child("start")), batch, normals)


def test_scaled_softmax_with_the_uniform_gate_is_the_dense_mixture():
    task, teacher, batch, normals = planted(rows=20)
    W = task.start(normals.child("start"))
    method = dataclasses.replace(built("method", "scaled_softmax"), temperature=0.7)
    share = (batch.x @ W.mT / 0.7).softmax(-1)
    dense = (share * (batch.x @ teacher["a"].mT).tanh()).sum(-1)
    expected = (dense - batch.target[..., 0]).square() / 2
    torch.testing.assert_close(surrogate(method, task, W, batch, normals), expected)


@pytest.mark.parametrize("gate", GATES)
def test_a_relaxation_learns_and_the_hard_gradient_does_not(gate):
    task = built("task", "router", n=12, d=6, k=3, gate=gate)
    settings = Training(400, 64), Logging(2, 0, 1000)
    relaxed = dataclasses.replace(built("method", "entropic"), temperature=0.3)
    points = train(relaxed, task, Adam(0.03), range(3), *settings).points
    first, last = (points[i][2] for i in (0, -1))
    assert (last["hard_loss"] < first["hard_loss"] / 4).all()
    assert (last["recall"] > first["recall"] + 0.25).all()
    stuck = train(Hard(), task, Adam(0.03), range(3), Training(20, 64), Logging(2, 0, 1000)).points
    unmoved = torch.equal(stuck[0][2]["hard_loss"], stuck[-1][2]["hard_loss"])
    assert unmoved == (gate == "uniform")


def test_held_out_rows_are_not_training_rows():
    task, teacher, _, normals = planted()
    batches = (task.sample(teacher, normals.child(name), 50) for name in ("train", "test"))
    seen, held_out = (batch.x.flatten(0, 1) for batch in batches)
    assert torch.cdist(seen, held_out).min() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, r"n must be >= 1, got 0"),
        ({"d": 0}, r"d must be >= 1, got 0"),
        ({"k": 7}, r"k must be in \[1, n\] = \[1, 6\], got 7"),
        ({"gate": "hard"}, r"gate must be one of uniform, soft, got hard"),
        ({"balance": -0.1}, r"balance must be >= 0 and finite, got -0\.1"),
        ({"balance": float("inf")}, r"balance must be >= 0 and finite, got inf"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    # Where signatures are checked as well (jaxtyping), an unknown word is refused by that text.
    with pytest.raises((ValueError, TypeError), match=f"{message}|typechecking parameter"):
        Router(**{"n": 6, "d": 5, "k": 2, **change})


def test_where_nothing_is_kept_nobody_answers():
    scores = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, 3, 6, dtype=torch.float64, requires_grad=True)
    share = softmax_over_kept(mask, scores)
    assert (share == 0).all()
    for grad in torch.autograd.grad(share.sum(), (mask, scores)):
        assert grad.isfinite().all()


def test_with_a_balance_there_is_no_true_gradient_and_that_is_said_at_once():
    assert misfit(Oracle(), Router(6, 5, 2)) is None
    assert "true gradient is known" in str(misfit(Oracle(), Router(6, 5, 2, balance=0.1)))
