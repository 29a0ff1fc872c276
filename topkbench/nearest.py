"""The line for something that is not among what is allowed."""

import difflib
from collections.abc import Iterable


def unknown(given: str, allowed: Iterable[str], what: str = "key") -> str:
    """The line for something that is not among what is allowed, with the nearest that is."""
    allowed = sorted(allowed)
    ends = {name.rpartition(".")[2]: name for name in reversed(allowed)}
    near = difflib.get_close_matches(given, allowed, 1) or [
        ends[end] for end in difflib.get_close_matches(given.rpartition(".")[2], ends, 1)
    ]
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown {what} {given!r}; {hint}allowed: {', '.join(allowed) or 'none'}"
