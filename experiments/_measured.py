"""What the experiments that measure memory in processes of their own share."""

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch


def peak(call: Callable[[], object]) -> int:
    """The most bytes of tensors alive at once in a call, on the CPU."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as seen:
        call()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = pd.Series([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return max(0, int(alive.cumsum().max())) if len(alive) else 0


def silence() -> None:
    """Nothing that this process or its libraries print is seen any more."""
    with Path(os.devnull).open("w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
