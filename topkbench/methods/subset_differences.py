"""SIMPLE-F and SIMPLE-B: between I-MLE and SIMPLE, one half of I-MLE made exact in each."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step, positive, refuse
from topkbench.methods.noises import sum_of_gammas
from topkbench.methods.subset import OfSubset, loss_and_slope
from topkbench.operators import About, hard_mask
from topkbench.operators.subset import marginals, sample


@dataclass(frozen=True)
class OfDifference(OfSubset):
    """What the two share: the difference between the law at s and at s - lambda g, over lambda.

    Attributes:
        temperature: > 0, divides the scores; a tensor `(R, 1, 1)` gives each replicate its own.
        strength: lambda, > 0: how far the target lies.

    Raises:
        ValueError: temperature or strength <= 0, infinite or NaN.
    """

    strength: float = 2.5

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(strength=self.strength)

    def _surrogate(
        self, step: Step, loss: Float[Tensor, "R B"], difference: Float[Tensor, "R B n"]
    ) -> Float[Tensor, "R B"]:
        """The loss, with the difference over lambda as its gradient through the choice."""
        term = (difference * step.scores).sum(-1) / self.strength
        return loss + (term - term.detach())


@dataclass(frozen=True)
class SimpleF(OfDifference):
    """SIMPLE-F: exact draws forward, and the difference of two of them backward.

        z ~ p(s),      g = dL/dz,      z' ~ p(s - lambda g),      vjp = (z - z') / lambda

    p the k-subset distribution with log-odds s / temperature; z and z' are independent. Given z, the mean of
    z' are the marginals mu at s - lambda g, so that the mean over all is
    `(mu(s) - E mu(s - lambda g(z))) / lambda`: for lambda -> 0 that of `Simple`, else biased also where
    the loss is linear. Masks only.

    Source: Ahmed, Zeng, Niepert & Van den Broeck 2023, "SIMPLE: A Gradient Estimator for k-Subset Sampling",
    its comparison with I-MLE (lambda = 2.5). Differs: divided by lambda, which the published code leaves
    out, so that a learning rate means the same at every lambda; a temperature (there 1).
    """

    about: ClassVar[About] = About(
        "finite difference", "n k log n", "Ahmed et al. 2023", "enumeration; published toy"
    )

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the draw."""
        z = self._draw(step)
        if not torch.is_grad_enabled():
            return step.of(z)
        loss, g = loss_and_slope(step, z)
        _, rows, n = step.scores.shape
        uniforms = step.noise("target", rows, n - 1, law="uniform")
        target = sample(step.scores.detach() - self.strength * g, step.k, self.temperature, uniforms)
        return self._surrogate(step, loss, z - target)


@dataclass(frozen=True)
class SimpleB(OfDifference):
    """SIMPLE-B: perturb and maximise forward, the difference of exact marginals backward.

        z = H(s + temperature e),      g = dL/dz,      vjp = (mu(s) - mu(s - lambda g)) / lambda

    e is the sum of gammas of I-MLE (see `noises.sum_of_gammas`), so that z is nearly a draw from the k-subset
    distribution with log-odds s / temperature; mu are the marginals of that law. For lambda -> 0 it is
    `Simple` at the perturbed top-k. Masks only.

    Source: Ahmed, Zeng, Niepert & Van den Broeck 2023, "SIMPLE: A Gradient Estimator for k-Subset Sampling",
    its comparison with I-MLE (lambda = 2.5). Differs: divided by lambda, which the published code leaves
    out, so that a learning rate means the same at every lambda; a temperature (there 1).
    """

    about: ClassVar[About] = About(
        "finite difference", "n k log n", "Ahmed et al. 2023", "explicit formula; published toy"
    )

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the perturbed top-k."""
        refuse(self, step)
        scores = step.scores.detach()
        noise = sum_of_gammas(step, "perturbation", *scores.shape[1:])
        z = hard_mask(scores + self.temperature * noise, step.k)
        if not torch.is_grad_enabled():
            return step.of(z)
        loss, g = loss_and_slope(step, z)
        here, there = (marginals(s, step.k, self.temperature) for s in (scores, scores - self.strength * g))
        return self._surrogate(step, loss, here - there)
