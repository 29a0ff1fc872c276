"""Work on a CPU side by side, each piece in a thread of one core: operations too small to be shared out."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def threads(device: torch.device, pieces: int) -> int:
    """How many of so many pieces are worked on at a time: as many as torch has threads here."""
    return min(pieces, torch.get_num_threads()) if device.type == "cpu" else 1


@contextlib.contextmanager
def side_by_side(count: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` in so many threads, its results in the order of what they were made of."""
    if count <= 1:
        yield map
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # here as well: who makes what is mapped would wait, busily, for a core
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            yield workers.map
    finally:
        torch.set_num_threads(before)  # what a thread sets is what the next ones start with


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library keep the memory that is freed, for what is made next.

    glibc gives large blocks back to the system, which clears their pages again for the next operation: up to
    a quarter of the time where these are small. It keeps what is not larger than the largest it has seen
    freed, up to 32 MB. Elsewhere this does nothing.
    """
    torch.empty((32 << 20) - (1 << 14), dtype=torch.uint8)
