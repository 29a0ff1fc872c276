"""Where the time goes in the cells of experiments/speed.py that miss their target: torch's own profiler.

    python experiments/speed_profile.py [OUT]

Forward and backward of one contender, one thread, float32: torch operations a call, microseconds of wall
time a call, microseconds per operation, torch.topk's own forward and backward beside it, and the operations
that take most of the time, by self time. Writes OUT (by default results/speed)/profile.{csv,md,tex}.
"""

import sys
import time
from pathlib import Path

import pandas as pd
import torch
from speed_contenders import BASE, TORCH, Call, ours
from tqdm import tqdm

from topkbench import tables

TINY, SMALL, WIDE = (1, 6, 3), (128, 64, 8), (128, 1000, 10)
PROFILED = (
    ("sparsemax", (TINY, SMALL, WIDE)),
    ("sparsemax compiled", (TINY, SMALL, WIDE)),
    ("lapsum", (TINY, WIDE)),
    ("entmax", (TINY,)),
    ("csoftmax", (TINY,)),
    ("gaussian", (TINY, WIDE, (64, 10**4, 100))),
    ("neuralsort", (TINY, WIDE)),
    ("soft_rank", (TINY,)),
    ("bitonic", (TINY,)),
    ("perturbed_mask", (SMALL, WIDE)),
    ("method imle", (SMALL, WIDE)),
    ("topk_mask ste_scaled_softmax", (TINY, SMALL)),
)
CALLS, SHOWN = 30, 4
CAPTION = (
    "Forward and backward on one thread. operations: calls of torch operations that do arithmetic or move "
    "numbers, in one forward and backward; topk: microseconds of torch.topk's; most of it: share of the "
    "profiler's self time."
)
NOT_WORK = ("aten::empty", "aten::as_strided", "aten::view", "aten::detach", "detach", "aten::expand")


def profiled(name: str, call: Call, base: Call, cell: tuple[int, int, int]) -> dict[str, object]:
    """A row of the table."""
    for _ in range(CALLS):
        call()
        base()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(CALLS):
            call()
    events = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    work = [event for event in events if event.key.startswith("aten::") and event.key not in NOT_WORK]
    shares = ", ".join(f"{named(e.key)} {e.self_cpu_time_total / whole:.0%}" for e in events[:SHOWN])
    own, topk = (1e6 * seconds(each) for each in (call, base))
    count = sum(event.count for event in work) / CALLS
    return {
        "contender": name,
        "cell": "x".join(map(str, cell)),
        "us": f"{own:.0f}",
        "topk": f"{topk:.0f}",
        "ratio": f"{own / topk:.1f}",
        "operations": f"{count:.0f}",
        "us an operation": f"{own / count:.1f}" if count else "-",
        "most of it": shares,
    }


def named(key: str) -> str:
    """An operation, without the hash of a compiled graph."""
    return "compiled graph" if "CompiledFxGraph" in key else key.removeprefix("aten::")


def seconds(call: Call) -> float:
    """The median of a call."""
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return sorted(times)[CALLS // 2]


def main(out: Path) -> None:
    """Profile, print and save."""
    torch.set_num_threads(1)
    everyone = TORCH | ours(compiled=True)
    rows = []
    for name, cells in tqdm(PROFILED, desc="profile"):
        for cell in cells:
            scores = torch.randn(*cell[:2], generator=torch.Generator().manual_seed(0))
            call, base = (everyone[each].make(scores, cell[2]) for each in (name, BASE))
            rows.append(profiled(name, call, base, cell))
    table = pd.DataFrame(rows)
    tables.write_plain(table, out, "profile", CAPTION)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("results/speed"))
