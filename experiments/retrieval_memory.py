"""What one training step of every method holds and takes on `retrieval` with 10,000 candidates.

    python experiments/retrieval_memory.py [OUT] [--only NAME,...] [--n 10000] [--k 10] [--batch 64]

One replicate, float32, one thread, conf/method as it stands, and a fresh process for each method, which may
have LIMIT of memory beside what it starts with. MiB: the most bytes of tensors alive at once in a step,
forward and backward, less those of the scores. resident: what the process grew by until its second step was
done, which the memory that an allocator holds in pieces is part of. ms: processor time, the median of the
steps of one second, at least one. Where no step is done, what the method or the process said stands
there, and `ended` says which:

    refused     the method said in a line that it cannot
    memory      it asked for more than LIMIT and had not said that it would
    time        the first step took longer than FIRST seconds, or the rest than LATEST
    failed      anything else

Writes memory.{csv,md,tex} to OUT (by default results/retrieval); --only replaces the rows of those methods.
Linux only: what a process holds is read from there.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from _measured import peak, silence
from tqdm import tqdm

from topkbench import tables
from topkbench.choices import available
from topkbench.config import built, misfit
from topkbench.randomness import Normals
from topkbench.step import WEIGHTS, Memory, gradients
from topkbench.tasks import Retrieval
from topkbench.writable import check_writable

LIMIT = 6 << 30
FIRST, LATEST, BUDGET = 60.0, 180.0, 1.0  # seconds
MIB = 1 << 20
TOO_LARGE = ("can't allocate memory", "out of memory", "Cannot allocate memory")  # what torch and Linux say
NUMBERS = ("MiB", "tensors", "resident", "ms")
ENDS = ("done", "time", "memory", "failed", "refused")
CAPTION = (
    "One training step on retrieval with n = {n} candidates, k = {k} and {batch} queries: one replicate, "
    "float32, one thread. MiB: the most bytes of tensors alive at once beside the scores ({scores:.2f} MiB); "
    "tensors: the same in tensors of their size; resident: what the process grew by, in MiB; ms: median "
    "processor time of a step. A process had {limit:.0f} GiB beside what it started with."
)
CONTEXT = multiprocessing.get_context("forkserver")


class Job(NamedTuple):
    """One measurement."""

    method: str
    n: int
    k: int
    batch: int


def stepper(job: Job) -> Callable[[], object]:
    """A training step of the method, from the same W on the same mini-batch each time.

    Raises:
        ValueError: the method does not fit.
    """
    task, method = Retrieval(n=job.n, k=job.k), built("method", job.method)
    reason = misfit(method, task)
    if reason:
        raise ValueError(reason)
    normals = Normals([0])
    teacher = task.teacher(normals.child("teacher"))
    learned = {WEIGHTS: task.start(normals.child("start"))}
    batch = task.sample(teacher, normals.child("train"), job.batch)
    noise, memory = normals.child("method"), Memory()
    return lambda: gradients(method, task, learned, batch, noise, memory)


def measured(job: Job, ready: Callable[[], object]) -> dict[str, Any]:
    """Memory and time of a step, in this process; `ready` is called after the first."""
    torch.set_num_threads(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size() + LIMIT, hard))
    before = resident()
    step = stepper(job)
    step()  # what is made once, at the first call, is no part of a step
    ready()
    times, end = [seconds(step)], time.perf_counter() + BUDGET
    grown = resident() - before
    while time.perf_counter() < end:
        times.append(seconds(step))
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))  # the profiler may take more than what it looks at
    scores = job.batch * job.n * torch.finfo(torch.float32).bits // 8
    beside = peak(step) - scores
    sizes = {"MiB": beside / MIB, "tensors": beside / scores, "resident": grown / MIB}
    return {"ended": "done", **sizes, "ms": 1e3 * statistics.median(times)}


def seconds(step: Callable[[], object]) -> float:
    """Processor time of a step: on one thread it is the time it takes where nothing else runs."""
    began = time.process_time()
    step()
    return time.process_time() - began


def resident() -> int:
    """The most bytes that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def size() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def in_a_process(job: Job, pipe: Any) -> None:
    """`measured`, or why not, told through a pipe."""
    silence()
    try:
        pipe.send(measured(job, lambda: pipe.send(None)))
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        pipe.send({"ended": ending(error, said), "said": said})


def ending(error: Exception, said: str) -> str:
    """What kind of end an error is: a ValueError is what methods refuse with."""
    if isinstance(error, MemoryError) or any(words in said for words in TOO_LARGE):
        return "memory"
    return "refused" if isinstance(error, ValueError) else "failed"


def attempt(job: Job) -> dict[str, Any]:
    """`measured` in a process of its own, which is stopped where it takes too long."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=in_a_process, args=(job, there))
    process.start()
    there.close()
    try:
        for limit in (FIRST, LATEST):
            if not here.poll(limit):
                return {"ended": "time", "said": f"more than {limit:.0f} s"}
            told = here.recv()
            if told is not None:
                break
        return told
    except EOFError:
        return {"ended": "failed", "said": "the process died"}
    finally:
        process.kill()
        process.join()


def everything(jobs: list[Job]) -> pd.DataFrame:
    """A row for each method."""
    rows = []
    with tqdm(jobs, desc="retrieval") as bar:
        for job in bar:
            bar.set_postfix_str(job.method)
            rows.append({"method": job.method, **attempt(job)})
    return pd.DataFrame(rows, columns=["method", "ended", *NUMBERS, "said"])


def ordered(table: pd.DataFrame) -> pd.DataFrame:
    """What was done by memory, then the others."""
    order = table["ended"].map(ENDS.index)
    return table.assign(order=order).sort_values(["order", "MiB", "method"]).drop(columns="order")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table with three digits to a number."""
    strings = {name: table[name].map(digits) for name in NUMBERS}
    said = [line if isinstance(line, str) else "" for line in table["said"]]
    return table.assign(**strings, said=said).replace("nan", "-")


def digits(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", default=Path("results/retrieval"))
    parser.add_argument("--only", type=lambda names: names.split(","), metavar="NAME,...")
    for name, default in (("n", 10_000), ("k", 10), ("batch", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main() -> None:
    """Measure, print and save."""
    wanted = arguments()
    check_writable(wanted.out)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # where a fresh process looks
    CONTEXT.set_forkserver_preload(["topkbench.config", "topkbench.tables"])
    sizes = wanted.n, wanted.k, wanted.batch
    table = everything([Job(name, *sizes) for name in wanted.only or available("method")])
    file = wanted.out / "memory.csv"
    if wanted.only and file.is_file():
        earlier = pd.read_csv(file, na_values="-")
        table = pd.concat([earlier, table]).drop_duplicates("method", keep="last")
    table = readable(ordered(table))
    scores = 4 * wanted.batch * wanted.n / MIB
    told = {"n": wanted.n, "k": wanted.k, "batch": wanted.batch, "scores": scores, "limit": LIMIT / 2**30}
    tables.write_plain(table, wanted.out, "memory", CAPTION.format(**told))
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
