"""The relaxation used as it is: forward and backward through the operator."""

import functools
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step, check_relaxation
from topkbench.operators import Operator
from topkbench.operators._contract import Temperature, bound


@dataclass(frozen=True)
class Relaxed:
    """The task's loss of the relaxed mask or of the relaxed values.

    Attributes:
        operator: Any of `topkbench.operators`, or a `functools.partial` of one with its options.
        temperature: > 0; a tensor `(R, 1, 1)` gives each replicate its own.
    """

    operator: Operator | functools.partial
    temperature: Temperature = 1.0
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_relaxation(self.operator, self.temperature)

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The relaxed loss."""
        operator, options = bound(self.operator)
        part = operator.values if step.wants == "values" else operator
        return step.loss(part(step.scores, step.k, self.temperature, **options))
