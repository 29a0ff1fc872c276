"""The gates of mixture-of-experts routers: a softmax and a hard choice. They sum to 1 or less, not to k."""

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, operator
from topkbench.operators.hard import kept
from topkbench.operators.softmax import scaled


@operator(
    sums_to_k=False,
    hard_limit=False,
    sparse=True,
    uniform_limit=False,
    rows_sum_to_1=False,
    infinite=False,
    ties=False,
    family="gate",
    cost="n",
    source="Shazeer et al. 2017",
    checked="explicit formula",
)
def kept_softmax(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """The softmax of the k largest scores, 0 elsewhere (KeepTopK, then softmax).

    It is also the softmax of all scores, cut to the k largest and renormalised. Only the kept scores get a
    gradient, and at k = 1 the gate is the constant 1 and none does.

    VJP: `m (g - <m, g>) / temperature`, m the gate.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to keep, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The gate `(..., n)` in [0, 1], sum 1, k entries that are not 0.

    Raises:
        ValueError: k or temperature out of range.

    Cost: one top-k and one softmax.

    Source: Shazeer et al. 2017, "Outrageously Large Neural Networks", eq. (3) and (5), without the noise.
    Differs: a temperature, 1 in the source.
    """
    taken = kept(scores, k)
    return scaled(scores, temperature).masked_fill(taken == 0, -torch.inf).softmax(-1)


@operator(
    sums_to_k=False,
    hard_limit=False,
    sparse=True,
    uniform_limit=False,
    rows_sum_to_1=False,
    infinite=False,
    ties=False,
    family="gate",
    cost="n",
    source="Fedus, Zoph & Shazeer 2022",
    checked="explicit formula",
)
def switch(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """The softmax of all scores, cut to the k largest and not renormalised.

    Scores that are not kept get a gradient too, through the normaliser.

    VJP: `(m g - p <m, g>) / temperature`, m the gate, p the softmax of all scores.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to keep, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The gate `(..., n)` in [0, 1], sum at most 1, k entries that are not 0.

    Raises:
        ValueError: k or temperature out of range.

    Cost: one top-k and one softmax.

    Source: Fedus, Zoph & Shazeer 2022, "Switch Transformers", section 2.1, there with k = 1. Differs: any k,
    a temperature.
    """
    return scaled(scores, temperature).softmax(-1) * kept(scores, k)
