"""Masks from soft ranks: the largest score has rank 1, and what is ranked k or better is taken.

`soft_rank`. With u = s / temperature sorted downwards, the ranks r are non-decreasing and constant plus -u
(l2), or proportional to e^-u (kl), within each block of an isotonic regression; a block a..b has the sum of
ranks a + ... + b, its first is >= a and its last <= b. So of `clip(k + 1 - r, 0, 1)` only the block that
holds both k and k+1 can be strictly between 0 and 1. And the formula of that one block is right everywhere:
with its level t, the rank that it gives to a score above the block is <= a - 1 < k, and to one below
>= b + 1 > k + 1. Hence, for all n scores, the mask is

    clip(1 + u - t, 0, 1)   (l2),      clip(k + 1 - e^-(u - t), 0, 1)   (kl)

and all that has to be solved for is t: `isotonic.segment`. (If k and k+1 lie in two blocks, either level
gives the hard mask.) With a = 1 where 0 < m < 1 and w = 1 (l2) or r (kl) in the block, 0 outside, the
vector-Jacobian product is `g -> w (a g - <w, a g> / <w, 1>) / temperature`.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, operator, readable
from topkbench.operators._pairwise import pairwise_ranks
from topkbench.operators._top import at_rank
from topkbench.operators._vmap import in_front
from topkbench.operators.isotonic import descending, segment

Regularization = Literal["l2", "kl"]


class _Block(NamedTuple):
    """The block that holds rank k: its level less k, its least and largest score, the sum of its weights."""

    level: Tensor
    low: Tensor
    high: Tensor
    total: Tensor


def _block(ranked: Tensor, kth: Tensor, k: int | Tensor, temperature: Temperature, kl: bool) -> _Block:
    """The block of rank k of the sorted scores, in double precision: running sums of n ranks need it."""
    n = ranked.shape[-1]
    place = torch.arange(n + 1, dtype=torch.float64, device=ranked.device)
    count = k.unsqueeze(-1) if isinstance(k, Tensor) else k
    # Within the block scores differ by at most n (l2) or log n (kl), so what is further out can as well be
    # just that: infinite scores are nothing special, and no exponential overflows.
    far = math.log(n) + 1 if kl else n + 1.0
    u = (ranked.double() - kth).div_(temperature).clamp_(-far, far)
    terms = u.neg_().exp_().neg_() if kl else u.add_(place[1:] - count)
    x = (place * (place + 1)).div_(2) if kl else place
    y = terms.new_zeros(*terms.shape[:-1], n + 1)
    y[..., 1:] = terms.cumsum_(-1)
    left, right, slope = segment(x, y, k)
    ranked = ranked.expand(*y.shape[:-1], n)
    low, high = ranked.gather(-1, right - 1), ranked.gather(-1, left)
    level = slope.neg_().mul_(count).log_() if kl else slope
    return _Block(*(part.to(ranked.dtype) for part in (level, low, high, x.take(right) - x.take(left))))


class _SoftRank(torch.autograd.Function):
    """(scores, temperature) -> the mask."""

    @staticmethod
    def forward(
        scores: Tensor, temperature: Temperature, k: int | Tensor, kl: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ranked = descending(scores)
        largest = torch.finfo(scores.dtype).max / 8
        kth = at_rank(ranked, k).clamp(-largest, largest)
        level, low, high, total = _block(ranked, kth, k, temperature, kl)
        mask = (scores - kth).div_(temperature)
        if kl:
            # k + 1 - e^-(u - t) with the k taken out, so that many ranks leave digits for the difference.
            count = k.unsqueeze(-1) if isinstance(k, Tensor) else k
            mask = mask.neg_().sub_(level).expm1_().mul_(count).neg_().add_(1)
        else:
            mask = mask.sub_(level - 1)
        return mask.clamp_(0, 1), low.clamp_(-largest, largest), high.clamp_(-largest, largest), total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        scores, temperature, _, ctx.kl = inputs
        ctx.number = None if isinstance(temperature, Tensor) else temperature
        ctx.save_for_backward(scores, *output, *([] if ctx.number else [temperature]))
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, None, None]:
        scores, mask, low, high, total, *hot = ctx.saved_tensors
        temperature = hot[0] if hot else ctx.number
        inside = _between(scores, low, high)

        def u() -> Tensor:  # less its largest in the block, which bounds it outside as well
            return (scores.clamp(low, high) - high) / temperature

        weight = inside
        if ctx.kl:
            powers = inside * u().neg().exp()
            # The sum is at least the 1 of the largest, unless nothing is inside.
            weight = powers * (total / powers.sum(-1, keepdim=True).clamp(min=1))
        fractional = grad * mask.detach().frac().ceil()
        mean = torch.linalg.vecdot(weight, fractional).unsqueeze(-1) / total
        grad_u = weight * (fractional - mean)
        heat = None
        if hot and ctx.needs_input_grad[1]:
            heat = -(grad_u * u() / temperature).sum_to_size(temperature.shape)
        return (grad_u / temperature).sum_to_size(scores.shape), heat, None, None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _SoftRank.apply(*in_front(info.batch_size, inputs, dims, (1, 1, 0, 0))), (0, 0, 0, 0)


def _between(scores: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """1 where low <= scores <= high, else 0; a constant for autograd."""
    with torch.no_grad():
        if readable(scores) and readable(low):
            # In place, so that no boolean tensor is made: those are slow on the CPU.
            return (scores - low).ge_(0).mul_((high - scores).ge_(0))
        return ((scores >= low) & (scores <= high)).to(scores.dtype)


@operator(
    sums_to_k=False,
    sparse=True,
    uniform_limit=False,
    rows_sum_to_1=False,
    family="ranks",
    cost="n log n",
    source="Blondel, Teboul, Berthet & Djolonga 2020",
    checked="pooling of violators; torchsort",
)
def soft_rank(
    scores: Float[Tensor, "*rows n"],
    k: int | Tensor,
    temperature: Temperature = 1.0,
    *,
    regularization: Regularization = "l2",
) -> Float[Tensor, "*out n"]:
    """The clipped fast soft rank: `clip(k + 1 - r, 0, 1)`, r the projection of -scores onto all rankings.

    With z = -scores / temperature, r is the point of the permutahedron of (n, ..., 1) that is closest to z
    (l2), or the one with the least Kullback-Leibler divergence from e^z (kl). The largest score has rank 1.
    Ranks are exact, and the mask hard, where scores differ by a temperature (l2) or, at rank j, by
    `temperature * log((j + 1) / j)` (kl); so a temperature suits scores whose spread is of the order of
    n temperature. Far above that all ranks are (n + 1) / 2 and the mask is 0 or 1.

    VJP: `w (a g - <w, a g> / <w, 1>) / temperature`, a = 1 where 0 < m < 1, else 0; within the block of
    scores pooled with rank k, w = 1 (l2) or the ranks r (kl), and 0 outside.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`; the epsilon of the source.
        regularization: "l2" or "kl".

    Returns:
        The mask `(..., n)` in [0, 1], piecewise linear (l2) or smooth (kl) between kinks. Its sum is k where
        it is hard, and else need not be.

    Raises:
        ValueError: k, temperature or regularization out of range.

    Cost: one sort and about 15 passes over the scores, in double precision.

    Source: Blondel, Teboul, Berthet & Djolonga 2020, "Fast Differentiable Sorting and Ranking", soft
    ranks with the logarithm of (n, ..., 1) and the exponential of the result under "kl". Differs: of
    the isotonic regression only the block of rank k is solved, by Newton's method on its level and not by
    pooling, as the mask needs no more; the clip is common practice and not of the source.
    """
    if regularization not in ("l2", "kl"):
        raise ValueError(f'regularization must be "l2" or "kl", got {regularization!r}')
    mask: Tensor = _SoftRank.apply(scores, temperature, k, regularization == "kl")[0]
    return mask


@operator(
    sums_to_k=False,
    hard_limit=False,
    uniform_limit=False,
    infinite=False,
    rows_sum_to_1=False,
    family="ranks",
    cost="n^2, memory n",
    source="Qin, Liu & Li 2010; Brown et al. 2020; Patel, Tolias & Matas 2022",
    checked="explicit formula",
)
def smooth_rank(
    scores: Float[Tensor, "*rows n"],
    k: int | Tensor,
    temperature: Temperature = 1.0,
    *,
    margin: float = 1.0,
) -> Float[Tensor, "*out n"]:
    """A sigmoid of soft ranks by counting: `sigmoid((k + 1/2 - r) / margin)`.

    `r_i = 1/2 + sum_j sigmoid((s_j - s_i) / temperature)`, j = i included: 1 for the largest score and n for
    the smallest as the temperature goes to 0. A low temperature gives right ranks, but the mask stays as soft
    as the margin says: with margin=1 the k-th score has 0.62 and the next 0.38.

    VJP: `(D h - h (D 1)) / temperature`, `h = -g m (1 - m) / margin`, D_ij the derivative of the sigmoid at
    `(s_j - s_i) / temperature`.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`: that of the ranks.
        margin: > 0, that of the mask, in ranks.

    Returns:
        The mask `(..., n)` in (0, 1), smooth. The ranks sum to n (n + 1) / 2; the mask does not sum to k.

    Raises:
        ValueError: k, temperature or margin out of range.

    Cost: n^2 sigmoids, and again in the backward pass; they are made in blocks, so that memory stays at a few
    n. Where the backward pass is differentiated in its turn, n^2 numbers are kept.

    Source: Qin, Liu & Li 2010, "A general approximation framework for direct optimization of information
    retrieval measures", for the ranks; Brown et al. 2020, "Smooth-AP"; Patel, Tolias & Matas 2022,
    "Recall@k Surrogate Loss", for the sigmoid of ranks. Differs: k + 1/2, so that at a low temperature k
    scores are above 1/2.
    """
    if not margin > 0:
        raise ValueError(f"margin must be > 0, got {margin}")
    count = k.unsqueeze(-1) if isinstance(k, Tensor) else k
    ranks = pairwise_ranks((scores - scores.detach().amax(-1, keepdim=True)) / temperature)
    return ((count + 0.5 - ranks) / margin).sigmoid()
