"""The true gradient of the mean hard loss, from the mini-batch itself: the best a learner can follow."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step
from topkbench.methods._flux import flux
from topkbench.operators import About, hard_values
from topkbench.operators.hard import hard_mask_of_data


@dataclass(frozen=True)
class Oracle:
    """The hard loss; its gradient is an unbiased estimate of that of the mean hard loss over x.

    - Where the loss is a function of the k largest values, it is continuous, and the gradient of the hard
      top-k is the true one.
    - Where it is a function of the mask, that gradient plus the boundary flux (see `methods._flux`).
    - Where the subset is random and the task enumerates its law, the gradient of the exact mean.

    It needs what no learner has in practice. Scores must be W x, and x must have a density with a known
    conditional density along any line (`tasks.KnownInputs.line_density`): standard normal x in the tasks
    here; a uniform cube or a mixture of normals has one in closed form as well (`tests/test_oracle.py` has
    the cube). For real data there is none: a finite set of rows has a mean hard loss that is piecewise
    constant or smooth in W, with jumps, so that the gradient sought does not exist.

    Attributes:
        near: How far from x a tie is looked for, > 0. Less than infinity takes less time for a row and has a
            larger variance, at the same mean (see `methods._flux`).

    Raises:
        ValueError: near out of range.

    Source: Lee, Yu & Yang 2018, "Reparameterization Gradient for Non-differentiable Models", for the
    two-part gradient; here its surface integral is taken over the ties of the k-th and next score.
    """

    near: float = math.inf
    about: ClassVar[About] = About(
        "oracle",
        "n^2, n for each near tie, a loss a tie",
        "this project, after Lee et al. 2018",
        "differences",
    )
    stochastic: ClassVar[bool] = False
    needs_objective: ClassVar[bool] = True
    needs_truth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.near > 0:
            raise ValueError(f"near must be > 0, got {self.near}")

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The hard loss, or the exact mean.

        Raises:
            ValueError: the task knows neither the density of x nor the exact mean loss.
        """
        if step.expected is not None:
            return step.expected()
        if step.wants == "values":
            return step.loss(hard_values(step.scores, step.k))
        if step.inputs is None:
            raise ValueError("Oracle needs a task whose x has a known density, or whose mean loss is exact")
        loss = step.of(hard_mask_of_data(step.scores, step.k))
        if not torch.is_grad_enabled():
            return loss
        return loss + flux(step, self.near)[:, None]
