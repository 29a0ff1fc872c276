"""ARMS: two or more masks of independent gates, each gate's states negatively correlated across the masks."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from topkbench.methods._contract import Step, one_of, positive, refuse
from topkbench.methods._gates import levels
from topkbench.operators import About
from topkbench.operators._contract import Part, Temperature, check_size
from topkbench.operators._kernels import Logistic

Copula = Literal["dirichlet", "gaussian"]
NODES = 32  # a relative error below 1e-13 where a state has a chance above 1e-15, below 1e-7 elsewhere


@dataclass(frozen=True)
class ARMS:
    """Leave-one-out REINFORCE on N masks that are antithetic gate by gate, corrected for it.

        d E L / da_i  by  sum_m (L(b_m) - mean L) b_mi / (N - 1) / (1 - rho_i)

    Gate i is open in mask m where u_mi < p_i (p_i < 1/2; else where 1 - u_mi < p_i). u_1i, ..., u_Ni are
    uniform each and exchangeable, independent of the other gates'; rho_i is the correlation of two masks'
    states of gate i, `1 / (1 - rho) = q (1 - q) / (q - C(q, q))`, q = min(p, 1 - p), C the copula of a pair.
    Another mask's loss is not independent of b_m: as a baseline it multiplies the mean by 1 - rho_i, which
    the division undoes. Unbiased for independent gates of which k are open in the mean (see
    `bernoulli_gates`), whatever the loss. With N = 2 either copula is u, 1 - u, and this is `DisARM`.

    Attributes:
        temperature: > 0, divides the scores; a tensor `(R, 1, 1)` gives each replicate its own.
        samples: N, how many masks and losses, >= 2.
        copula: "dirichlet": `u_m = (1 - d_m)^(N - 1)`, d uniform on the simplex, C(q, q) =
            max(2 q^(1 / (N - 1)) - 1, 0)^(N - 1). "gaussian": u_m = Phi(g_m), g normal with correlations
            -1 / (N - 1), C the bivariate normal cdf.

    Raises:
        ValueError: temperature <= 0, infinite or NaN; samples < 2; an unknown copula.

    Source: Dimitriev & Zhou 2021, "ARMS: Antithetic-REINFORCE-Multi-Sample Gradient for Binary Variables",
    with its published code. Differs: the log-odds are scores that share a threshold, where in the source
    each is free; nothing is added to the denominator of the correction, where that code adds 1e-6; C of the
    normal law by quadrature of Owen's integral, without the code's 0.001 on its variance.
    """

    about: ClassVar[About] = About(
        "independent gates", "N n and N losses", "Dimitriev & Zhou 2021", "enumeration; DisARM; its own toy"
    )
    temperature: Temperature = 1.0
    samples: int = 4
    copula: Copula = "dirichlet"
    stochastic: ClassVar[bool] = True
    needs_objective: ClassVar[bool] = True
    wants: ClassVar[tuple[Part, ...]] = ("mask",)

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)
        one_of("copula", self.copula, get_args(Copula))
        if self.samples < 2:
            raise ValueError(f"samples must be >= 2, got {self.samples}")

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The mean loss of the masks."""
        refuse(self, step)
        check_size(self.samples * step.scores.numel(), step.scores, "masks")
        a = levels(step.scores, step.k, self.temperature, Logistic())
        known = a.detach()
        masks = (self._rare(step, known) == (known < 0)).to(a.dtype)
        losses = step.of(masks)
        loss = losses.mean(0)
        if not torch.is_grad_enabled():
            return loss
        advantage = (losses.detach() - loss.detach()).unsqueeze(-1) / (self.samples - 1)
        weight = _of_gaussian if self.copula == "gaussian" and self.samples > 2 else _of_dirichlet
        slope = (advantage * masks).sum(0) * weight(known, self.samples)
        term = (slope * a).sum(-1)
        return loss + (term - term.detach())

    def _rare(self, step: Step, a: Float[Tensor, "R B n"]) -> Bool[Tensor, "N R B n"]:
        """Which gates are in the less likely of their two states, of chance q = sigmoid(-|a|)."""
        q, shape = (-a.abs()).sigmoid(), (self.samples, *a.shape[1:])
        if self.copula == "dirichlet":
            e = step.noise("gates", *shape, law="exponential").movedim(1, 0)
            return (1 - e / e.sum(0)) ** (self.samples - 1) < q
        g = step.noise("gates", *shape).movedim(1, 0)
        return (g - g.mean(0)) * math.sqrt(self.samples / (self.samples - 1)) < torch.special.ndtri(q)


def _of_dirichlet(a: Tensor, samples: int) -> Tensor:
    """`q (1 - q) / (q - C(q, q))`, divided by q: q may round to 0, its root does not matter then."""
    root = (torch.nn.functional.softplus(a.abs()) / (samples - 1)).exp()  # q^(-1 / (N - 1))
    return a.abs().sigmoid() / (1 - (2 - root).clamp(min=0) ** (samples - 1))


def _of_gaussian(a: Tensor, samples: int) -> Tensor:
    """The same, with `q - C(q, q) = 2 T(h, sqrt(N / (N - 2)))`, Phi(h) = q; T as Owen (1956) defines it."""
    q = (-a.abs()).sigmoid()
    end = math.atan2(math.sqrt(samples), math.sqrt(samples - 2))
    x, w = (torch.as_tensor(part, dtype=a.dtype, device=a.device) for part in leggauss(NODES))
    angle = end * (x + 1) / 2
    inside = (-torch.special.ndtri(q).square().unsqueeze(-1) / (2 * angle.cos().square())).exp()
    apart = (inside * w).sum(-1) * end / (2 * math.pi)
    return torch.where(apart > 0, q * a.abs().sigmoid() / apart, 1)
