"""Systematic sampling: a hard mask that is drawn so that its mean is a relaxed one."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import OfOperator, Step
from topkbench.operators import About, hard_selection
from topkbench.operators._contract import bound
from topkbench.operators.hard import straight_through


@dataclass(frozen=True)
class Systematic(OfOperator):
    """Draw k of n with the probabilities of a relaxed mask p; its vector-Jacobian product backward.

        z_i = ceil(c_i - u) - ceil(c_{i-1} - u),    c = cumsum p,  u uniform on (0, 1)

    Exactly k ones and E z = p, so that the gradient is unbiased where the loss is linear in the mask. Which
    items are drawn together depends on their order. Where values are wanted, row j of the selection is the
    one-hot of the j-th largest of the drawn scores, and its gradient that of the operator's row j.

    Attributes:
        operator: One of `topkbench.operators` whose mask is in [0, 1] and sums to k, or a
            `functools.partial` of one.
        temperature: > 0; a tensor `(R, 1, 1)` gives each replicate its own (its values are not looked at).

    Raises:
        TypeError: operator is neither of the two.
        ValueError: its mask is no vector of probabilities; temperature <= 0, infinite or NaN.

    Source: Madow 1949, "On the Theory of Systematic Sampling, II" (the draw). Differs: the probabilities are
    a relaxed top-k mask, with its gradient.
    """

    about: ClassVar[About] = About("straight-through", "as the operator", "Madow 1949", "exact mean")

    @property
    def stochastic(self) -> bool:
        """It draws a subset."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        operator, _ = bound(self.operator)
        if not (operator.guarantees.bounded and operator.guarantees.sums_to_k):
            raise ValueError("operator must have a mask in [0, 1] that sums to k, such as entropic")

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the draw, with the gradient of the relaxation."""
        operator, options = bound(self.operator)
        soft = operator(step.scores, step.k, self.temperature, **options)
        start = step.noise("start", step.scores.shape[1], 1, law="uniform")
        hard = drawn(soft.detach(), step.k, start)
        if step.wants == "values":
            soft = operator.selection(step.scores, step.k, self.temperature, **options)
            kept = step.scores.detach().masked_fill(hard == 0, -torch.inf)
            hard = hard_selection(kept, step.k)
        return step.of(straight_through(hard, soft))


def drawn(
    mask: Float[Tensor, "*rows n"], k: int, start: Float[Tensor, "*rows 1"]
) -> Float[Tensor, "*rows n"]:
    """What a comb of k teeth, one apart, the first at `start` in (0, 1), hits along cumsum(mask)."""
    # In float64, and ending at k whatever the rounding of the sum, or there would not be k ones.
    reached = mask.double().cumsum(-1)
    reached = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], -1).clamp(max=k)
    teeth = (torch.cat([reached, torch.full_like(reached[..., :1], k)], -1) - start).ceil()
    return teeth.diff(dim=-1).to(mask.dtype)
