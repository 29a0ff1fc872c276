"""`values`: the top-k values themselves, weighted by rank. The hard gradient is right almost everywhere."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from topkbench.operators import hard_values
from topkbench.operators._contract import Part
from topkbench.tasks._contract import Batch, Teacher
from topkbench.tasks.planted import Planted, half_squared_error


@dataclass(frozen=True)
class Values(Planted):
    """u = p * topk(W x).values; the loss is |u - u*|^2 / 2 with u* = p * topk(W* x).values + noise.

    p falls linearly from 1 (rank 1) to 1/2 (rank k). The loss is continuous and piecewise smooth in W,
    since a rank passes from one row to another without a jump. It depends on the rows of W, not on their
    order: before W is compared with W*, its rows are matched to those of W* by least squares.
    """

    wants: ClassVar[Part] = "values"

    def target(self, scores: Float[Tensor, "R B n"], teacher: Teacher) -> Tensor:  # noqa: ARG002
        """The weighted top-k values `(R, B, k)`."""
        return self._weighted(hard_values(scores, self.k))

    def loss(self, part: Tensor, scores: Float[Tensor, "R B n"], batch: Batch) -> Float[Tensor, "*losses"]:  # noqa: ARG002
        """Half the squared error of the weighted values."""
        return half_squared_error(self._weighted(part), batch.target)

    def match(self, W: Float[Tensor, "R n d"], teacher: Teacher) -> Float[Tensor, "R n d"]:
        """The rows of W in the order that is nearest to W* (Hungarian method, on the CPU)."""
        closeness = (teacher["W"] @ W.mT).double().nan_to_num().cpu().numpy()
        order = [linear_sum_assignment(one, maximize=True)[1].tolist() for one in closeness]
        return W.gather(1, torch.tensor(order, device=W.device).unsqueeze(-1).expand_as(W))

    def _weighted(self, values: Tensor) -> Tensor:
        return values * torch.linspace(1, 0.5, self.k, dtype=values.dtype, device=values.device)
