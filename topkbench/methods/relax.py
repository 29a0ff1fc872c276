"""RELAX: REBAR with a control variate that learns, for each replicate, to lower the estimate's variance."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step, positive, refuse
from topkbench.methods._gates import levels
from topkbench.methods.subset import loss_and_slope
from topkbench.operators import About
from topkbench.operators._contract import Part, Temperature
from topkbench.operators._kernels import Logistic

DECAY, SQUARES_DECAY, TINY = 0.9, 0.999, 1e-8  # Adam's, as Kingma & Ba 2015 give them


@dataclass(frozen=True)
class RELAX:
    """The score function with a learned control variate c, the noise shared.

        z = a + logit(u),    b = 1[z > 0],    m = sigmoid(z / softness)
        c(m) = eta L(m) + r(m),    r(m) = v' tanh(V' (2 m - 1) + v_0) + r_0
        d E L / da  by  (L(b) - c(m)) (b - p) + dc/dm m (1 - m) / softness * (1 - dz'/da)

    z' and dz'/da are those of `REBAR`, in closed form. Unbiased for independent gates of which k are open in
    the mean (see `bernoulli_gates`), whatever the loss, and whatever eta and r came out of the steps before.
    After an estimate each replicate takes a step of Adam in eta and r that lessens the estimate's squared
    length at the scores, a mean over rows: what the estimate is in the mean does not depend on them, so that
    it is its variance that falls. v and r_0 start at 0: the first estimate is that of REBAR, and so is any
    that is measured where nothing was trained. `step.memory` keeps the parameters, Adam's two moments and
    how many steps there were.

    Attributes:
        temperature: > 0, divides the scores; a tensor `(R, 1, 1)` gives each replicate its own.
        softness: > 0, of the relaxed mask: the temperature of the source.
        eta: How much of the relaxed loss, at the first step, >= 0.
        hidden: How many hidden units r has, >= 1.
        rate: Of Adam, > 0.

    Raises:
        ValueError: temperature, softness or rate <= 0, eta < 0, infinite or NaN; hidden < 1.

    Source: Grathwohl, Choi, Wu, Roeder & Duvenaud 2018, "Backpropagation through the Void: Optimizing Control
    Variates for Black-Box Gradient Estimation". Differs: softness is fixed, where the source learns it too; r
    sees the gates alone, not x, and z through m, as in the published toy; z' is the draw of z given b at the
    same value as z, where the source draws it anew, so that one relaxed loss does; the log-odds are scores
    that share a threshold.
    """

    about: ClassVar[About] = About(
        "independent gates", "n h and 2 losses", "Grathwohl et al. 2018", "quadrature over the noise; REBAR"
    )
    temperature: Temperature = 1.0
    softness: float = 0.5
    eta: float = 1.0
    hidden: int = 16
    rate: float = 0.01
    stochastic: ClassVar[bool] = True
    needs_objective: ClassVar[bool] = True
    wants: ClassVar[tuple[Part, ...]] = ("mask",)

    def __post_init__(self) -> None:
        positive(temperature=self.temperature, softness=self.softness, rate=self.rate)
        if not 0 <= self.eta < float("inf"):
            raise ValueError(f"eta must be >= 0 and finite, got {self.eta}")
        if self.hidden < 1:
            raise ValueError(f"hidden must be >= 1, got {self.hidden}")

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
        path = torch.where(opened, shut / u, p / (1 - u)) * soft * (1 - soft) / self.softness
        phi = self._parameters(step).requires_grad_()
        control, control_slope = self._control(phi, soft, relaxed.detach(), slope)
        g = (loss.detach() - control).unsqueeze(-1) * (b - p) + control_slope * path
        self._learn(step, phi, _at_the_scores(g, p * shut).square().sum(-1).mean(-1))
        term = (g.detach() * a).sum(-1)
        return loss + (term - term.detach())

    def _parameters(self, step: Step) -> Float[Tensor, "R P"]:
        """Eta, V, v_0, v and r_0 side by side."""
        if "control" in step.memory:
            return step.memory["control"].detach()
        replicates, _, n = step.scores.shape
        first = step.noise("control", n * self.hidden) / n**0.5
        zeros = first.new_zeros(replicates, 2 * self.hidden + 1)
        return torch.cat([torch.full_like(zeros[:, :1], self.eta), first, zeros], -1)

    def _control(
        self, phi: Tensor, soft: Tensor, relaxed: Tensor, slope: Tensor
    ) -> tuple[Float[Tensor, "R B"], Float[Tensor, "R B n"]]:
        """The control variate c and dc/dm at the relaxed mask, given its loss and that one's slope."""
        n, h = soft.shape[-1], self.hidden
        eta, first, bias, last, level = phi.unsqueeze(1).split([1, n * h, h, h, 1], -1)
        first = first.reshape(-1, n, h)
        units = ((2 * soft - 1) @ first + bias).tanh()
        value = eta.squeeze(-1) * relaxed + (units * last).sum(-1) + level.squeeze(-1)
        return value, eta * slope + 2 * ((1 - units.square()) * last) @ first.mT

    def _learn(self, step: Step, phi: Tensor, squares: Float[Tensor, " R"]) -> None:
        """A step of Adam against the gradient of each replicate's squares in its parameters."""
        (gradient,) = torch.autograd.grad(squares.sum(), phi)
        nothing, memory = torch.zeros_like(gradient), step.memory
        count = memory.get("control steps", nothing[:, :1]) + 1
        mean = torch.lerp(gradient, memory.get("control mean", nothing), DECAY)
        square = torch.lerp(gradient.square(), memory.get("control squares", nothing), SQUARES_DECAY)
        size = (square / (1 - SQUARES_DECAY**count)).sqrt() + TINY
        move = self.rate * mean / (1 - DECAY**count) / size
        memory |= {
            "control": phi.detach() - move,
            "control steps": count,
            "control mean": mean,
            "control squares": square,
        }


def _at_the_scores(g: Float[Tensor, "R B n"], density: Float[Tensor, "R B n"]) -> Float[Tensor, "R B n"]:
    """What of a gradient in the log-odds reaches the scores, but for the temperature: see `levels`."""
    total = density.sum(-1, keepdim=True)
    return g - density / torch.where(total > 0, total, 1) * g.sum(-1, keepdim=True)
