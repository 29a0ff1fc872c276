"""Poisson sampling: every item is drawn on its own, with probabilities that sum to k."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step, positive, refuse
from topkbench.operators import About
from topkbench.operators._contract import Part, Temperature
from topkbench.operators.hard import straight_through


@dataclass(frozen=True)
class PoissonStraightThrough:
    """z_i ~ Bernoulli(p_i), independent, forward; the vector-Jacobian product of p backward.

    **The mask has k ones only in the mean**: the variance of their number is `sum_i p_i (1 - p_i)`, and the
    loss is that of whatever was drawn. What is evaluated is the hard top-k all the same. The estimate is
    unbiased where the loss is linear in the mask. Masks only: with another number than k there are no k
    values. See `scaled` for p.

    Attributes:
        temperature: > 0, divides the scores; a tensor `(R, 1, 1)` gives each replicate its own.

    Raises:
        ValueError: temperature <= 0, infinite or NaN.

    Source: Pervez, Lippe & Gavves 2023, "Scalable Subset Sampling with Neural Conditional Poisson Networks"
    (NCPSS). Differs: a temperature (there 1); draws of another size are neither rejected nor are the
    probabilities corrected for that, and k is not learned.
    """

    about: ClassVar[About] = About(
        "straight-through", "n", "Pervez, Lippe & Gavves 2023", "enumeration, explicit formula"
    )
    temperature: Temperature = 1.0
    stochastic: ClassVar[bool] = True
    wants: ClassVar[tuple[Part, ...]] = ("mask",)

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the draw, with the gradient of the probabilities."""
        refuse(self, step)
        p = scaled(step.scores / self.temperature, step.k)
        draw = step.noise("items", *step.scores.shape[1:], law="uniform")
        return step.of(straight_through((draw < p).to(p.dtype), p))


def scaled(logits: Float[Tensor, "*rows n"], k: int) -> Float[Tensor, "*rows n"]:
    """Probabilities that sum to k, from independent ones that sum to S.

        p = k a / S where S >= k,    1 - p = (n - k) (1 - a) / (n - S) where S < k,    a = sigmoid(logits)

    In [0, 1] either way, and continuous where S = k. The vector-Jacobian products are
    `(k / S) a (1 - a) (g - <a, g> / S)` and `((n - k) / (n - S)) a (1 - a) (g - <1 - a, g> / (n - S))`.
    A shift of the logits does change p: where all of them are far above 0, or all far below, every p_i goes
    to k / n and the gradient to 0. At a low temperature p is k over their number at the positive logits,
    where there are more than k of them: not the hard mask.

    Source: Pervez, Lippe & Gavves 2023, as restated in later public code; their own was not at hand.
    """
    n = logits.shape[-1]
    a, rest = logits.sigmoid(), (-logits).sigmoid()
    total, left = a.sum(-1, keepdim=True), rest.sum(-1, keepdim=True)
    tiny = torch.finfo(logits.dtype).tiny  # the branch that is not taken must not divide by 0
    down = k * a / total.clamp(min=tiny)
    up = 1 - (n - k) * rest / left.clamp(min=tiny)
    return torch.where(total >= k, down, up)
