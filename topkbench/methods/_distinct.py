"""Distinct outcomes of a subset law, drawn without replacement: what their estimators share."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkbench.methods._contract import Step
from topkbench.methods.score_function import Law
from topkbench.operators import plackett_luce, subset
from topkbench.operators._contract import Temperature
from topkbench.operators.sequential import Distinct, distinct_orders, distinct_subsets


def drawn(step: Step, law: Law, temperature: Temperature, samples: int) -> Distinct:
    """Outcomes, as many as samples or as there are, in front."""
    _, rows, n = step.scores.shape

    def waits(item: int, beams: int) -> Tensor:
        return step.noise(f"item {item}", rows, beams, n, law="exponential")

    draw = distinct_subsets if law == "conditional_poisson" else distinct_orders
    return draw(step.scores, step.k, temperature, samples, waits)


def losses_of(
    step: Step, picks: Int[Tensor, "M R B k"]
) -> tuple[Float[Tensor, "M R B"], Float[Tensor, "M R B n"]]:
    """The loss of each outcome, and its mask."""
    scores = step.scores.expand(*picks.shape[:-1], -1)
    masks = torch.zeros_like(scores, memory_format=torch.contiguous_format).scatter(-1, picks, 1)
    if step.wants == "mask":
        return step.loss(masks), masks
    return step.loss(scores.gather(-1, picks).sort(-1, descending=True).values), masks


def log_probability(
    step: Step,
    law: Law,
    temperature: Temperature,
    picks: Int[Tensor, "M R B k"],
    masks: Float[Tensor, "M R B n"],
) -> Float[Tensor, "M R B"]:
    """That of each outcome, differentiable in the scores."""
    if law == "conditional_poisson":
        return subset.log_probability(step.scores, masks, step.k, temperature)
    return plackett_luce.log_probability(step.scores, picks, temperature)
