"""Perturbed top-k: the mean of noisy hard masks forward, the gradient of its expectation backward."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step, positive
from topkbench.operators import About
from topkbench.operators._contract import Temperature
from topkbench.operators.perturbed import Law, check_draws, perturbed_mask, perturbed_selection


@dataclass(frozen=True)
class Perturbed:
    """The task's loss of the mean of `samples` hard masks (or selections) of noisy scores.

    Its gradient is unbiased where the loss is linear in the mask; else of order 1 / samples off, as g is
    taken at a mean of the same draws.

    Attributes:
        temperature: > 0, the size of the noise; a tensor `(R, 1, 1)` gives each replicate its own.
        samples: How many noisy copies, >= 1; even where they come in pairs, >= 2 where centred.
        noise: The law of the noise, standard: "normal" or "gumbel".
        antithetic: Whether it is drawn in pairs Z, -Z (normal only).
        centred: Whether each draw is compared with the mean of the others.

    Raises:
        ValueError: temperature or samples out of range, or an unknown noise.

    Source: Berthet et al. 2020, "Learning with Differentiable Perturbed Optimizers". Differs:
    see `operators.perturbed.perturbed_mask`.
    """

    about: ClassVar[About] = About(
        "perturbed", "N top-k, memory N n", "Berthet et al. 2020", "enumeration, normal law; pyepo, optax"
    )
    temperature: Temperature = 1.0
    samples: int = 10
    noise: Law = "normal"
    antithetic: bool = False
    centred: bool = True
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)
        check_draws(self.samples, self.noise, self.antithetic, self.centred)

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the mean; its gradient is the estimate."""
        count = self.samples // 2 if self.antithetic else self.samples
        noise = step.noise("perturbation", count, *step.scores.shape[1:], law=self.noise)
        part = (perturbed_selection if step.wants == "values" else perturbed_mask)(
            step.scores,
            step.k,
            self.temperature,
            samples=self.samples,
            law=self.noise,
            antithetic=self.antithetic,
            centred=self.centred,
            noise=noise.movedim(1, 0),
        )
        return step.of(part)
