import dataclasses
import functools

import pytest
import torch
from conftest import METHODS, OTHER_PAIRS, PAIRS, TASKS, built

from topkbench.evaluate import hard_loss
from topkbench.methods import Hard, HardSelection, Relaxed, SimpleF, StraightThrough
from topkbench.methods._contract import needs_objective
from topkbench.operators import entropic, hard_mask
from topkbench.randomness import Normals
from topkbench.step import at_temperature, gradient, surrogate
from topkbench.train import Logging, Training, train


def case(task, seeds=(0, 1, 2), rows=7, dtype=torch.float64):
    normals = Normals(list(seeds), dtype=dtype)
    teacher = task.teacher(normals.child("teacher"))
    return task.start(normals.child("start")), task.sample(teacher, normals.child("x"), rows), normals


@pytest.mark.parametrize("task", TASKS)
def test_both_forms_of_the_hard_gradient_agree(task):
    task = built("task", task)
    W, batch, noise = case(task)
    (loss, grad), (other_loss, other) = (
        gradient(method, task, W, batch, noise) for method in (Hard(), HardSelection())
    )
    torch.testing.assert_close(loss, other_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, other, rtol=1e-12, atol=1e-15)


def test_the_hard_gradient_is_the_derivative_where_nothing_ties():
    task = built("task", "values")
    W, batch, noise = case(task)
    analytic = gradient(Hard(), task, W, batch, noise)[1]
    direction = Normals([9, 10, 11], dtype=torch.float64)("direction", task.n, task.d)
    h = 1e-7
    ahead, behind = (hard_loss(task, W + side * h * direction, batch).mean(-1) for side in (1, -1))
    expected = (analytic * direction).sum((1, 2))
    torch.testing.assert_close((ahead - behind) / (2 * h), expected, rtol=1e-6, atol=1e-8)


def test_the_hard_gradient_of_gate_is_exactly_zero():
    task = built("task", "gate")
    W, batch, noise = case(task)
    for method in (Hard(), HardSelection()):
        loss, grad = gradient(method, task, W, batch, noise)
        assert loss.min() > 0
        assert torch.equal(grad, torch.zeros_like(W))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith(("ste", "hard"))])
def test_what_is_hard_forward_has_the_hard_loss(method, task):
    method, task = built("method", method), built("task", task)
    W, batch, noise = case(task)
    forward = surrogate(method, task, W, batch, noise)
    torch.testing.assert_close(forward, hard_loss(task, W, batch), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("method", "task"), PAIRS)
def test_gradients_reach_every_learner(method, task):
    chosen, task = built("method", method), built("task", task)
    W, batch, noise = case(task, rows=64)
    grad = gradient(chosen, task, W, batch, noise)[1]
    assert grad.isfinite().all()
    blind = (
        isinstance(chosen, Hard | HardSelection) and task.wants == "mask" and type(task).__name__ == "Gate"
    )
    assert ((grad != 0).flatten(1).any(1) != blind).all()


@pytest.mark.parametrize(("method", "task"), PAIRS)
def test_a_replicate_is_what_it_is_alone(method, task):
    chosen, task = built("method", method), built("task", task)
    loss, grad = gradient(chosen, task, *case(task))
    for i, seed in enumerate((0, 1, 2)):
        alone_loss, alone = gradient(chosen, task, *case(task, seeds=(seed,)))
        torch.testing.assert_close(loss[i], alone_loss[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(grad[i], alone[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("method", "task"), PAIRS)
def test_the_loss_is_the_same_without_gradients_and_keeps_the_dtype(method, task, dtype):
    chosen, task = built("method", method), built("task", task)
    loss, grad = gradient(chosen, task, *case(task, dtype=dtype))
    with torch.no_grad():
        value = surrogate(chosen, task, *case(task, dtype=dtype)).mean(-1)
    torch.testing.assert_close(value, loss)
    assert loss.dtype == grad.dtype == dtype
    assert grad.isfinite().all()


@pytest.mark.parametrize(("method", "task"), PAIRS)
def test_what_is_stochastic_says_so(method, task):
    chosen, task = built("method", method), built("task", task)
    W, batch, noise = case(task, rows=64)
    first, second = (gradient(chosen, task, W, batch, noise)[1] for _ in range(2))
    assert chosen.stochastic != torch.equal(first, second)


def test_straight_through_has_the_gradient_of_its_relaxation_at_the_hard_mask():
    # L(m) = <g, m>, linear in the mask: there the two gradients must be one and the same.
    scores = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(6, dtype=torch.float64)
    step = _step(scores, lambda mask: mask @ g)
    through, relaxed = (method(entropic, 0.7)(step) for method in (StraightThrough, Relaxed))
    torch.testing.assert_close(through, hard_mask(scores, 2) @ g, rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(loss.sum(), scores, retain_graph=True)[0] for loss in (through, relaxed)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


def test_the_plain_straight_through_gradient_is_the_identity():
    scores = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(6, dtype=torch.float64)
    loss = built("method", "ste")(_step(scores, lambda mask: mask @ g))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), scores)[0], g.expand_as(scores))


@pytest.mark.parametrize(
    "method",
    [name for name, task in PAIRS if task == "mask" and hasattr(built("method", name), "temperature")],
)
def test_each_replicate_can_have_its_own_temperature(method):
    method, task = built("method", method), built("task", "mask")
    W, batch, _ = case(task)
    temperatures = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    together = gradient(at_temperature(method, temperatures), task, W, batch, case(task)[2])[1]
    for i, temperature in enumerate(temperatures.tolist()):
        alone = gradient(dataclasses.replace(method, temperature=temperature), task, W, batch, case(task)[2])[
            1
        ]
        torch.testing.assert_close(together[i], alone[i], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [method for method, task in PAIRS if task == "gate" and method != "oracle"])
def test_only_what_needs_the_objective_learns_from_a_loss_without_a_derivative(name):
    method = built("method", name)
    scores = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.arange(6, dtype=torch.float64)
    step = _step(scores, lambda mask: (mask @ weight).square().detach() + 0 * mask.sum(-1))
    step = dataclasses.replace(step, noise=Normals([0, 1, 2], dtype=torch.float64))
    total = method(step).sum()
    grad = torch.autograd.grad(total, scores, allow_unused=True)[0] if total.requires_grad else None
    if isinstance(method, SimpleF):  # two draws of one law: noise of mean 0, see test_subset_differences
        return
    learns = grad is not None and bool((grad != 0).any())
    assert learns == needs_objective(method)


@pytest.mark.parametrize("wrapper", [Relaxed, StraightThrough])
def test_bad_arguments_are_refused(wrapper):
    for temperature in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"temperature must be > 0 and finite, got "):
            wrapper(entropic, temperature)
    with pytest.raises(
        TypeError, match=r"operator must be one of topkbench\.operators, got <built-in method softmax"
    ):
        wrapper(functools.partial(torch.softmax))


def _step(scores, loss):
    from topkbench.methods import Step

    nothing = torch.zeros
    W, x = nothing(3, 6, 4).double(), nothing(3, 5, 4).double()
    return Step(W, x, scores, 2, "mask", loss, lambda *_: None)


@pytest.mark.parametrize(("method", "task"), OTHER_PAIRS)
def test_a_step_of_every_pair(method, task):
    """A few steps run, stay finite, and a replicate learns what it learns alone, and is judged alike."""
    chosen, task, optimizer = built("method", method), built("task", task), built("optimizer", "sgd")
    settings = Training(2, 4), Logging(2, 0, 8)
    together = train(chosen, task, optimizer, [0, 1], *settings, dtype=torch.float64)
    alone = train(chosen, task, optimizer, [1], *settings, dtype=torch.float64)
    assert (together.diverged_at < 0).all()
    assert together.W.isfinite().all()
    for step, _, columns in together.points:
        for name in ("hard_loss", "relaxed_loss"):
            assert columns[name].isfinite().all(), (name, step)
    torch.testing.assert_close(together.W[1:], alone.W, rtol=1e-8, atol=1e-11)
    (_, _, last), (_, _, own) = together.points[-1], alone.points[-1]
    for name in ("hard_loss", "relaxed_loss"):
        torch.testing.assert_close(last[name][1:], own[name], rtol=1e-8, atol=1e-11)
