"""What forward and backward of every operator cost beside `torch.topk`'s, and beside public packages'.

    python experiments/speed.py [OUT] [--only NAME,...] [--cells 1x6x3,...] [--threads 1,2]
                                [--device cpu,cuda] [--seconds 2] [--compile]

Float32, temperature 1. For each cell (batch x n x k) and contender one fresh process times torch.topk and the
contender in turn, forward and backward, for so many seconds: the number is the median of the ratios. Where
a call takes more than 20 s, preparing it more than 90 s, or the process more than 8 GB, it is `over`, and not
tried at a larger n. With one thread a process stays on one core. Peak memory is that of the tensors alive
at once, with the scores, the incoming and the outgoing gradient, in units of the scores' size.

Packages that are not installed are left out (`pip install -c constraints.txt -e '.[peers]'`). --compile adds
our threshold operators under torch.compile. Writes to OUT (by default results/speed) the table (CSV,
Markdown), a figure for each device and number of threads (PDF, PNG) and where they come from (JSON). What is
measured again replaces what an earlier run into the same folder found.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from _measured import peak, silence
from speed_contenders import BASE, TORCH, Call, Contender, ours
from speed_figure import heat_map, markdown
from speed_peers import PEERS
from tqdm import tqdm

from topkbench import plots
from topkbench.environment import environment
from topkbench.records import replacing
from topkbench.writable import check_writable

CELLS = ((1, 6, 3), (128, 64, 8), (128, 1000, 10), (64, 10**4, 100), (8, 10**5, 1000), (1, 10**6, 1000))
A_CALL, TO_PREPARE, BYTES = 20.0, 90.0, 8 << 30  # more is `over`
TOO_LARGE = ("can't allocate memory", "out of memory", "the limit is")  # what torch and `check_size` say
ROUNDS = 2000
SLOW = 0.2  # seconds
# A process for each measurement, that can be stopped; forked from one that imported all and computed nothing.
CONTEXT = multiprocessing.get_context("forkserver")


class Job(NamedTuple):
    """One measurement."""

    device: str
    threads: int
    name: str
    cell: tuple[int, int, int]
    seconds: float
    compiled: bool


def contenders(device: str, compiled: bool) -> dict[str, Contender]:
    """All that can run here, by name: torch first, then ours, then packages."""
    everyone = TORCH | ours(compiled) | dict(PEERS)
    return {name: one for name, one in everyone.items() if find_spec(one.package) and device in one.devices}


def measured(job: Job, ready: Callable[[], object]) -> dict[str, Any]:
    """Times and memory of one contender in one cell, in this process."""
    torch.set_num_threads(job.threads)
    if job.threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])  # for packages that do not ask torch
    batch, n, k = job.cell
    scores = torch.randn(batch, n, generator=torch.Generator().manual_seed(0)).to(job.device)
    wait = torch.cuda.synchronize if job.device == "cuda" else lambda: None
    base, call = (contenders(job.device, job.compiled)[name].make(scores, k) for name in (BASE, job.name))
    for one in (base, call):
        one()
    wait()
    ready()
    once = seconds(call, wait)
    if once > A_CALL:
        return {"status": "over"}
    pairs = list(rounds(base, call, wait, job.seconds))
    ratios = sorted(own / of_base for of_base, own in pairs)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "status": "done",
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
        "rounds": len(pairs),
        "seconds": statistics.median(own for _, own in pairs),
        "topk_seconds": statistics.median(of_base for of_base, _ in pairs),
        "peak": held(call, scores) / (scores.numel() * scores.element_size()),
    }


def seconds(call: Call, wait: Callable[[], object]) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def rounds(
    base: Call, call: Call, wait: Callable[[], object], budget: float
) -> Iterator[tuple[float, float]]:
    """Seconds a call of both, in turn, for about `budget` seconds and at least once."""
    end = time.perf_counter() + budget
    for i in range(ROUNDS):
        if i and time.perf_counter() > end:
            return
        own = seconds(call, wait)
        several = 9 if own > SLOW else 1  # few rounds must not hang on one look at torch.topk
        yield statistics.median(seconds(base, wait) for _ in range(several)), own


def held(call: Call, scores: torch.Tensor) -> float:
    """The most bytes of tensors alive at once during a call."""
    if call.held is not None:
        return call.held
    if scores.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return call.given + torch.cuda.max_memory_allocated() - before
    return call.given + peak(call)


def in_a_process(job: Job, pipe: Any) -> None:
    """`measured`, told through a pipe: True once it is prepared, then the result."""
    silence()
    try:
        pipe.send(measured(job, lambda: pipe.send(True)))
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        large = isinstance(error, MemoryError) or any(words in said for words in TOO_LARGE)
        pipe.send({"status": "over" if large else f"{type(error).__name__}: {said[:120]}"})


def prepare_processes() -> None:
    """Let the process that the others are forked from import what takes long."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # where it looks
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # it must not start others of its own
    CONTEXT.set_forkserver_preload(["speed_figure", "speed_peers", "torch._inductor.standalone_compile"])


def attempt(job: Job) -> dict[str, Any]:
    """`measured` in a process of its own, which is stopped where it is `over`."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=in_a_process, args=(job, there))
    process.start()
    there.close()
    end = time.monotonic() + TO_PREPARE
    try:
        while time.monotonic() < end and resident(process.pid) < BYTES:
            if here.poll(0.02):
                told = here.recv()
                if told is not True:
                    return told
                end = time.monotonic() + 3 * A_CALL + 2 * job.seconds
        return {"status": "over"}
    except EOFError:
        return {"status": "died"}
    finally:
        process.kill()
        process.join()


def resident(pid: int | None) -> int:
    """Bytes a process holds, where the system tells."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def everything(jobs: list[Job]) -> pd.DataFrame:
    """A row for each job, in their order."""
    rows, over = [], set()
    with tqdm(jobs, desc="speed") as bar:
        for job in bar:
            bar.set_postfix_str(f"{job.name} {'x'.join(map(str, job.cell))}")
            own = (job.device, job.threads, job.name)
            result = {"status": "over"} if own in over else attempt(job)
            if result["status"] == "over":
                over.add(own)
            kind = contenders(job.device, job.compiled)[job.name].kind
            batch, n, k = job.cell
            place = {"device": job.device, "threads": job.threads, "contender": job.name, "kind": kind}
            rows.append({**place, "batch": batch, "n": n, "k": k, **result})
    return pd.DataFrame(rows)


def provenance(settings: list[tuple[str, int]]) -> dict[str, Any]:
    """Versions, processor, command and commit."""
    wanted = {one.package for one in PEERS.values()} | {"jax", "jaxlib"}
    names = {name for package in wanted for name in packages_distributions().get(package, [])}
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    about = environment("cuda" if ("cuda", 1) in settings else "cpu")
    about["threads"] = [threads for device, threads in settings if device == "cpu"]
    return {**about, "peers": {name: version(name) for name in sorted(names)}, "cpu": cpu}


def arguments() -> argparse.Namespace:
    """The command line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", default=Path("results/speed"))
    parser.add_argument("--only", type=lambda names: names.split(","), metavar="NAME,...")
    cells = ",".join("x".join(map(str, cell)) for cell in CELLS)
    parser.add_argument("--cells", default=cells, metavar="BATCHxNxK,...")
    parser.add_argument("--threads", default=f"1,{cores}" if cores > 1 else "1", metavar="THREADS,...")
    devices = "cpu,cuda" if find_spec("torch") and torch.version.cuda and torch.cuda.device_count() else "cpu"
    parser.add_argument("--device", default=devices, metavar="DEVICE,...")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def with_earlier(table: pd.DataFrame, file: Path) -> pd.DataFrame:
    """The rows of an earlier run into the same folder, each replaced where it was measured again."""
    if not file.is_file():
        return table
    key = ["device", "threads", "contender", "batch", "n", "k"]
    earlier = pd.read_csv(file)
    both = pd.concat([earlier, table]).drop_duplicates(key, keep="last").set_index(key)
    order = pd.concat([earlier, table])[key].drop_duplicates()
    return both.loc[pd.MultiIndex.from_frame(order)].reset_index()[table.columns]


def earlier_runs(file: Path) -> list[dict[str, Any]]:
    """Where the rows of earlier runs come from."""
    return json.loads(file.read_text())["runs"] if file.is_file() else []


def main() -> None:
    """Measure, draw and save."""
    wanted = arguments()
    check_writable(wanted.out)
    prepare_processes()
    cells = [tuple(map(int, cell.split("x"))) for cell in wanted.cells.split(",")]
    devices = wanted.device.split(",")
    settings = [("cpu", int(t)) for t in wanted.threads.split(",")] if "cpu" in devices else []
    settings += [("cuda", 1)] if "cuda" in devices else []
    jobs = []
    for device, threads in settings:
        names = [name for name in contenders(device, wanted.compile) if name in (wanted.only or [name])]
        for cell in cells:
            jobs += [Job(device, threads, name, cell, wanted.seconds, wanted.compile) for name in names]
    table = with_earlier(everything(jobs), wanted.out / "speed.csv")
    about = {"runs": [*earlier_runs(wanted.out / "speed.json"), provenance(settings)]}
    with replacing(wanted.out / "speed.csv") as draft:
        table.to_csv(draft, index=False, float_format="%.6g")
    with replacing(wanted.out / "speed.md") as draft:
        draft.write_text(markdown(table))
    with replacing(wanted.out / "speed.json") as draft:
        draft.write_text(json.dumps(about, indent=2) + "\n")
    for (device, threads), own in table.groupby(["device", "threads"], sort=False):
        plots.save(heat_map(own), wanted.out, f"speed_{device}_{threads}", about)
    print(markdown(table))


if __name__ == "__main__":
    main()
