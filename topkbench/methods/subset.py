"""Methods that draw a k-subset with log-odds scores / temperature and go back through its marginals."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import BOTH, Step, positive, refuse
from topkbench.operators import About
from topkbench.operators._contract import Part, Temperature
from topkbench.operators.hard import hard_selection, straight_through
from topkbench.operators.subset import log_probability, marginals, sample


@dataclass(frozen=True)
class OfSubset:
    """What methods that draw from the k-subset distribution share.

    Attributes:
        temperature: > 0, divides the scores; a tensor `(R, 1, 1)` gives each replicate its own.

    Raises:
        ValueError: temperature <= 0, infinite or NaN.
    """

    temperature: Temperature = 1.0
    stochastic: ClassVar[bool] = True
    wants: ClassVar[tuple[Part, ...]] = ("mask",)

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)

    def _draw(self, step: Step) -> Float[Tensor, "R B n"]:
        """One exact draw for each row of the batch: a hard mask."""
        refuse(self, step)
        _, rows, n = step.scores.shape
        uniforms = step.noise("subset", rows, n - 1, law="uniform")
        return sample(step.scores, step.k, self.temperature, uniforms)


@dataclass(frozen=True)
class Simple(OfSubset):
    """SIMPLE: an exact draw forward, the vector-Jacobian product of the exact marginals backward.

    On masks the estimate of the gradient of the expected loss is unbiased where the loss is linear in the
    mask. Where values are wanted, row j of the selection is the one-hot of the j-th largest of the drawn
    scores, and its gradient that of the nested marginals' differences.

    Source: Ahmed, Zeng, Niepert & Van den Broeck 2023, "SIMPLE: A Gradient Estimator for k-Subset Sampling".
    Differs: a temperature (there 1); the rows for values are ours.
    """

    about: ClassVar[About] = About("subset distribution", "n k log n", "Ahmed et al. 2023", "enumeration")
    wants: ClassVar[tuple[Part, ...]] = BOTH

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the draw, with the gradient of the marginals."""
        hard = self._draw(step)
        if step.wants == "mask":
            soft = marginals(step.scores, step.k, self.temperature)
        else:
            soft = marginals.selection(step.scores, step.k, self.temperature)
            hard = hard_selection(step.scores.detach().masked_fill(hard == 0, -torch.inf), step.k)
        return step.of(straight_through(hard, soft))


@dataclass(frozen=True)
class ReinMaxK(OfSubset):
    """ReinMax for k-subsets: exactly unbiased for a loss that is quadratic in the mask.

    With z the draw, mu and C the mean and covariance of its law and g = dL/dz at z, the gradient is

        (C g + (z - mu) <z - mu, g>) / (2 temperature).

    (For a quadratic f, `f(z) - f(z') = <z - z', f'(z) + f'(z')> / 2`; taken over an independent z' that gives
    the above as an estimate of `Cov(z, f)`.)

    Source: Liu, Dong, Liu, Yu & Gao 2023, "Bridging Discrete and Backpropagation: Straight-Through and
    Beyond", which it equals at k = 1 and temperature 1. Differs: the step from 1 to k is ours.
    """

    about: ClassVar[About] = About(
        "subset distribution", "n k log n", "this project, after Liu et al. 2023", "enumeration; reinmax"
    )

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the draw."""
        z = self._draw(step)
        if not torch.is_grad_enabled():
            return step.of(z)
        loss, g = loss_and_slope(step, z)
        mu = marginals(step.scores, step.k, self.temperature)
        off = z - mu.detach()
        along = off * (off * g).sum(-1, keepdim=True)
        term = ((mu * g).sum(-1) + (along * step.scores / self.temperature).sum(-1)) / 2
        return loss + (term - term.detach())


@dataclass(frozen=True)
class TaylorControl(OfSubset):
    """The score function with the loss's tangent at the marginals as its control variate.

    With z the draw, mu and C the mean and covariance of its law and g = dL/dz at mu, the gradient is

        ((L(z) - L(mu) - <g, z - mu>) (z - mu) + C g) / temperature,

    unbiased whatever the loss, which is evaluated twice, once at a mask that is not hard.

    Source: Gu, Levine, Sutskever & Mnih 2016, "MuProp: Unbiased Backpropagation for Stochastic Neural
    Networks". Differs: there Bernoulli units and their mean-field network, here k-subsets and
    their marginals.
    """

    needs_objective: ClassVar[bool] = True
    about: ClassVar[About] = About(
        "subset distribution", "n k log n and 2 losses", "this project, after Gu et al. 2016", "enumeration"
    )

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the draw."""
        z = self._draw(step)
        loss = step.of(z)
        if not torch.is_grad_enabled():
            return loss
        mu = marginals(step.scores, step.k, self.temperature)
        at_mean, g = loss_and_slope(step, mu)
        rest = (loss - at_mean).detach() - (g * (z - mu.detach())).sum(-1)
        term = rest * log_probability(step.scores, z, step.k, self.temperature) + (g * mu).sum(-1)
        return loss + (term - term.detach())


def loss_and_slope(step: Step, mask: Tensor) -> tuple[Float[Tensor, "R B"], Float[Tensor, "R B n"]]:
    """The loss of a mask held constant, and its derivative with respect to the mask.

    The loss keeps what gradient it has besides: that of the scores, where it looks at them.
    """
    leaf = mask.detach().requires_grad_()
    loss = step.of(leaf)
    (slope,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True, materialize_grads=True)
    return loss, slope
