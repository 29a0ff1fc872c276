"""Gates between 0 and 1 with exact zeros and ones, each with noise of its own, and the path derivative.

Both sources learn a gate's location and pay for the expected number of open gates. Here a location is a
score less a threshold that makes that number k: there is nothing to pay for. **The mask sums to k in no
sense but that k entries are positive in the mean**; what is evaluated is the hard top-k all the same.

The gradient is that of the mean loss of these soft masks, unbiased; not that of open or shut gates. As the
temperature goes to 0 the mask is the hard one. Where k = n it is all ones.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step, positive, refuse
from topkbench.methods._gates import levels
from topkbench.operators import About
from topkbench.operators._contract import Part, Temperature
from topkbench.operators._kernels import Gaussian, Logistic


@dataclass(frozen=True)
class HardConcrete:
    """A concrete gate, stretched beyond 0 and 1 and cut off there.

        z = clip((1 + 2 stretch) sigmoid((logit(u) + l) / softness) - stretch, 0, 1)
        l = a + softness log(stretch / (1 + stretch)),    a = scores / temperature - t

    so that `P(z_i > 0) = sigmoid(a_i)`, with t such that these sum to k: the mask of `entropic`.

    Attributes:
        temperature: > 0, divides the scores; a tensor `(R, 1, 1)` gives each replicate its own.
        softness: > 0, the beta of the source; the lower, the more gates are at 0 or 1.
        stretch: > 0, how far beyond 0 and 1: the source's gamma is -stretch, its zeta 1 + stretch.

    Raises:
        ValueError: one of them <= 0, infinite or NaN.

    Source: Louizos, Welling & Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization".
    Differs: the expected number of gates that are not 0 is k by a threshold, where in the source it is
    penalised; and there a gate belongs to a weight, here to a score.
    """

    about: ClassVar[About] = About(
        "independent gates", "n", "Louizos, Welling & Kingma 2018", "explicit formula; relaxit; exact count"
    )
    temperature: Temperature = 1.0
    softness: float = 2 / 3
    stretch: float = 0.1
    stochastic: ClassVar[bool] = True
    wants: ClassVar[tuple[Part, ...]] = ("mask",)

    def __post_init__(self) -> None:
        positive(temperature=self.temperature, softness=self.softness, stretch=self.stretch)

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the gates."""
        refuse(self, step)
        a = levels(step.scores, step.k, self.temperature, Logistic())
        u = step.noise("gates", *step.scores.shape[1:], law="uniform")
        location = a + self.softness * math.log(self.stretch / (1 + self.stretch))
        gates = ((u.logit() + location) / self.softness).sigmoid()
        return step.of((gates * (1 + 2 * self.stretch) - self.stretch).clamp(0, 1))


@dataclass(frozen=True)
class StochasticGates:
    """A gate with normal noise, cut off at 0 and 1.

        z = clip(scale (a + e), 0, 1),    e standard normal,    a = scores / temperature - t

    so that `P(z_i > 0) = Phi(a_i)`, with t such that these sum to k: the mask of `gaussian`.

    Attributes:
        temperature: > 0, divides the scores; a tensor `(R, 1, 1)` gives each replicate its own.
        scale: > 0, how strong the noise is against the width 1 of a gate: the sigma of the source, whose mu
            is scale * a.

    Raises:
        ValueError: one of them <= 0, infinite or NaN.

    Source: Yamada, Lindenbaum, Negahban & Kluger 2020, "Feature Selection using Stochastic Gates" (STG).
    Differs: the expected number of gates that are not 0 is k by a threshold, where in the source it is
    penalised.
    """

    about: ClassVar[About] = About(
        "independent gates", "n", "Yamada et al. 2020", "explicit formula; relaxit; exact count"
    )
    temperature: Temperature = 1.0
    scale: float = 0.5
    stochastic: ClassVar[bool] = True
    wants: ClassVar[tuple[Part, ...]] = ("mask",)

    def __post_init__(self) -> None:
        positive(temperature=self.temperature, scale=self.scale)

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the gates."""
        refuse(self, step)
        a = levels(step.scores, step.k, self.temperature, Gaussian())
        e = step.noise("gates", *step.scores.shape[1:], law="normal")
        return step.of((self.scale * (a + e)).clamp(0, 1))
