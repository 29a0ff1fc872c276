"""The gapped straight-through estimator: a drawn one-hot, and a softmax pushed until it agrees with it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkbench.methods._contract import Step, positive
from topkbench.operators import About
from topkbench.operators._contract import Temperature
from topkbench.operators.hard import straight_through


@dataclass(frozen=True)
class GappedStraightThrough:
    """Straight-through for one of n: D ~ softmax(s) forward, the softmax of moved scores backward.

        u_D = max s,    u_i = s_i - relu(s_i - max s + gap) for the others,    r = softmax(u / temperature),
        vjp = r * (g - <r, g>) / temperature

    The scores are moved just so far that D leads by the gap: the least change with which the relaxation has
    its maximum at the draw. The moves are constants for autograd. Given D nothing is random, unlike with
    Gumbel noise: the estimate varies less.

    Attributes:
        temperature: > 0, of the softmax backward alone; a tensor `(R, 1, 1)` gives each replicate its own.
        gap: > 0, or "probability": `-log(1 - pi_D) / pi_D` with pi = softmax(s), the mean lead of D where it
            leads the scores with Gumbel noise.

    Raises:
        ValueError: temperature or gap <= 0, infinite or NaN; another word.

    Source: Fan, Chi, Rudnicky & Ramadge 2022, "Training Discrete Deep Generative Models via Gapped
    Straight-Through Estimator". Differs: pi is kept below 1 by the rounding of its type, not by 1e-5.
    """

    about: ClassVar[About] = About("straight-through", "n", "Fan et al. 2022", "explicit formula")
    temperature: Temperature = 1.0
    gap: float | Literal["probability"] = 1.0
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)
        if isinstance(self.gap, str):
            if self.gap != "probability":
                raise ValueError(f"gap must be a number > 0 or probability, got {self.gap}")
        else:
            positive(gap=self.gap)

    def check_sizes(self, n: int, k: int) -> None:
        """Refuse all but k = 1.

        Raises:
            ValueError: another k.
        """
        if k != 1:
            raise ValueError(f"GappedStraightThrough draws one of n: k must be 1, got k={k} of n={n}")

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the draw, with the gradient of the softmax of moved scores."""
        self.check_sizes(step.scores.shape[-1], step.k)
        noise = step.noise("draw", *step.scores.shape[1:], law="gumbel")
        drawn = (step.scores.detach() + noise).argmax(-1, keepdim=True)
        hard = torch.zeros_like(noise).scatter(-1, drawn, 1)
        moved = step.scores - self._moves(step.scores.detach(), drawn)
        mask = straight_through(hard, (moved / self.temperature).softmax(-1))
        return step.of(mask if step.wants == "mask" else mask.unsqueeze(-2))

    def _moves(self, scores: Float[Tensor, "R B n"], drawn: Int[Tensor, "R B 1"]) -> Float[Tensor, "R B n"]:
        """How far down each score goes; the drawn one goes up to the largest."""
        lead = scores - scores.amax(-1, keepdim=True)
        gap: Tensor | float
        if isinstance(self.gap, str):
            limits = torch.finfo(scores.dtype)
            pi = scores.softmax(-1).gather(-1, drawn).clamp(limits.tiny, 1 - limits.eps)
            gap = -torch.log1p(-pi) / pi
        else:
            gap = self.gap
        return (lead + gap).relu().scatter(-1, drawn, lead.gather(-1, drawn))
