"""The identity in place of a mask: what the plainest straight-through estimator sends gradients through."""

from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, operator


@operator(has_rows=True, sums_to_k=False, bounded=False, shift_invariant=False, hard_limit=False)
def identity(
    scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0
) -> Float[Tensor, "*rows k n"]:
    """The scores themselves, divided by the temperature; its vector-Jacobian product is `g / temperature`.

    Not a relaxation of top-k: use it under a straight-through estimator, where its value cancels and only
    its gradient stays.

    Args:
        scores: `(..., n)`, floating point.
        k: How many rows share the scores, in [1, n].
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`; here no more than a divisor.

    Returns:
        The selection `(..., k, n)`: k equal shares `scores / (k * temperature)`, so that, as for every
        operator, the rows add up to the mask.

    Raises:
        ValueError: k or temperature out of range.

    Source: Bengio, Leonard & Courville 2013, "Estimating or Propagating Gradients Through Stochastic
    Neurons", section 4 (the straight-through estimator). Differs: there a 1-bit unit, here the k-hot mask;
    the shares are ours.
    """
    return (scores / (k * temperature)).unsqueeze(-2).expand(*scores.shape[:-1], k, scores.shape[-1])
