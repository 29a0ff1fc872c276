"""The operator contract as functions that an outside operator can run too: `check_operator(my_operator)`.

A check takes an `Operator` and raises AssertionError with what was violated and at which scores, k and
temperature. A guarantee is checked where it is declared, the rest for every operator. The points are drawn
from fixed seeds, in float64 unless the check is about another precision.
"""

from collections.abc import Callable

from topkbench.operators import Operator
from topkbench.testing._always import (
    ALWAYS,
    check_bad_input,
    check_counts,
    check_extremes,
    check_leading_dimensions,
    check_nan,
    check_precision,
    check_selection,
    check_temperature_tensor,
    check_vmap,
)
from topkbench.testing._guarantees import (
    GUARANTEED,
    check_bounded,
    check_gradient,
    check_hard_limit,
    check_infinite,
    check_infinite_scores,
    check_masked,
    check_monotone,
    check_permutation,
    check_rows_sum_to_1,
    check_shift_invariant,
    check_sparse,
    check_sums_to_k,
    check_ties,
    check_twice,
    check_uniform_limit,
)

__all__ = [
    "ALWAYS",
    "GUARANTEED",
    "check_bad_input",
    "check_bounded",
    "check_counts",
    "check_extremes",
    "check_gradient",
    "check_hard_limit",
    "check_infinite",
    "check_infinite_scores",
    "check_leading_dimensions",
    "check_masked",
    "check_monotone",
    "check_nan",
    "check_operator",
    "check_permutation",
    "check_precision",
    "check_rows_sum_to_1",
    "check_selection",
    "check_shift_invariant",
    "check_sparse",
    "check_sums_to_k",
    "check_temperature_tensor",
    "check_ties",
    "check_twice",
    "check_uniform_limit",
    "check_vmap",
    "checks",
]


def checks(operator: Operator) -> list[Callable[[Operator], None]]:
    """The checks that apply to an operator: one for each guarantee that it declares, then those for all."""
    declared = [check for name, check in GUARANTEED.items() if getattr(operator.guarantees, name)]
    return [*declared, *ALWAYS]


def check_operator(operator: Operator) -> None:
    """Run all checks that apply to an operator; the first that fails raises its AssertionError."""
    for check in checks(operator):
        check(operator)
