"""The noise that samplers put on the scores, each replicate's from its own generator."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step

Law = Literal["none", "gumbel", "normal", "gamma"]
LAWS: tuple[str, ...] = ("none", "gumbel", "normal", "gamma")
TERMS = 10  # of the sum of gammas, as in the published code


def draws(step: Step, name: str, law: Law, samples: int) -> Float[Tensor, "*samples R B n"]:
    """Standard noise for every score, `samples` times; without a sample axis where that is 1.

    Args:
        step: Whose generators, and for how many scores.
        name: Of the stream.
        law: "none" gives zeros.
        samples: How many, >= 1.
    """
    shape = (samples, *step.scores.shape[1:])
    if law == "none":
        noise = step.scores.new_zeros(samples, *step.scores.shape)
    elif law == "gamma":
        noise = sum_of_gammas(step, name, *shape).movedim(1, 0)
    else:
        noise = step.noise(name, *shape, law=law).movedim(1, 0)
    return noise[0] if samples == 1 else noise


def sum_of_gammas(step: Step, name: str, *shape: int) -> Float[Tensor, "*noise"]:
    """Noise `(R, *shape)` of which the sum over any k scores has nearly the Gumbel law.

    `(sum_{i=1..m} k/i * Gamma(1/k) - log m) / k`, m = TERMS; exactly Gumbel in the limit of m, so that the
    perturbed top-k nearly draws from the exponential family on k-subsets.

    Source: Niepert, Minervini & Franceschi 2021, "Implicit MLE: Backpropagating Through Discrete Exponential
    Family Distributions", Theorem 1.
    """
    gammas = step.noise(name, TERMS, *shape, law="gamma", a=1 / step.k)
    weights = step.k / torch.arange(1, TERMS + 1, dtype=gammas.dtype, device=gammas.device)
    total = (gammas * weights.reshape(-1, *[1] * len(shape))).sum(1)
    return (total - math.log(TERMS)) / step.k
