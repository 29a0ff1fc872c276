"""The gradient of the hard top-k, in the two ways it is usually written (tests hold them together)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step
from topkbench.operators import About, hard_mask, hard_selection, hard_values


@dataclass(frozen=True)
class Hard:
    """`torch.topk` under autograd: a kept score gets its gradient, the choice of what is kept gets none."""

    about: ClassVar[About] = About("hard", "n", "torch.topk", "almost-everywhere derivative, hard_selection")
    stochastic: ClassVar[bool] = False

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The hard loss; its gradient is the almost-everywhere derivative."""
        part = hard_values if step.wants == "values" else hard_mask
        return step.loss(part(step.scores, step.k))


@dataclass(frozen=True)
class HardSelection:
    """`v = S(q) q` with the selection matrix S built explicitly and held constant."""

    about: ClassVar[About] = About("hard", "k n", "selection matrix held constant", "torch.topk")
    stochastic: ClassVar[bool] = False

    def __call__(self, step: Step) -> Float[Tensor, "R B"]:
        """The hard loss; its gradient is `dL/dq = S^T dL/dv`."""
        selection = hard_selection(step.scores, step.k)
        if step.wants == "values":
            return step.loss((selection @ step.scores.unsqueeze(-1)).squeeze(-1))
        return step.loss(selection.sum(-2))
