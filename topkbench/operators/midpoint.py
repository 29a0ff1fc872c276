"""A sigmoid about the midpoint between the k-th and the (k+1)-th score: cheap, and its sum is not k.

    m_i = sigmoid((s_i - c) / temperature),    c = (s_(k) + s_(k+1)) / 2

At a high temperature the mask goes to 1/2 everywhere: its sum leaks towards n / 2.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, largest, operator
from topkbench.operators._threshold import about_middle, centred, next_rank
from topkbench.operators._top import at_rank, top_indices


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
    return _sigmoid(centred(scores, k)[0], k, temperature)


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
    known, n = scores.detach(), scores.shape[-1]
    ranked = top_indices(known, min(largest(k, n) + 1, n), ranked=True)
    middle = torch.cat([at_rank(ranked, k), at_rank(ranked, next_rank(k, n))], -1)
    u, _ = about_middle(known, *known.expand(*middle.shape[:-1], n).gather(-1, middle).split(1, -1))
    return _sigmoid(_Moving.apply(scores.expand(u.shape), u, middle), k, temperature)


class _Moving(torch.autograd.Function):
    """u, which is scores less the middle of two of them, with the gradient of that."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, u: Tensor, middle: Tensor) -> Tensor:  # noqa: ARG004
        return u.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        scores, _, middle = inputs
        # As `centred` has it, an infinite score is a bound, which does not move.
        moves = scores.gather(-1, middle).abs() <= torch.finfo(scores.dtype).max ** 0.5
        ctx.save_for_backward(middle, moves.to(scores.dtype) / 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        middle, share = ctx.saved_tensors
        # Autograd's own way, zeros to scatter into and to add, comes out wrong in torch 2.13's Inductor.
        return grad.scatter_add(-1, middle, -share * grad.sum(-1, keepdim=True)), None, None


def _sigmoid(u: Tensor, k: int | Tensor, temperature: Temperature) -> Tensor:
    bound = torch.finfo(u.dtype).max ** 0.5  # an infinite score has no derivative in the temperature
    everything = torch.as_tensor(k == u.shape[-1], device=u.device).unsqueeze(-1)
    return (u.clamp(-bound, bound) / temperature).masked_fill(everything, torch.inf).sigmoid()
