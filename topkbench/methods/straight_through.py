"""Straight-through: the hard top-k forward, an operator's vector-Jacobian product backward."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import OfNoisyOperator, Step
from topkbench.operators import hard_mask, hard_selection
from topkbench.operators._contract import bound
from topkbench.operators.hard import straight_through


@dataclass(frozen=True)
class StraightThrough(OfNoisyOperator):
    """One rule for every operator: the value of the hard mask or selection P, the gradient of the soft one.

    The values are `v = P q`, so that their gradient has the hard part `P^T g` and the part that flows
    through the choice. With `topkbench.operators.identity` it is the plain straight-through estimator.

    With noise, `hard` and `soft` rank the same noisy scores: with Gumbel noise the straight-through
    Gumbel-softmax estimator. `hard` has no temperature, so that the one here is that of the backward pass
    alone (the noise keeps its `scale`): low, the estimate varies more and is less biased; high, the other
    way round.

    Source: Bengio, Leonard & Courville 2013, section 4; with a relaxation's derivative in place of the
    identity, Jang, Gu & Poole 2017, "Categorical Reparameterization with Gumbel-Softmax", section 2.2;
    two temperatures: Shah, Yan, Mozer & Liu 2024, "Improving Discrete Optimisation Via Decoupled
    Straight-Through Estimator". Differs: k-hot, so that the noise draws a subset.
    """

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The hard loss, with the relaxation's gradient."""
        operator, options = bound(self.operator)
        ranked = self.ranked(step)
        if step.wants == "mask":
            soft = operator(ranked, step.k, self.temperature, **options)
            return step.loss(straight_through(hard_mask(ranked, step.k), soft))
        soft = operator.selection(ranked, step.k, self.temperature, **options)
        return step.of(straight_through(hard_selection(ranked, step.k), soft))
