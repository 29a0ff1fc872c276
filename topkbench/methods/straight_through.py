"""Straight-through: the hard top-k forward, an operator's vector-Jacobian product backward."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import OfOperator, Step
from topkbench.operators import hard_mask, hard_selection
from topkbench.operators._contract import bound


@dataclass(frozen=True)
class StraightThrough(OfOperator):
    """One rule for every operator: `hard + (soft - soft.detach())`, on the mask or on the selection P.

    The values are `v = P q`, so that their gradient has the hard part `P^T g` and the part that flows
    through the choice. With `topkbench.operators.identity` it is the plain straight-through estimator.

    Source: Bengio, Leonard & Courville 2013, section 4; with a relaxation's derivative in place of the
    identity, Jang, Gu & Poole 2017, "Categorical Reparameterization with Gumbel-Softmax", section 2.2
    (without the noise).
    """

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The hard loss, with the relaxation's gradient."""
        operator, options = bound(self.operator)
        if step.wants == "mask":
            soft = operator(step.scores, step.k, self.temperature, **options)
            return step.loss(_forward(hard_mask(step.scores, step.k), soft))
        soft = operator.selection(step.scores, step.k, self.temperature, **options)
        selection = _forward(hard_selection(step.scores, step.k), soft)
        return step.loss((selection @ step.scores.unsqueeze(-1)).squeeze(-1))


def _forward(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard`, to the last bit, with the gradient of `soft`."""
    return hard + (soft - soft.detach())
