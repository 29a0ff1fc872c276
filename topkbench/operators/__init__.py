"""Operators: pure functions from scores to a mask, its rows and values. Imports torch and nothing of ours."""

from topkbench.operators._contract import Guarantees, Operator, operator
from topkbench.operators.hard import hard_mask, hard_selection, hard_values
from topkbench.operators.identity import identity
from topkbench.operators.softmax import softmax
from topkbench.operators.threshold import entropic, sparsemax

__all__ = [
    "Guarantees",
    "Operator",
    "entropic",
    "hard_mask",
    "hard_selection",
    "hard_values",
    "identity",
    "operator",
    "softmax",
    "sparsemax",
]
