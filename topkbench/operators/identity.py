"""The identity in place of a mask: what the plainest straight-through estimator sends gradients through."""

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, operator


def _finite(scores: Tensor) -> Tensor:
    # Of an infinite score nothing could be taken off to leave the hard mask.
    bound = torch.finfo(scores.dtype).max ** 0.5
    return scores.clamp(-bound, bound)


def _whole(scores: Tensor, k: int | Tensor, temperature: Temperature) -> Tensor:  # noqa: ARG001
    return _finite(scores) / temperature


@operator(
    has_rows=True,
    streamed=_whole,
    sums_to_k=False,
    bounded=False,
    shift_invariant=False,
    hard_limit=False,
    uniform_limit=False,
    rows_sum_to_1=False,
    infinite=False,
    family="identity",
    cost="n",
    source="Bengio, Léonard & Courville 2013",
    checked="explicit formula",
)
def identity(
    scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0
) -> Float[Tensor, "*rows k n"]:
    """The scores themselves, divided by the temperature.

    VJP: `g / temperature`.

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
    return (_finite(scores) / (k * temperature)).unsqueeze(-2).expand(*scores.shape[:-1], k, scores.shape[-1])


def _projected(scores: Tensor, k: int | Tensor, temperature: Temperature) -> Tensor:  # noqa: ARG001
    # Equal scores are 0 to the last bit, and a size within [1, sqrt(n)] neither over- nor underflows.
    centred = scores - scores.detach().amax(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)
    largest = centred.detach().abs().amax(-1, keepdim=True)
    flat = largest == 0
    unit = torch.where(flat, 0, centred / torch.where(flat, 1, largest))
    size = torch.where(flat, 1, unit.square().sum(-1, keepdim=True)).sqrt()
    return unit / size / temperature


@operator(
    has_rows=True,
    streamed=_projected,
    sums_to_k=False,
    bounded=False,
    hard_limit=False,
    uniform_limit=False,
    infinite=False,
    rows_sum_to_1=False,
    family="identity",
    cost="n",
    source="Sahoo et al. 2023",
    checked="explicit formula",
)
def projected_identity(
    scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0
) -> Float[Tensor, "*rows k n"]:
    """The scores, centred and of norm 1: `c = (s - mean s) / |s - mean s|`.

    VJP: `P(g - c <c, g>) / (|s - mean s| temperature)`, P g = g - mean g.

    What shifts or scales all scores alike, and so does not change the top-k, gets no gradient: under a
    straight-through estimator the scores do not drift, and there is no hyper-parameter to choose.

    Args:
        scores: `(..., n)`, floating point.
        k: How many rows share c, in [1, n].
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`; here no more than a divisor.

    Returns:
        The selection `(..., k, n)`: k equal shares `c / (k * temperature)`. Where all scores are equal, 0 and
        without a gradient.

    Raises:
        ValueError: k or temperature out of range.

    Source: Sahoo et al. 2023, "Backpropagation through Combinatorial Algorithms: Identity with Projection
    Works". Differs: the shares; noise, where it is wanted, is the estimator's.
    """
    rows = _projected(scores, k, temperature) / k
    return rows.unsqueeze(-2).expand(*scores.shape[:-1], k, scores.shape[-1])
