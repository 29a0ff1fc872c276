"""`mask`: the scores times their mask. The loss jumps where two scores swap: the hard gradient misses it."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Part
from topkbench.operators.hard import hard_mask_of_data
from topkbench.tasks._contract import Batch, Teacher
from topkbench.tasks.planted import Planted, half_squared_error


@dataclass(frozen=True)
class Mask(Planted):
    """z = m(q) * q with q = W x; the loss is |z - z*|^2 / 2 with z* = m(q*) * q* + noise, q* = W* x.

    A kept score passes its gradient on, so the hard gradient is not zero; but which scores are kept
    changes the loss by a jump, and of that it knows nothing: it is biased. W* is identifiable.
    """

    wants: ClassVar[Part] = "mask"

    def target(self, scores: Float[Tensor, "R B n"], teacher: Teacher) -> Tensor:  # noqa: ARG002
        """The teacher's kept scores, 0 elsewhere: `(R, B, n)`."""
        return hard_mask_of_data(scores, self.k) * scores

    def loss(self, part: Tensor, scores: Float[Tensor, "R B n"], batch: Batch) -> Float[Tensor, "*losses"]:
        """Half the squared error of the mask times the scores."""
        return half_squared_error(part * scores, batch.target)
