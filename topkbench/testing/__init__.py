"""The operator contract as functions that an outside operator can run too: `check_operator(my_operator)`.

A check takes an `Operator` and raises AssertionError with what was violated and at which scores, k and
temperature. A guarantee is checked where it is declared, the rest for every operator. The points are drawn
from fixed seeds, in float64 unless the check is about another precision.
"""

from collections.abc import Callable

from topkbench.operators import Operator
from topkbench.testing._always import ALWAYS
from topkbench.testing._guarantees import GUARANTEED

__all__ = ["ALWAYS", "GUARANTEED", "check_operator", "checks"]


def checks(operator: Operator) -> list[Callable[[Operator], None]]:
    """The checks that apply to an operator: one for each guarantee that it declares, then those for all."""
    declared = [check for name, check in GUARANTEED.items() if getattr(operator.guarantees, name)]
    return [*declared, *ALWAYS]


def check_operator(operator: Operator) -> None:
    """Run all checks that apply to an operator; the first that fails raises its AssertionError."""
    for check in checks(operator):
        check(operator)
