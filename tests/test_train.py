import dataclasses
import signal
import threading
import time

import pytest
import torch
from conftest import OPTIMIZERS, PAIRS, built

from topkbench.methods import Hard
from topkbench.optimizers import SGD, Adam, Stepper, per_replicate
from topkbench.schedules import Constant, Exponential, Linear
from topkbench.step import gradient, surrogate
from topkbench.train import Logging, Training, train

SHORT = Training(steps=20, batch=8)
SOME = Logging(points=3, samples=3, test_rows=32)


def run(
    method="hard", task="values", optimizer=None, seeds=(0, 1, 2), training=SHORT, logging=SOME, **options
):
    method = built("method", method) if isinstance(method, str) else method
    task = built("task", task) if isinstance(task, str) else task
    return train(
        method, task, optimizer or Adam(0.05), list(seeds), training, logging, dtype=torch.float64, **options
    )


@pytest.mark.parametrize(("method", "task"), PAIRS)
def test_a_replicate_does_not_depend_on_the_others(method, task):
    """Replicate i of many is the same seed run alone, to rounding (batched products sum in another order)."""
    together = run(method, task, seeds=range(32))
    alone = run(method, task, seeds=[17])
    torch.testing.assert_close(together.W[17:18], alone.W, rtol=1e-9, atol=1e-11)
    for (_, _, many), (_, _, one) in zip(together.points, alone.points, strict=True):
        for name, column in one.items():
            torch.testing.assert_close(many[name][17:18], column, rtol=1e-7, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("method", ["hard", "softmax", "ste_sparsemax"])
def test_the_default_size_in_float32_too(method):
    """32 replicates, as by default; few steps, before rounding has grown into another ranking."""
    sizes = {"n": 64, "d": 32, "k": 8}
    task = built("task", "values", **sizes)
    settings = (Training(steps=3), Logging(points=2, samples=0, test_rows=64))
    many = train(built("method", method), task, Adam(0.01), range(32), *settings)
    one = train(built("method", method), task, Adam(0.01), [17], *settings)
    torch.testing.assert_close(many.W[17:18], one.W, rtol=1e-4, atol=1e-5)


def test_learning_rates_and_temperatures_are_each_replicates_own():
    rates, temperatures = torch.tensor([0.01, 0.1, 0.3]), torch.tensor([0.1, 1.0, 3.0])
    method = built("method", "entropic")
    together = run(dataclasses.replace(method, temperature=temperatures), "gate", SGD(rates), seeds=[5, 5, 5])
    for i in range(3):
        own = dataclasses.replace(method, temperature=temperatures[i].item())
        alone = run(own, "gate", SGD(rates[i].item()), seeds=[5])
        torch.testing.assert_close(together.W[i : i + 1], alone.W, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_torch_optims_own(name):
    optimizer = built("optimizer", name)
    ours = torch.randn(3, 4, 5, dtype=torch.float64)
    theirs = ours.clone().requires_grad_()
    kind = type(optimizer.build([torch.zeros(1, requires_grad=True)]))
    options = {
        torch.optim.SGD: lambda: {"momentum": optimizer.momentum, "nesterov": optimizer.nesterov},
        torch.optim.Adam: lambda: {"betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.eps},
    }[kind]()
    reference = kind([theirs], lr=optimizer.lr, **options)
    stepper = Stepper(optimizer, {"W": ours})
    for _ in range(30):
        theirs.grad = torch.randn_like(theirs)
        ours = stepper({"W": ours}, {"W": theirs.grad.clone()})["W"]
        reference.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-14)


def test_clipping_is_per_replicate():
    class Recorded(SGD):
        def build(self, moves):
            self.__dict__["moves"] = moves
            return super().build(moves)

    clipped, free = (run(training=Training(1, 8, clip), optimizer=SGD(1.0)) for clip in (0.05, None))
    start = run(training=Training(0, 8)).W
    moved, wanted = ((result.W - start).flatten(1) for result in (clipped, free))
    norms = wanted.norm(dim=1)
    assert (norms > 0.05).all()
    torch.testing.assert_close(moved, wanted * (0.05 / norms)[:, None])


def test_the_temperature_follows_its_schedule():
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Watched:
        temperature: float | torch.Tensor = 2.0
        stochastic = False

        def __call__(self, step):
            seen.append(self.temperature.flatten()[0].item())
            return Hard()(step)

    quiet = Logging(points=2, samples=0, test_rows=4)
    run(Watched(), training=Training(4, 4), logging=quiet, schedule=Exponential(0.01))
    at_start, *training, at_end = seen
    assert [at_start, at_end] == pytest.approx([2.0, 0.02])
    assert training == pytest.approx([2 * 0.01 ** (i / 4) for i in range(4)])


def test_schedules_begin_at_one_and_end_where_they_say():
    assert [Constant()(x) for x in (0.0, 0.5, 1.0)] == [1, 1, 1]
    assert [Linear(0.2)(x) for x in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.6, 0.2])
    assert [Exponential(0.01)(x) for x in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.1, 0.01])
    for schedule in (Exponential, Linear):
        with pytest.raises(ValueError, match=r"end must be > 0 and finite, got 0\.0"):
            schedule(0.0)


def test_one_replicate_diverges_and_the_others_do_not_notice():
    rates = torch.tensor([0.05, 1e9, 0.05])
    with_it = run(optimizer=SGD(rates), training=Training(60, 8))
    without = run(optimizer=SGD(rates[[0, 2]]), training=Training(60, 8), seeds=[0, 2])
    assert with_it.diverged_at.tolist()[0::2] == [-1, -1]
    assert 0 < with_it.diverged_at[1] < 60
    assert with_it.W.isfinite().all()
    torch.testing.assert_close(with_it.W[0::2], without.W, rtol=1e-12, atol=1e-14)


def test_a_first_loss_of_zero_is_no_scale():
    """One row of x at a time: the first loss of a few replicates of gate is 0, and they are not diverged."""
    task = built("task", "gate", n=4, k=2)
    result = run("ste", task, seeds=range(32), training=Training(30, 1), logging=Logging(2, 0, 8))
    assert (result.diverged_at == -1).all()


def test_a_divergence_in_the_last_step_is_noticed():
    settings = {"optimizer": SGD(100.0), "logging": Logging(2, 0, 64)}
    short, longer = (run(training=Training(steps, 4), **settings) for steps in (3, 6))
    assert (longer.diverged_at >= 0).any()
    broken = short.points[-1][2]["relaxed_loss"] > 1e6 * short.points[0][2]["relaxed_loss"].clamp(min=1) * 10
    assert broken.any()
    assert (short.diverged_at[broken] >= 0).all()


def test_a_gradient_that_is_not_finite_is_a_divergence():
    @dataclasses.dataclass(frozen=True)
    class Broken:
        stochastic = False

        def __call__(self, step):
            loss = Hard()(step)
            bad = torch.tensor([1.0, float("nan"), 1.0], dtype=loss.dtype)
            return loss * (bad[: len(loss)] if len(loss) == 3 else 1).reshape(-1, 1)

    result = run(Broken(), logging=Logging(points=2, samples=0, test_rows=4))
    assert result.diverged_at.tolist() == [-1, 0, -1]


def test_looking_more_often_does_not_change_what_is_learned():
    seldom, often = (
        run("ste_softmax", "mask", logging=Logging(points, samples, 16))
        for points, samples in ((2, 0), (11, 5))
    )
    assert torch.equal(seldom.W, often.W)
    assert [step for step, _, _ in often.points] == list(range(0, 21, 2))


def test_the_same_seeds_give_the_same_numbers():
    assert torch.equal(run().W, run().W)


def test_all_methods_see_the_same_data_and_the_same_start():
    first, second = (run(method, "mask", training=Training(0, 8)) for method in ("hard", "entropic"))
    assert torch.equal(first.W, second.W)
    one, other = first.points[0][2], second.points[0][2]
    for name in ("hard_loss", "recall", "distance"):
        assert torch.equal(one[name], other[name])


def test_rows_that_were_never_selected_never_got_a_gradient():
    """k = 1: at each step at most the 2 rows of the batch's winners are touched."""
    task = built("task", "values", n=50, k=1)
    result = run(task=task, training=Training(3, 2), logging=Logging(4, 0, 8))
    shares = torch.stack([columns["rows_with_gradient"] for _, _, columns in result.points])
    assert (shares[0] == 0).all()
    assert (shares.diff(dim=0) >= 0).all()
    assert (shares[1] > 0).all()
    for step in range(4):
        assert (shares[step] <= 2 * step / 50 + 1e-9).all()


def test_every_replicate_learns_values_by_the_hard_gradient():
    result = run(training=Training(400, 32), logging=Logging(2, 0, 256), optimizer=Adam(0.02))
    before, after = (columns["hard_loss"] for _, _, columns in result.points)
    assert (after < 0.2 * before).all()


def test_ctrl_c_leaves_what_was_logged():
    training = Training(steps=10**6, batch=4)
    timer = threading.Timer(1.5, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    result = run(training=training, logging=Logging(10**5, 0, 4))
    timer.join()
    assert result.interrupted
    assert 1 <= len(result.points) < 10**5
    assert result.W.isfinite().all()


def test_seconds_leave_out_the_logging():
    began = time.perf_counter()
    result = run(training=Training(2, 4), logging=Logging(3, samples=300, test_rows=4))
    assert 0 < result.points[-1][1] < (time.perf_counter() - began) / 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Training(steps=-1), r"steps must be >= 0, got -1"),
        (lambda: Training(batch=0), r"batch must be >= 1, got 0"),
        (lambda: Training(clip=0.0), r"clip must be > 0 and finite, or null for none, got 0\.0"),
        (lambda: Training(clip=float("inf")), r"clip must be > 0 and finite, or null for none, got inf"),
        (lambda: Logging(points=1), r"points must be >= 2, got 1"),
        (lambda: Logging(samples=1), r"samples must be >= 2, or 0 for none, got 1"),
        (lambda: Logging(test_rows=0), r"test_rows must be >= 1, got 0"),
        (lambda: SGD(0.0), r"lr must be > 0 and finite, got 0\.0"),
        (lambda: SGD(0.1, momentum=1.0), r"momentum must be in \[0, 1\), got 1\.0"),
        (lambda: SGD(0.1, nesterov=True), r"nesterov needs a momentum > 0, got 0"),
        (lambda: Adam(0.1, beta2=-0.1), r"beta2 must be in \[0, 1\), got -0\.1"),
        (lambda: Adam(0.1, eps=0.0), r"eps must be > 0, got 0\.0"),
        (lambda: run(seeds=[]), r"seeds must hold at least one seed, got none"),
        (lambda: run(optimizer=SGD(torch.ones(2))), r"lr must be one number or 3, one a replicate, got 2"),
        (
            lambda: run(optimizer=SGD(-torch.ones(3))),
            r"lr must be > 0 and finite, got \[-1\.0, -1\.0, -1\.0\]",
        ),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_number_or_one_a_replicate():
    W = torch.zeros(3, 1, 1)
    assert per_replicate("lr", 0.5, W).tolist() == [0.5] * 3
    assert per_replicate("lr", torch.tensor([1.0, 2.0, 3.0]), W).tolist() == [1, 2, 3]


def test_the_gradient_is_that_of_the_mean_over_rows():
    from test_methods import case

    method, task = built("method", "softmax"), built("task", "mask")
    W, batch, noise = case(task)
    W.requires_grad_()
    surrogate(method, task, W, batch, noise).mean(-1).sum().backward()
    torch.testing.assert_close(gradient(method, task, W, batch, noise)[1], W.grad)
