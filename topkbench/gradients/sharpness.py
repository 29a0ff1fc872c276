"""How sharp a relaxation is in effect: what makes temperatures of different methods comparable."""

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods import Method
from topkbench.operators._contract import bound
from topkbench.tasks import Batch, Task

AT_ONCE = 128  # rows


@torch.no_grad()
def sharpness(
    method: Method, task: Task, W: Float[Tensor, "R n d"], test: Batch
) -> dict[str, Float[Tensor, " R"]]:
    """`softness`: the mean of 4 m (1 - m) over rows and scores, m the mask of the method's operator.

    0 for a hard mask, 4 (k/n) (1 - k/n) for a uniform one, less where entries exceed 1. Equal temperatures
    are not equally soft: compare methods at equal softness. Empty without an operator, for a method with
    noise, which hardens the mask, and for the identity, which is no mask.
    """
    operator, options = bound(method.operator) if hasattr(method, "operator") else (None, {})
    if operator is None or operator.about.family == "identity" or method.stochastic:
        return {}
    temperature = getattr(method, "temperature", 1.0)
    total = W.new_zeros(len(W))
    for piece in test.pieces(AT_ONCE):
        mask = operator(task.scores(W, piece), task.k, temperature, **options)
        total += (4 * mask * (1 - mask)).mean(-1).sum(-1)
    return {"softness": total / test.x.shape[1]}
