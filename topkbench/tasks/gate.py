"""`gate`: the mask alone, times constants. W acts through the choice alone: the hard gradient is 0."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Part
from topkbench.operators.hard import hard_mask_of_data
from topkbench.randomness import Noise
from topkbench.tasks._contract import Batch, Teacher
from topkbench.tasks.planted import Planted, half_squared_error, relative_distance

LEAST = 0.5  # no c is so small that taking its score in or leaving it out hardly matters


@dataclass(frozen=True)
class Gate(Planted):
    """z = m(W x) * c; the loss is |z - z*|^2 / 2 with z* = m(W* x) * c + noise, c = 1/2 + |N(0, 1)|.

    c is planted, n numbers for each replicate. The loss is a step function of W, so autograd's gradient
    through the hard mask is zero everywhere, though the mean loss is a smooth function of W. The mask does
    not change when all scores are scaled or shifted alike: W* is identifiable up to a positive factor and
    a vector added to every row.
    """

    wants: ClassVar[Part] = "mask"

    def teacher(self, noise: Noise) -> Teacher:
        """W* and c."""
        return {**super().teacher(noise), "c": LEAST + noise("c", self.n).abs()}

    def target(self, scores: Float[Tensor, "R B n"], teacher: Teacher) -> Tensor:
        """C where the teacher keeps a score, 0 elsewhere: `(R, B, n)`."""
        return hard_mask_of_data(scores, self.k) * teacher["c"].unsqueeze(-2)

    def loss(self, part: Tensor, scores: Float[Tensor, "R B n"], batch: Batch) -> Float[Tensor, "*losses"]:  # noqa: ARG002
        """Half the squared error of the mask times c."""
        return half_squared_error(part * batch.teacher["c"].unsqueeze(-2), batch.target)

    def distance(self, matched: Float[Tensor, "R n d"], teacher: Teacher) -> Float[Tensor, " R"]:
        """`|a W - W*| / |W*|`, rows centred, at the factor a >= 0 where it is least: in [0, 1].

        NaN where k = n: W is then not identifiable.
        """
        if self.k == self.n:  # everything is kept, whatever W is
            return matched.new_full((len(matched),), torch.nan)
        centred, target = (w - w.mean(-2, keepdim=True) for w in (matched, teacher["W"]))
        size = centred.square().sum((1, 2), keepdim=True)
        a = (centred * target).sum((1, 2), keepdim=True).clamp(min=0) / size.clamp(min=1e-30)
        return relative_distance(a * centred, target)
