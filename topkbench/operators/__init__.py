"""Operators: pure functions from scores to a mask, its rows and values. Imports nothing of ours."""

from topkbench.operators._contract import About, Guarantees, Operator, operator
from topkbench.operators.anchors import cardinality_sinkhorn, sinkhorn_rank, soft_sorted
from topkbench.operators.dynamic_program import dp_gini
from topkbench.operators.gates import kept_softmax, switch
from topkbench.operators.hard import hard_mask, hard_selection, hard_values
from topkbench.operators.identity import identity, projected_identity
from topkbench.operators.midpoint import dftopk, sigmoid
from topkbench.operators.networks import bitonic, odd_even
from topkbench.operators.permutation import neuralsort, softsort
from topkbench.operators.perturbed import perturbed_mask, perturbed_selection
from topkbench.operators.ranks import smooth_rank, soft_rank
from topkbench.operators.shifted import shifted_topk
from topkbench.operators.softmax import n3, scaled_softmax, softmax
from topkbench.operators.splitter import splitter
from topkbench.operators.subset import marginals
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
from topkbench.operators.transport import sinkhorn, soft
from topkbench.operators.uncapped import scaled_entmax

__all__ = [
    "About",
    "Guarantees",
    "Operator",
    "bitonic",
    "cardinality_sinkhorn",
    "cauchy",
    "csoftmax",
    "dftopk",
    "dp_gini",
    "entmax",
    "entropic",
    "gaussian",
    "hard_mask",
    "hard_selection",
    "hard_values",
    "identity",
    "kept_softmax",
    "lapsum",
    "marginals",
    "n3",
    "neuralsort",
    "odd_even",
    "operator",
    "perturbed_mask",
    "perturbed_selection",
    "pnorm",
    "projected_identity",
    "scaled_entmax",
    "scaled_softmax",
    "shifted_topk",
    "sigmoid",
    "sinkhorn",
    "sinkhorn_rank",
    "smooth_rank",
    "soft",
    "soft_rank",
    "soft_sorted",
    "softmax",
    "softsort",
    "sparsemax",
    "splitter",
    "switch",
]
