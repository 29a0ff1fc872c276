"""Operators: pure functions from scores to a mask, its rows and values. Imports torch and nothing of ours."""

from topkbench.operators._contract import About, Guarantees, Operator, operator
from topkbench.operators.gates import kept_softmax, switch
from topkbench.operators.hard import hard_mask, hard_selection, hard_values
from topkbench.operators.identity import identity
from topkbench.operators.midpoint import dftopk, sigmoid
from topkbench.operators.softmax import n3, scaled_softmax, softmax
from topkbench.operators.threshold import (
    cauchy,
    csoftmax,
    entmax,
    entropic,
    gaussian,
    lapsum,
    pnorm,
    sparsemax,
)

__all__ = [
    "About",
    "Guarantees",
    "Operator",
    "cauchy",
    "csoftmax",
    "dftopk",
    "entmax",
    "entropic",
    "gaussian",
    "hard_mask",
    "hard_selection",
    "hard_values",
    "identity",
    "kept_softmax",
    "lapsum",
    "n3",
    "operator",
    "pnorm",
    "scaled_softmax",
    "sigmoid",
    "softmax",
    "sparsemax",
    "switch",
]
