"""The k largest scores less the next one: values, not a mask, that are continuous in the scores."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkbench.operators._contract import check, largest, readable
from topkbench.operators._top import at_rank, top_indices


def shifted_topk(scores: Float[Tensor, "*rows n"], k: int | Int[Tensor, "*ks"]) -> Float[Tensor, "*out n"]:
    """`relu(s_i - s_(k+1))`: k non-zeros where the k-th score exceeds the (k+1)-th, fewer where they tie.

    What is kept shrinks to 0 as it falls to the (k+1)-th score, so that nothing jumps where two scores swap:
    a loss that is continuous in z has the gradient that autograd gets, with no boundary flux besides. It is
    a change of the model, not another gradient of the same one: `s * hard_mask(s, k)` has jumps, and other
    values.

    VJP: g_i for the scores above the (k+1)-th, minus the sum of those g_i for the (k+1)-th, 0 for the others.
    It sums to 0, and a shift of the scores changes nothing. There is no temperature.

    Args:
        scores: `(..., n)`, floating point.
        k: How many, in [1, n - 1]; a tensor that broadcasts with the leading dimensions gives each row its
            own. Not n: there is no next score to take away.

    Returns:
        `(..., n)`, >= 0. A score of +inf gives inf, or NaN where the (k+1)-th is +inf as well; where the
        (k+1)-th is -inf, all that is kept is infinite. A score that is NaN is NaN.

    Raises:
        ValueError: k out of range. Where the numbers of a tensor k cannot be looked at without waiting, rows
            with k = n are NaN instead.
        TypeError: scores that are not floating point, k no whole number.

    Cost: one top-(k+1).

    Source: this project; a ReLU with a threshold that makes it keep k.
    """
    check(scores, k)
    n = scores.shape[-1]
    known = isinstance(k, int) or (readable(k) and k.numel() > 0)
    if known and largest(k, n) == n:
        raise ValueError(f"k must be in [1, {n - 1}] for {n} scores: no score is next after all, got {n}")
    top = top_indices(scores.detach(), min(largest(k, n) + 1, n), ranked=True)
    after = k + 1 if isinstance(k, int) else (k + 1).clamp(max=n)
    above = (scores - at_rank(scores.gather(-1, top), after)).relu()
    return above if isinstance(k, int) else above.masked_fill((k == n).unsqueeze(-1), torch.nan)
