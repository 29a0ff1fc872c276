"""Gumbel-Rao: the straight-through gradient, averaged over all the noise that gives the same draw.

A top-k of s + G in order, i_1, ..., i_k, is a race: with T = exp(-(s + G)) item i arrives at T_i ~ Exp(w_i),
w = exp(s), and the k first are taken. Given their order the arrival times are, with R_j the sum of w over
those not among the j - 1 first,

    T_{i_1} = E_1 / R_1,     T_{i_j} = T_{i_{j-1}} + E_j / R_j,     T_i = T_{i_k} + E_i / w_i  for the others,

E independent standard exponentials. u = -log T is then a draw of s + G with that top-k.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkbench.methods._contract import OfOperator, Step, positive
from topkbench.operators import About, hard_mask, hard_selection
from topkbench.operators._contract import bound, check_size
from topkbench.operators.hard import straight_through


@dataclass(frozen=True)
class GumbelRao(OfOperator):
    """Straight-through Gumbel top-k with the relaxation's gradient averaged over `samples` conditional draws.

    It has the mean of `StraightThrough(operator, temperature, noise="gumbel")` and never more variance; the
    draw, and with it the loss, is the same. No gradient flows through the conditional noise.

    Attributes:
        operator: Any of `topkbench.operators`, or a `functools.partial` of one with its options.
        temperature: > 0; a tensor `(R, 1, 1)` gives each replicate its own (its values are not looked at).
        samples: How many conditional draws, >= 1.
        scale: How strong the noise is, > 0.

    Raises:
        TypeError: operator is neither of the two.
        ValueError: temperature, samples or scale out of range.

    Source: Paulus, Maddison & Krause 2021, "Rao-Blackwellizing the Straight-Through Gumbel-Softmax Gradient
    Estimator"; the law of the race: Yellott 1977. Differs: k-hot, given the order of the draw.
    """

    about: ClassVar[About] = About(
        "straight-through", "K times the operator", "Paulus, Maddison & Krause 2021", "straight-through mean"
    )
    samples: int = 10
    scale: float = 1.0

    @property
    def stochastic(self) -> bool:
        """It draws a subset, and then noise."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(scale=self.scale)
        if self.samples < 1:
            raise ValueError(f"samples must be >= 1, got {self.samples}")

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the draw; its gradient is the mean over conditional noise."""
        operator, options = bound(self.operator)
        scores, rows = step.scores, step.scores.shape[1:]
        check_size(self.samples * (step.k + 1) * scores.numel(), scores, "conditional draws")
        drawn = scores.detach() + self.scale * step.noise("ranking", *rows, law="gumbel")
        index = drawn.topk(step.k, dim=-1).indices
        waits = step.noise("race", self.samples, *rows, law="exponential").movedim(1, 0)
        u = self.scale * conditional(scores.detach() / self.scale, index, waits)
        ranked = u + (scores - scores.detach())
        values = step.wants == "values"
        part = operator.selection if values else operator
        soft = part(ranked, step.k, self.temperature, **options).mean(0)
        hard = hard_selection(drawn, step.k) if values else hard_mask(drawn, step.k)
        return step.of(straight_through(hard, soft))


def conditional(
    scores: Float[Tensor, "*rows n"], index: Int[Tensor, "*rows k"], waits: Float[Tensor, "draws *rows n"]
) -> Float[Tensor, "draws *rows n"]:
    """Scores with Gumbel noise, given that their top-k is `index`, in this order.

    Args:
        scores: `(..., n)`.
        index: `(..., k)`, the largest first.
        waits: Independent standard exponentials `(draws, ..., n)`: that of each item.

    Returns:
        The noisy scores `(draws, ..., n)`.
    """
    # In logarithms throughout: R_k may be many orders of magnitude below R_1.
    of_taken = scores.gather(-1, index)
    others = scores.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
    from_last = torch.cat([others, of_taken.flip(-1)], -1).logcumsumexp(-1)
    rates = from_last[..., 1:].flip(-1)
    index = index.expand(len(waits), *index.shape)
    arrivals = (waits.log().gather(-1, index) - rates).logcumsumexp(-1)
    late = torch.logaddexp(arrivals[..., -1:], waits.log() - scores)
    return -late.scatter(-1, index, arrivals)
