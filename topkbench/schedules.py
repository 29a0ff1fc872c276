"""Schedules: what a method's temperature is multiplied by along training. Methods without one ignore them."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Schedule(Protocol):
    """A factor on the temperature."""

    def __call__(self, done: float) -> float:
        """The factor, > 0, when the share `done` in [0, 1] of the steps is done; 1 at 0."""
        ...


@dataclass(frozen=True)
class Constant:
    """The temperature stays what it is."""

    def __call__(self, done: float) -> float:  # noqa: ARG002
        """1."""
        return 1.0


@dataclass(frozen=True)
class _To:
    """From 1 to `end`.

    Attributes:
        end: The factor at the last step, > 0.
    """

    end: float

    def __post_init__(self) -> None:
        if not 0 < self.end < float("inf"):
            raise ValueError(f"end must be > 0 and finite, got {self.end}")


class Exponential(_To):
    """From 1 to `end`, > 0, by the same ratio at every step."""

    def __call__(self, done: float) -> float:
        """`end ** done`."""
        return self.end**done


class Linear(_To):
    """From 1 to `end`, > 0, by the same difference at every step."""

    def __call__(self, done: float) -> float:
        """`1 + (end - 1) done`."""
        return 1 + (self.end - 1) * done
