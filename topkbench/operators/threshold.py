"""Threshold operators: m_i = F(u_i - t) with u = scores / temperature and t such that sum_i m_i = k.

F is a distribution function, symmetric about 0. Implicit differentiation of `sum F = k` gives one
vector-Jacobian product for the whole family,

    g  ->  a * (g - <a, g> / <a, 1>),     a = F'(F^-1(m)),  a function of the mask alone,

so the backward pass needs nothing but the output, and is itself differentiable.

Where t lies. Shift the scores so that u_(k) + u_(k+1) = 0. If F' is log-concave then, whatever they are,

    -Q(k / (k+1))  <=  t  <=  Q((n-k) / (n-k+1)),     Q = F^-1.

(Upper end: at t = e the k-th score alone is short of 1 by F(e - h), h = half the gap, and the n-k
scores below are over 0 by at most (n-k) F(-e - h); log-concavity makes the ratio of the two at least its
value at h = 0, and that is n-k at e = Q((n-k)/(n-k+1)).) The bracket does not depend on the scores or the
temperature, so a fixed, small number of safeguarded Newton steps is enough at any scale, and no step
has to ask an accelerator whether it is done.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, operator


@dataclass(frozen=True)
class Kernel:
    """A distribution function F, its density as a function of the mask, its quantile function."""

    cdf: Callable[[Tensor], Tensor]
    density: Callable[[Tensor], Tensor]
    quantile: Callable[[Tensor], Tensor]
    steps: int


MARGIN = 1.01
LOGISTIC = Kernel(torch.sigmoid, lambda m: m * (1 - m), torch.logit, steps=11)
UNIFORM = Kernel(
    lambda u: (u + 0.5).clamp(0, 1),
    lambda m: ((m > 0) & (m < 1)).to(m.dtype),
    lambda p: p - 0.5,
    steps=12,
)


def _centred(scores: Tensor, k: int | Tensor) -> Tensor:
    """The scores less the point halfway between the k-th and the (k+1)-th (the k-th, where it is the last).

    The two come out as the same number with opposite signs, to the last bit, however large the scores: the
    bracket leaves no room for a centre that was rounded.
    """
    n = scores.shape[-1]
    if isinstance(k, int):
        top = scores.detach().topk(min(k + 1, n), dim=-1).values
        kth, following = top[..., k - 1 : k], top[..., -1:]
    else:
        ranked = scores.detach().sort(dim=-1, descending=True).values
        ranked = ranked.expand(*torch.broadcast_shapes(k.shape, scores.shape[:-1]), n)
        rank = k.unsqueeze(-1).expand(*ranked.shape[:-1], 1)
        kth, following = ranked.gather(-1, rank - 1), ranked.gather(-1, rank.clamp(max=n - 1))
    return (scores - kth) + (kth - following) / 2


def _solve(u: Tensor, k: int | Tensor, kernel: Kernel) -> Tensor:
    """The threshold t of each row, (..., 1), for u with centre 0: Newton steps that fall back to bisection.

    The steps solve `Q(mean F(u - t)) = Q(k / n)` rather than `sum F(u - t) = k`: the same root, but in t
    nearly a straight line when the scores lie close together, where the other form crawls.
    """
    n = u.shape[-1]
    target = torch.as_tensor(k, dtype=u.dtype, device=u.device).unsqueeze(-1)
    # A little wider than the proof asks, so that rounding cannot push a root at an end outside.
    low = -MARGIN * kernel.quantile(target / (target + 1)) + torch.zeros_like(u[..., :1])
    high = MARGIN * kernel.quantile((n - target) / (n - target + 1)) + torch.zeros_like(low)
    t = torch.zeros_like(low)
    for _ in range(kernel.steps):
        mask = kernel.cdf(u - t)
        excess = mask.sum(-1, keepdim=True) - target
        low = torch.where(excess >= 0, t, low)
        high = torch.where(excess <= 0, t, high)
        mean = mask.mean(-1, keepdim=True)
        gap = kernel.quantile(mean) - kernel.quantile(target / n)
        step = t + gap * n * kernel.density(mean) / kernel.density(mask).sum(-1, keepdim=True)
        t = torch.where((step >= low) & (step <= high), step, (low + high) / 2)
    return t


class _Threshold(torch.autograd.Function):
    """u -> F(u - t), with the family's vector-Jacobian product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, k: int | Tensor, kernel: Kernel) -> Tensor:
        t = _solve(u, k, kernel)
        full = k == u.shape[-1]  # no (k+1)-th score: everything is taken
        t = torch.where(torch.as_tensor(full, device=u.device).unsqueeze(-1), -math.inf, t)
        return kernel.cdf(u - t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        u, _, ctx.kernel = inputs
        ctx.shape = u.shape
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        a = ctx.kernel.density(mask)
        total = a.sum(-1, keepdim=True)
        # A mask that is hard to the last bit has a = 0: its gradient is 0, not 0/0.
        mean = (a * grad).sum(-1, keepdim=True) / torch.where(total > 0, total, 1)
        return (a * (grad - mean)).sum_to_size(ctx.shape), None, None


def _threshold(scores: Tensor, k: int | Tensor, temperature: Temperature, kernel: Kernel) -> Tensor:
    return _Threshold.apply(_centred(scores, k) / temperature, k, kernel)


@operator()
def entropic(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """Entropic projection onto the capped simplex: logistic threshold with sum k.

    Solves `max_m <m, s> - temperature * sum(m log m + (1-m) log(1-m))` subject to `0 <= m <= 1, sum m = k`;
    so `m_i = sigmoid(s_i / temperature - t)`.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n].
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The mask `(..., n)` in (0, 1), sum k; as smooth as the logistic function.

    Raises:
        ValueError: k or temperature out of range.

    Cost: one top-(k+1) and 11 passes over the scores.

    Source: Amos, Koltun & Kolter 2019, "The Limited Multi-Label Projection Layer", eq. (4). Differs: the
    bracket does not depend on the scores, Newton steps inside it, no tolerance and so no early stop.
    """
    return _threshold(scores, k, temperature, LOGISTIC)


@operator(sparse=True)
def sparsemax(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """Euclidean projection of scores / temperature onto the capped simplex; at k = 1 exactly sparsemax.

    Solves `min_m |m - s/temperature|^2` subject to `0 <= m <= 1, sum m = k`; so
    `m_i = clip(s_i / temperature - t, 0, 1)`. It is the hard mask, and its gradient 0, as soon as
    the k-th and (k+1)-th score are a temperature apart.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n].
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The mask `(..., n)` in [0, 1], sum k, sparse; piecewise linear.

    Raises:
        ValueError: k or temperature out of range.

    Cost: one top-(k+1) and 12 passes over the scores.

    Source: Martins & Astudillo 2016, "From Softmax to Sparsemax", eq. (2) at k = 1; Malaviya, Ferreira &
    Martins 2018, "Sparse and Constrained Attention", for the cap. Differs: threshold by safeguarded Newton
    steps instead of sorting; the derivative at a kink is that of the flat side.
    """
    return _threshold(scores, k, temperature, UNIFORM)
