"""The relaxation used as it is: forward and backward through the operator."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import OfNoisyOperator, Step
from topkbench.operators._contract import bound


@dataclass(frozen=True)
class Relaxed(OfNoisyOperator):
    """The task's loss of the relaxed mask or of the relaxed values.

    With Gumbel noise on what is ranked it is relaxed subset sampling: with `operators.softmax` that of Xie &
    Ermon 2019, "Reparameterizable Subset Sampling via Continuous Relaxations"; with a projection
    onto the k-hot polytope a stochastic softmax trick (Paulus et al. 2020, "Gradient Estimation with
    Stochastic Softmax Tricks").
    """

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The relaxed loss."""
        operator, options = bound(self.operator)
        if self.noise != "none":
            part = operator.selection if step.wants == "values" else operator
            return step.of(part(self.ranked(step), step.k, self.temperature, **options))
        part = operator.values if step.wants == "values" else operator
        return step.loss(part(step.scores, step.k, self.temperature, **options))
