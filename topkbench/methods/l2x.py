"""L2X: the largest of k independent Gumbel-softmax draws, item by item."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step, positive, refuse
from topkbench.operators import About
from topkbench.operators._contract import Part, Temperature, check_size


@dataclass(frozen=True)
class L2X:
    """The task's loss of the mask `max_{j=1..k} softmax((s + G_j) / temperature)`, G_j Gumbel noise.

    As temperature goes to 0, a mask of k draws *with* replacement: up to k ones, fewer where they coincide.
    The gradient at an item goes to the draw that has the maximum there.

    Attributes:
        temperature: > 0; a tensor `(R, 1, 1)` gives each replicate its own.

    Raises:
        ValueError: temperature <= 0, infinite or NaN.

    Source: Chen, Song, Wainwright & Jordan 2018, "Learning to Explain: An Information-Theoretic Perspective
    on Model Interpretation".
    """

    about: ClassVar[About] = About(
        "noisy relaxation", "k n, memory k n", "Chen et al. 2018", "explicit formula"
    )
    temperature: Temperature = 0.1
    stochastic: ClassVar[bool] = True
    wants: ClassVar[tuple[Part, ...]] = ("mask",)

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the relaxed mask.

        Raises:
            ValueError: the task wants values: the draws have no order.
        """
        refuse(self, step)
        check_size(step.k * step.scores.numel(), step.scores, "k draws")
        noise = step.noise("draws", step.k, *step.scores.shape[1:], law="gumbel").movedim(1, 0)
        return step.of(((step.scores + noise) / self.temperature).softmax(-1).max(0).values)
