"""Tasks: what is learned. Imports no method, and of the operators only the hard top-k."""

from topkbench.tasks._contract import (
    Batch,
    KnownExpectation,
    KnownInputs,
    Learns,
    Task,
    Teacher,
    scores_of,
)
from topkbench.tasks.gate import Gate
from topkbench.tasks.mask import Mask
from topkbench.tasks.polynomial import Polynomial
from topkbench.tasks.subset_toy import SubsetToy
from topkbench.tasks.values import Values

__all__ = [
    "Batch",
    "Gate",
    "KnownExpectation",
    "KnownInputs",
    "Learns",
    "Mask",
    "Polynomial",
    "SubsetToy",
    "Task",
    "Teacher",
    "Values",
    "scores_of",
]
