"""The relaxation used as it is: forward and backward through the operator."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import OfOperator, Step
from topkbench.operators._contract import bound


@dataclass(frozen=True)
class Relaxed(OfOperator):
    """The task's loss of the relaxed mask or of the relaxed values."""

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The relaxed loss."""
        operator, options = bound(self.operator)
        part = operator.values if step.wants == "values" else operator
        return step.loss(part(step.scores, step.k, self.temperature, **options))
