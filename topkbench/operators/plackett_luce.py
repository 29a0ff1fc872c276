"""The Plackett-Luce law: k draws without replacement, in order.

    p(i_1, ..., i_k) = prod_j w_(i_j) / (sum of w over what is left at draw j),    w = exp(s / temperature)

The set of the k is not distributed as in `topkbench.operators.subset`: the two laws agree at k = 1 only.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkbench.operators._contract import Temperature, prepared


def gumbel_top_k(
    scores: Float[Tensor, "*rows n"],
    k: int,
    temperature: Temperature,
    gumbels: Float[Tensor, "*samples n"],
) -> Int[Tensor, "*samples k"]:
    """The k draws, the first one first: the k largest of `s / temperature + gumbels`, descending.

    Args:
        scores: `(..., n)`.
        k: How many to draw, in [1, n].
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.
        gumbels: Standard Gumbel noise `(*s, ..., n)`; axes in front are samples.

    Returns:
        Indices `(*s, ..., k)`. A constant for autograd.

    Raises:
        ValueError: k or temperature out of range.

    Cost: one top-k.

    Source: Kool, van Hoof & Welling 2019, "Stochastic Beams and Where to Find Them"; the law
    itself, Plackett 1975.
    """
    temperature = prepared(scores, k, temperature)
    return (scores / temperature + gumbels).detach().topk(k, dim=-1).indices


def log_probability(
    scores: Float[Tensor, "*rows n"],
    order: Int[Tensor, "*samples k"],
    temperature: Temperature = 1.0,
) -> Float[Tensor, "*samples"]:
    """`log p(i_1, ..., i_k)` of draws in their order.

    Its gradient is the ordered score `(z - sum_j softmax(s / temperature over what was left at draw j)) /
    temperature`, z the k-hot mask of the draws.

    Args:
        scores: `(..., n)`.
        order: `(*s, ..., k)`, all different; axes in front are samples.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Raises:
        ValueError: temperature out of range, or more draws than scores.

    Cost: n for each sample.

    Source: Kool, van Hoof & Welling 2019. Differs: what is left is summed up from the last draw
    to the first, since subtracting what was drawn from the whole would cancel.
    """
    temperature = prepared(scores, order.shape[-1], temperature)
    bound = torch.finfo(scores.dtype).max ** 0.5
    logits = scores.clamp(-bound, bound)  # of infinite scores, differences are not numbers
    logits = (logits - logits.detach().amax(-1, keepdim=True)) / temperature
    logits = logits.expand(*order.shape[:-1], logits.shape[-1])
    backwards = logits.gather(-1, order).flip(-1)
    if order.shape[-1] == logits.shape[-1]:
        return (backwards - backwards.logcumsumexp(-1)).sum(-1)
    undrawn = logits.scatter(-1, order, -torch.inf).logsumexp(-1, keepdim=True)
    left = torch.cat([undrawn, backwards], -1).logcumsumexp(-1)[..., 1:]
    return (backwards - left).sum(-1)
