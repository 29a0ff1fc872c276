"""What true gradients and gradient statistics cost: seconds, rows of x, and the most memory.

    python experiments/gradient_cost.py [OUT]

Each figure has a process of its own, which starts with nothing computed. Writes OUT (by default
results/gradients)/cost.{csv,md,tex}. 6 minutes on two cores.
"""

import math
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from topkbench import tables
from topkbench.gradients import Sampling, measure, true_gradient
from topkbench.methods import Hard, Method, Oracle, Relaxed, StraightThrough
from topkbench.operators import entropic
from topkbench.randomness import Normals
from topkbench.step import gradient
from topkbench.tasks import Gate, Mask, Task, Values

SIZE = (64, 32, 8)
ENOUGH = 1 << 26
M, REPLICATES, BATCH = 1000, 32, 32
CAPTION = (
    f"Truth: the true gradient of a replicate, to a relative error. Statistics: of {M:,} samples of a "
    f"mini-batch of {BATCH}, for {REPLICATES} replicates. peak: the largest resident memory of the process, "
    "in GiB, with 0.3 for torch itself."
)


def truth(task: Task, at: float, error: float, replicates: int = 1, rows: int = ENOUGH) -> dict[str, object]:
    """A row of the table: how long the truth takes on the way from the start (0) to W* (1)."""
    normals = Normals(list(range(replicates)))
    teacher = task.teacher(normals.child("teacher"))
    W = torch.lerp(task.start(normals.child("start")), teacher["W"], at)
    began = time.perf_counter()
    found = true_gradient(task, W, teacher, normals.child("truth"), error, rows)
    row = {"what": "truth", "wanted": error, "reached": found.error.max().item(), "at": at}
    return row | {"replicates": replicates, "seconds": time.perf_counter() - began}


def nearness(task: Task, near: float, rows: int = 2048, seconds: float = 8.0) -> dict[str, object]:
    """A row of the table: how long 1 % would take at the start, if ties up to `near` were looked at."""
    normals = Normals([0])
    teacher = task.teacher(normals.child("teacher"))
    W = task.start(normals.child("start"))
    first = task.sample(teacher, normals, rows)
    gradient(Oracle(near), task, W, first, normals)  # not timed: at first something is compiled
    grads: list[torch.Tensor] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(grads) < 2:
        draws = normals.child("truth", len(grads))
        grads.append(gradient(Oracle(near), task, W, task.sample(teacher, draws, rows), draws)[1])
    each, found = (time.perf_counter() - began) / len(grads), torch.stack(grads).double()
    variance = found.var(0).sum()  # of the mean of so many rows
    size = found.mean(0).square().sum() - variance / len(grads)
    needed = (variance / size / 1e-4).item()
    row = {"what": f"truth by ties nearer than {near:g}, extrapolated", "wanted": 0.01, "at": 0.0}
    return row | {"replicates": 1, "seconds": needed * each}


def statistics(task: Task, method: Method, samples: int = M) -> dict[str, object]:
    """A row of the table: how long statistics take at the start."""
    normals = Normals(list(range(REPLICATES)))
    teacher = task.teacher(normals.child("teacher"))
    W = task.start(normals.child("start"))
    began = time.perf_counter()
    measure(method, task, W, teacher, normals.child("measure"), Sampling(BATCH, samples))
    row = {"what": f"statistics, M = {samples:,}", "method": named(method), "at": 0.0}
    return row | {"replicates": REPLICATES, "seconds": time.perf_counter() - began}


def named(method: Method) -> str:
    """Its class, and its operator where it has one."""
    operator = getattr(method, "operator", None)
    return type(method).__name__ + (f" {operator.__name__}" if operator else "")


JOBS: tuple[tuple[Any, ...], ...] = (
    *((nearness, task(*SIZE), near) for task in (Mask, Gate) for near in (0.1, 0.2, 1.0, math.inf)),
    *((truth, task(*SIZE), 0.0, error) for task in (Mask, Gate) for error in (0.05, 0.01)),
    (truth, Mask(*SIZE), 0.5, 0.01),
    (truth, Mask(256, 32, 8), 0.0, 0.1, 8, 1 << 14),
    (truth, Gate(256, 128, 32), 0.0, 0.1, 32, 1 << 12),
    *((statistics, Values(*SIZE), Hard()), (statistics, Gate(*SIZE), Relaxed(entropic, 0.3))),
    *((statistics, Gate(*SIZE), StraightThrough(entropic, 0.3)), (statistics, Gate(*SIZE), Oracle())),
    (statistics, Values(*SIZE), Hard(), 4 * M),
)


def job(number: int) -> dict[str, object]:
    """A row of the table, in a process of its own."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    do, task, *rest = JOBS[number]
    row = do(task, *rest)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sizes = ", ".join(str(size) for size in (task.n, task.d, task.k))
    return {"task": type(task).__name__.lower(), "n, d, k": sizes, **row, "peak": peak}


def main(out: Path) -> None:
    """Measure, print and save."""
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for row in tqdm(pool.imap(job, range(len(JOBS)), chunksize=1), total=len(JOBS), unit="figure"):
            rows.append(row)
    order = ["what", "method", "task", "n, d, k", "at", "replicates", "wanted", "reached", "seconds", "peak"]
    table = pd.DataFrame(rows)[order].round({"reached": 4, "seconds": 1, "peak": 2}).astype(object).fillna("")
    tables.write_plain(table, out, "cost", CAPTION)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("results/gradients"))
