"""topkbench: a research benchmark harness for top-k relaxations."""

from typing import Any

__all__ = ["topk_mask"]


def __getattr__(name: str) -> Any:
    if name == "topk_mask":  # not before it is asked for: help and completion do without torch
        from topkbench.topk import topk_mask

        return topk_mask
    raise AttributeError(f"module 'topkbench' has no attribute {name!r}")
