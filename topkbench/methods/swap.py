"""`swap`: the jump of the loss where ranks k and k+1 change places, weighed by how near they are."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step, one_of, positive, refuse
from topkbench.operators import About, hard_mask
from topkbench.operators._contract import Part, Temperature

Kernel = Literal["rectangular", "triangular", "normal", "logistic"]


@dataclass(frozen=True)
class Swap:
    """The hard loss with its gradient almost everywhere, and a kernel estimate of what that misses.

    With i and j of ranks k and k+1, L' the loss with j kept in i's place, and K a symmetric density,

        dL/ds_i += w,   dL/ds_j -= w,   w = K((s_i - s_j) / T) (L - L') / T.

    The true gradient's surface integral over the ties is here a mean over the rows that are near one: as T
    goes to 0 the bias vanishes as T (T^2 where losses and densities are smooth on both sides), and the
    variance grows as 1 / T. It asks nothing of x, and one more loss a row.

    Attributes:
        temperature: T > 0, the width of the kernel in units of the scores; a tensor `(R, 1, 1)` gives each
            replicate its own.
        kernel: "rectangular" on [-1/2, 1/2], "triangular" on [-1, 1], "normal" or "logistic" of scale 1.

    Raises:
        ValueError: temperature <= 0, infinite or NaN; an unknown kernel.

    Source: this project. Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity with
    JumpReLU Sparse Autoencoders", do the same at the threshold of a JumpReLU.
    """

    about: ClassVar[About] = About(
        "finite difference", "one top-k and 2 losses", "this project", "its limit: the boundary flux"
    )
    temperature: Temperature = 0.3
    kernel: Kernel = "rectangular"
    stochastic: ClassVar[bool] = False
    needs_objective: ClassVar[bool] = True
    wants: ClassVar[tuple[Part, ...]] = ("mask",)

    def __post_init__(self) -> None:
        positive(temperature=self.temperature)
        one_of("kernel", self.kernel, get_args(Kernel))

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The hard loss."""
        refuse(self, step)
        mask = hard_mask(step.scores, step.k)
        loss = step.of(mask)
        if not torch.is_grad_enabled() or step.k == step.scores.shape[-1]:
            return loss
        top = step.scores.topk(step.k + 1, dim=-1)
        last, next_ = top.indices[..., -2:-1], top.indices[..., -1:]
        gap = top.values[..., -2] - top.values[..., -1]
        with torch.no_grad():
            swapped = mask.scatter(-1, last, 0).scatter(-1, next_, 1)
            width = torch.as_tensor(self.temperature, dtype=gap.dtype, device=gap.device).reshape(-1, 1)
            weight = _density(self.kernel, gap / width) / width * (loss - step.of(swapped))
        term = weight * gap
        return loss + (term - term.detach())


def _density(kernel: Kernel, u: Float[Tensor, "R B"]) -> Float[Tensor, "R B"]:
    """A symmetric density of mass 1 at u >= 0."""
    if kernel == "rectangular":
        return (u < 0.5).to(u.dtype)
    if kernel == "triangular":
        return (1 - u).clamp(min=0)
    if kernel == "normal":
        return (-u.square() / 2).exp() / math.sqrt(2 * math.pi)
    return u.sigmoid() * (-u).sigmoid()
