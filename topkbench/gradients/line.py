"""Gradients where no method has led: at W on the line from the start to the planted W*, for all the same."""

import dataclasses
import functools
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from topkbench.evaluate import evaluate
from topkbench.gradients.sharpness import sharpness
from topkbench.gradients.statistics import Sampling, measure
from topkbench.gradients.truth import ROWS, Truth, true_gradient
from topkbench.methods import Method
from topkbench.optimizers import per_replicate
from topkbench.randomness import Normals
from topkbench.step import at_temperature
from topkbench.tasks import Task, Teacher
from topkbench.tasks._contract import others_of

Point = tuple[int, float, dict[str, torch.Tensor]]


def measure_at(
    method: Method,
    task: Task,
    normals: Normals,
    places: Sequence[float],
    sampling: Sampling,
    points: list[Point],
    *,
    error: float | None = None,
    rows: int = ROWS,
    test_rows: int = 1024,
    progress: str | None = None,
) -> None:
    """Add evaluation and gradient statistics at each place: `(0, seconds, columns)`, with a column `at`.

    The place a is W = (1 - a) W0 + a W*: 0 where learners start, 1 the planted solution. There the mean loss
    of a mask has a kink: what ties for the learner ties for the teacher, and a truth would be rounding.
    Every method sees the same W, the same mini-batches and the same truth.

    Args:
        method: What is measured.
        task: What it is measured on.
        normals: What everything is drawn from.
        places: Each in [0, 1].
        sampling: How gradients are sampled.
        points: What they are added to, one at a time: what is there when Ctrl-C is pressed stays.
        error: The relative standard error wanted of the true gradient; None for no truth.
        rows: How many rows of x a replicate's true gradient may take.
        test_rows: Held-out rows for the loss and the task's metrics.
        progress: What to call a progress bar; None for no bar.

    Raises:
        ValueError: a place other than 0 on a task that has no W*; a truth asked of a task that has none.
    """
    teacher, W0 = _ends(task, normals)
    if any(places) and "W" not in teacher:
        raise ValueError(f"{type(task).__name__} has no planted W: it can be measured at 0 alone, the start")
    others = others_of(task, teacher, normals.child("others"), W0)
    test = task.sample(teacher, normals.child("test"), test_rows, clean=True)
    test = dataclasses.replace(test, learned=others)
    if hasattr(method, "temperature"):
        method = at_temperature(method, per_replicate("temperature", method.temperature, W0))
    for place in tqdm(places, desc=progress, unit="place", disable=progress is None):
        began = time.perf_counter()
        W = _between(teacher, W0, place)
        draws = normals.child("gradients", round(1e6 * place))
        truth = None
        if error is not None:
            seeds = tuple(normals.seeds)
            ends = (task, seeds, str(normals.device), normals.dtype)
            truth = _truth(*ends, place, error, rows, progress is not None)  # type: ignore[arg-type]
        columns = {"at": W.new_full((len(W),), place)}
        columns |= evaluate(method, task, W, test, draws.child("evaluate"))
        columns |= sharpness(method, task, W, test)
        columns |= measure(method, task, W, teacher, draws, sampling, truth=truth, learned=others)
        if truth is not None:
            columns["true_error"] = truth.error
        points.append((0, time.perf_counter() - began, {name: each.cpu() for name, each in columns.items()}))


def _ends(task: Task, normals: Normals) -> tuple[Teacher, torch.Tensor]:
    """What is planted, and where learners start."""
    return task.teacher(normals.child("teacher")), task.start(normals.child("start"))


def _between(teacher: Teacher, W0: torch.Tensor, place: float) -> torch.Tensor:
    return torch.lerp(W0, teacher["W"], place) if place else W0


@functools.lru_cache(maxsize=8)
def _truth(
    task: Task,
    seeds: tuple[int, ...],
    device: str,
    dtype: torch.dtype,
    place: float,
    error: float,
    rows: int,
    progress: bool,
) -> Truth:
    """The true gradient at a place: no function of the method, so that a sweep computes it once."""
    normals = Normals(list(seeds), (), device, dtype)
    teacher, W0 = _ends(task, normals)
    others = others_of(task, teacher, normals.child("others"), W0)
    W = _between(teacher, W0, place)
    return true_gradient(task, W, teacher, normals.child("truth"), error, rows, others, progress)
