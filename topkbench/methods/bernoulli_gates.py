"""Gates that are open or shut, each drawn on its own: unbiased estimators from values of the loss.

Gate i is open with probability p_i = sigmoid(a_i), `a = scores / temperature - t`, t such that sum p = k:
p is the mask of the `entropic` operator. **The mask has k ones only in the mean**: the variance of their
number is `sum_i p_i (1 - p_i)`, and the loss is that of whatever was drawn. What is evaluated is the hard
top-k all the same. As the temperature goes to 0 the mask is the hard one; as it goes to infinity p is k / n.
Where k = n all gates are open, and there is no gradient but that of a loss that looks at the scores.

The estimators are of `d E L / da`, and from there the chain rule is exact: `(g - w <1, g>) / temperature`,
w = p (1 - p) normalised (see `_gates.levels`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step, positive, refuse
from topkbench.methods._gates import levels
from topkbench.methods.subset import loss_and_slope
from topkbench.operators import About
from topkbench.operators._contract import Part, Temperature, check_size
from topkbench.operators._kernels import Logistic


@dataclass(frozen=True)
class DisARM:
    """Two masks from one uniform draw, antithetic; their losses' difference where a gate differs in them.

        b = 1[u > 1 - p],    b' = 1[u < p],    d E L / da  by  (L(b) - L(b')) / 2 * (b - b') sigmoid(|a|)

    in the mean over `samples` pairs. Unbiased for independent gates of which k are open in the mean (see this
    module's introduction), whatever the loss. A gate with p = 1/2 always differs.

    Attributes:
        temperature: > 0, divides the scores; a tensor `(R, 1, 1)` gives each replicate its own.
        samples: How many pairs, >= 1, of two losses each.

    Raises:
        ValueError: temperature <= 0, infinite or NaN; samples < 1.

    Source: Dong, Mnih & Tucker 2020, "DisARM: An Antithetic Gradient Estimator for Binary Latent Variables".
    Differs: the log-odds are scores that share a threshold, where in the source each is free and nothing
    counts the open gates.
    """

    about: ClassVar[About] = About(
        "independent gates", "n and 2 losses a pair", "Dong, Mnih & Tucker 2020", "enumeration; ARMS's toy"
    )
    temperature: Temperature = 1.0
    samples: int = 1
    stochastic: ClassVar[bool] = True
    needs_objective: ClassVar[bool] = True
    wants: ClassVar[tuple[Part, ...]] = ("mask",)

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)
        if self.samples < 1:
            raise ValueError(f"samples must be >= 1, got {self.samples}")

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The mean loss of the masks."""
        refuse(self, step)
        check_size(2 * self.samples * step.scores.numel(), step.scores, "pairs of masks")
        a = levels(step.scores, step.k, self.temperature, Logistic())
        u = step.noise("gates", self.samples, *step.scores.shape[1:], law="uniform").movedim(1, 0)
        known = a.detach()
        masks = torch.stack([u > (-known).sigmoid(), u < known.sigmoid()]).to(a.dtype)
        losses = step.of(masks)
        loss = losses.mean((0, 1))
        if not torch.is_grad_enabled():
            return loss
        half = (losses[0] - losses[1]).detach() / 2
        slope = (half.unsqueeze(-1) * (masks[0] - masks[1])).mean(0) * known.abs().sigmoid()
        term = (slope * a).sum(-1)
        return loss + (term - term.detach())


@dataclass(frozen=True)
class REBAR:
    """The score function with the loss of a relaxed mask as its control variate, the noise shared.

        z = a + logit(u),    b = 1[z > 0],    m = sigmoid(z / softness),    g = dL/dm at m
        d E L / da  by  (L(b) - eta L(m)) (b - p) + eta g m (1 - m) / softness * c
        c = (1 - p) / u where b = 1,  p / (1 - u) where b = 0

    Unbiased for independent gates of which k are open in the mean (see this module's introduction), whatever
    the loss, eta and softness; low in variance where the loss of m is close to that of b. (c is
    `dz/da - dz'/da`, z' the draw of z given b, at the same value as z: the u that makes them equal.)

    Attributes:
        temperature: > 0, divides the scores; a tensor `(R, 1, 1)` gives each replicate its own.
        softness: > 0, of the relaxed mask: the temperature of the source.
        eta: >= 0, how much of the control variate; 0 leaves the plain score function.

    Raises:
        ValueError: temperature or softness <= 0, eta < 0, infinite or NaN.

    Source: Tucker, Mnih, Maddison, Lawson & Sohl-Dickstein 2017, "REBAR: Low-variance, Unbiased Gradient
    Estimates for Discrete Latent Variable Models". Differs: eta and softness are fixed, where the source
    learns both from the variance; the log-odds are scores that share a threshold; c in closed form, so that
    one relaxed loss does.
    """

    about: ClassVar[About] = About(
        "independent gates", "n and 2 losses", "Tucker et al. 2017", "quadrature over the noise"
    )
    temperature: Temperature = 1.0
    softness: float = 0.5
    eta: float = 1.0
    stochastic: ClassVar[bool] = True
    needs_objective: ClassVar[bool] = True
    wants: ClassVar[tuple[Part, ...]] = ("mask",)

    def __post_init__(self) -> None:
        positive(temperature=self.temperature, softness=self.softness)
        if not 0 <= self.eta < float("inf"):
            raise ValueError(f"eta must be >= 0 and finite, got {self.eta}")

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The loss of the draw."""
        refuse(self, step)
        a = levels(step.scores, step.k, self.temperature, Logistic())
        u = step.noise("gates", *step.scores.shape[1:], law="uniform")
        known = a.detach()
        p, shut = known.sigmoid(), (-known).sigmoid()
        opened = u > shut
        b = opened.to(a.dtype)
        loss = step.of(b)
        if not torch.is_grad_enabled():
            return loss
        soft = ((known + u.logit()) / self.softness).sigmoid()
        relaxed, slope = loss_and_slope(step, soft)
        advantage = (loss - self.eta * relaxed).detach().unsqueeze(-1)
        path = torch.where(opened, shut / u, p / (1 - u)) * soft * (1 - soft) / self.softness
        term = ((advantage * (b - p) + self.eta * slope * path) * a).sum(-1)
        return loss + (term - term.detach())
