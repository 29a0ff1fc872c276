"""The score function over distinct subsets: none of the losses is spent on one that is known already."""

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step, one_of, positive
from topkbench.methods._distinct import drawn, log_probability, losses_of
from topkbench.methods.score_function import Law
from topkbench.operators import About
from topkbench.operators._contract import Temperature


@dataclass(frozen=True)
class ScoreFunctionWithoutReplacement:
    """M distinct outcomes, each weighed by its chance to be among them: unbiased for `d E[L] / ds`.

        sum_m w_m (A_m d log p_m / ds + dL_m / ds),      w_m = p_m / q_m,
        A_m = L_m (1 - p_m + w_m) - sum_j w_j L_j = L_m (1 - p_m) - sum_(j != m) w_j L_j

    q_m = 1 - exp(-p_m exp(-kappa)) is the chance that outcome m has a perturbed log-probability over kappa,
    the (M+1)-th largest of all. The term L_m (w_m - p_m) mends what the baseline, of which L_m is a part,
    would bias. With M at least the number of outcomes every w_m is p_m: the gradient is exact.

    The value is `sum_m w_m L_m`, unbiased for E L. The weights sum to 1 in the mean only, so that a constant
    added to the loss adds variance: the more, the less any outcome stands out. `normalized` divides by their
    sum W = sum_m w_m, at the price of a bias that M takes away:

        sum_m (w_m / W_m) (L_m - V) d log p_m / ds + (w_m / W) dL_m / ds,
        V = sum_m w_m L_m / W, its value,      W_m = W - w_m + p_m

    Where all p_m are small it is the leave-one-out score function of M draws; with all outcomes, it is the
    exact gradient as well.

    Where values are wanted, they are the drawn scores, the largest first.

    Attributes:
        law: Of the subset, with log-odds or logits scores / temperature. "conditional_poisson": the outcomes
            are k-subsets. "plackett_luce": draws of k in order; the same k in another order are another.
        samples: M >= 2, how many outcomes are drawn for each row.
        normalized: Whether the weights are made to sum to 1: biased, and far less variable.
        temperature: > 0; a tensor `(R, 1, 1)` gives each replicate its own.

    Raises:
        ValueError: an unknown law, samples < 2, temperature <= 0, infinite or NaN.

    Cost: k batched steps one after the other, each M n for a row (see `operators.sequential`), and M losses.

    Source: Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", eqs. (10) and,
    normalised, (11); Kool et al. 2019, "Stochastic Beams", for the draws. Differs: k-subsets in place of
    sequences.
    """

    about: ClassVar[About] = About(
        "score function", "k steps of M n, and M losses", "Kool et al. 2019", "enumeration"
    )
    law: Law = "conditional_poisson"
    samples: int = 4
    normalized: bool = False
    temperature: Temperature = 1.0
    stochastic: ClassVar[bool] = True
    needs_objective: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("law", self.law, get_args(Law))
        if not self.samples >= 2:
            raise ValueError(f"samples must be >= 2, got {self.samples}")
        positive(temperature=self.temperature)

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The weighed loss of the outcomes."""
        picks, p, weight = drawn(step, self.law, self.temperature, self.samples)
        losses, masks = losses_of(step, picks)
        total = weight.sum(0) if self.normalized else 1.0
        loss = (weight / total * losses).sum(0)
        if not torch.is_grad_enabled():
            return loss
        log_p = log_probability(step, self.law, self.temperature, picks, masks)
        given = losses.detach()
        if self.normalized:
            advantage = (given - loss.detach()) / (total - weight + p)
        else:
            advantage = given * (1 - p + weight) - loss.detach()
        term = (weight * advantage * log_p).sum(0)
        return loss + (term - term.detach())
