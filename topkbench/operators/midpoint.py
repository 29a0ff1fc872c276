"""A sigmoid about the midpoint between the k-th and the (k+1)-th score: cheap, and its sum is not k.

    m_i = sigmoid((s_i - c) / temperature),    c = (s_(k) + s_(k+1)) / 2

At a high temperature the mask goes to 1/2 everywhere: its sum leaks towards n / 2.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, operator
from topkbench.operators._threshold import centred


@operator(
    sums_to_k=False,
    uniform_limit=False,
    rows_sum_to_1=False,
    gradient=False,
    twice=False,
    family="midpoint",
    cost="n",
    source="Zhu et al. 2025, threshold held constant",
    checked="explicit formula",
)
def sigmoid(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """Sigmoid about the midpoint, which is held constant: the mask's Jacobian is diagonal.

    VJP: `m (1 - m) g / temperature`.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The mask `(..., n)` in (0, 1); its sum is k only in the limit of a low temperature.

    Raises:
        ValueError: k or temperature out of range.

    Cost: one top-(k+1) and one pass over the scores.

    Source: common practice; Zhu et al. 2025 (see `dftopk`) with its threshold detached.
    """
    return _about_midpoint(scores, k, temperature, moving=False)


@operator(
    sums_to_k=False,
    uniform_limit=False,
    rows_sum_to_1=False,
    family="midpoint",
    cost="n",
    source="Zhu et al. 2025",
    checked="explicit formula",
)
def dftopk(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """Sigmoid about the midpoint, through which the gradient flows too (DFTopK).

    VJP: `h = m (1 - m) g / temperature`, less half of sum h at each of the two scores at the midpoint: they
    take the whole counter-gradient. Of scores that tie there, only two do.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The mask `(..., n)` in (0, 1); its sum is k only in the limit of a low temperature.

    Raises:
        ValueError: k or temperature out of range.

    Cost: one top-(k+1) and one pass over the scores.

    Source: Zhu, Zhang, Wang et al. 2025, "Differentiable Fast Top-K Selection for Large-Scale
    Recommendation". Differs: all ones where k = n, and there is no (k+1)-th score.
    """
    return _about_midpoint(scores, k, temperature, moving=True)


def _about_midpoint(scores: Tensor, k: int | Tensor, temperature: Temperature, *, moving: bool) -> Tensor:
    u, _ = centred(scores, k, moving=moving)
    bound = torch.finfo(scores.dtype).max ** 0.5  # an infinite score has no derivative in the temperature
    everything = torch.as_tensor(k == scores.shape[-1], device=scores.device).unsqueeze(-1)
    return (u.clamp(-bound, bound) / temperature).masked_fill(everything, torch.inf).sigmoid()
