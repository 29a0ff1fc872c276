"""The score function (REINFORCE): a drawn subset forward, its loss times the score of its law backward."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step, positive
from topkbench.operators import About, plackett_luce, subset
from topkbench.operators._contract import Temperature

Law = Literal["conditional_poisson", "plackett_luce"]
Baseline = Literal["none", "leave_one_out"]


@dataclass(frozen=True)
class ScoreFunction:
    """`mean_m (L_m - b_m) d log p(z_m) / ds + dL_m / ds`, m = 1..samples: unbiased for `d E[L] / ds`.

    Nothing is asked of the loss as a function of the subset: its values are enough. Where it also looks at
    the scores, that part of its gradient is taken with z held constant. Where values are wanted, they are the
    drawn scores, the largest first, whatever the order of the draws: the j-th weighs what rank j weighs.

    Attributes:
        law: Of the subset, with log-odds or logits scores / temperature. "conditional_poisson": the k-subset
            distribution, score z - mu. "plackett_luce": Gumbel top-k, with the score of the draws in order.
        samples: M >= 1, how many subsets are drawn for each row.
        baseline: b_m: "none", or "leave_one_out", the mean of the other M - 1 losses (needs samples >= 2).
        temperature: > 0; a tensor `(R, 1, 1)` gives each replicate its own.

    Raises:
        ValueError: an unknown law or baseline, too few samples, temperature <= 0, infinite or NaN.

    Source: Williams 1992, "Simple Statistical Gradient-Following Algorithms"; Kool, van Hoof & Welling 2019,
    "Buy 4 REINFORCE Samples, Get a Baseline for Free!", for leave_one_out; Wijk, Vinuesa & Azizpour 2024,
    "SFESS", for k-subsets: conditional_poisson, and with control variates (SFESS-V) leave_one_out besides, as
    far as their published code tells. Differs: the score of the conditional law from a tree, not a Fourier
    transform. In that code the draws are Gumbel top-k, which is the other law, and the baseline of each draw
    is the mean of all M, its own loss among them: (M - 1) / M of the gradient here.
    """

    about: ClassVar[About] = About(
        "score function", "n k log n and M losses", "Williams 1992; Kool et al. 2019", "enumeration"
    )
    law: Law = "conditional_poisson"
    samples: int = 1
    baseline: Baseline = "none"
    temperature: Temperature = 1.0
    stochastic: ClassVar[bool] = True
    needs_objective: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, given, allowed in (("law", self.law, Law), ("baseline", self.baseline, Baseline)):
            if given not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {given!r}")
        least = 2 if self.baseline == "leave_one_out" else 1
        if not self.samples >= least:
            raise ValueError(f"samples must be >= {least} with baseline={self.baseline}, got {self.samples}")
        positive(temperature=self.temperature)

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The mean loss of the draws."""
        masks, order = self._draws(step)
        losses = step.loss(masks if step.wants == "mask" else _values(step, masks))
        loss = losses.mean(0)
        if not torch.is_grad_enabled():
            return loss
        if order is None:
            log_p = subset.log_probability(step.scores, masks, step.k, self.temperature)
        else:
            log_p = plackett_luce.log_probability(step.scores, order, self.temperature)
        term = (self._advantage(losses.detach()) * log_p).mean(0)
        return loss + (term - term.detach())

    def _draws(self, step: Step) -> tuple[Float[Tensor, "M R B n"], Tensor | None]:
        """Hard masks, and, for Plackett-Luce, which index came first, second, ...: (M, R, B, k)."""
        scores = step.scores.detach()
        _, rows, n = scores.shape
        if self.law == "conditional_poisson":
            uniforms = step.noise("subset", self.samples, rows, n - 1, law="uniform").movedim(1, 0)
            return subset.sample(scores, step.k, self.temperature, uniforms), None
        gumbels = step.noise("gumbel", self.samples, rows, n, law="gumbel").movedim(1, 0)
        order = plackett_luce.gumbel_top_k(scores, step.k, self.temperature, gumbels)
        return torch.zeros_like(gumbels).scatter(-1, order, 1), order

    def _advantage(self, losses: Float[Tensor, "M R B"]) -> Float[Tensor, "M R B"]:
        if self.baseline == "none":
            return losses
        return (losses - losses.mean(0)) * (
            self.samples / (self.samples - 1)
        )  # L_m less the mean of the others


def _values(step: Step, masks: Float[Tensor, "M R B n"]) -> Float[Tensor, "M R B k"]:
    """The scores that were drawn, the largest first, with their gradient."""
    drawn = step.scores.expand_as(masks).masked_fill(masks == 0, -torch.inf)
    return drawn.topk(step.k, dim=-1).values
