"""Top-k as a dynamic program over the scores, with a smooth maximum M in place of the maximum.

    V_i(j) = M(V_{i-1}(j), V_{i-1}(j-1) + s_i),        M(a, b) = max_q (1 - q) a + q b + T q (1 - q),

is the value of the best j of the first i scores, softly. The best q, `clip(1/2 + (b - a) / 2T, 0, 1)`, is
sparsemax of two. The mask is dV_n(k)/ds. That is: start at (n, k) and go back; take score i with the
probability q_i(j) and go on to (i-1, j-1), else to (i-1, j); the mask is how likely each is taken. So it
lies in [0, 1] and sums to k, but it depends on the order of the scores.

All that matters of V are the differences D_i(j) = V_i(j) - V_i(j-1). With m(a, b) = a + b - M(a, b), the
smooth minimum, and h(d) = relu(1 - |d|)^2 / 4, so that M = max + T h((a - b) / T),

    D_i(j) = M(D_{i-1}(j), s_i) + m(D_{i-1}(j-1), s_i) - s_i
           = clamp(s_i, D_{i-1}(j), D_{i-1}(j-1))
             + T h((D_{i-1}(j) - s_i) / T) - T h((D_{i-1}(j-1) - s_i) / T)

sorts s_i into a falling list, softly: M and m increase, so D_i(j) - D_i(j+1) >= M - m - (M - m) = 0, all
at D_{i-1}(j). No sum of scores is formed, which could swallow digits; and D(0) = inf, D_i(j) = -inf for
j > i say by themselves what is impossible.

The Jacobian of the mask is that of a gradient, symmetric: the vector-Jacobian product of g is the derivative
of the same two passes along g, and being made of plain operations it has derivatives in its turn.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from topkbench.operators._contract import Temperature, check_size, largest, operator
from topkbench.operators.softmax import FAR


def _shares(u: Tensor, most: int) -> list[Tensor]:
    """The shares q_i(1), ..., q_i(most) of each score i, (..., most), at temperature 1."""
    blank = torch.full((*u.shape[:-1], most), -torch.inf, dtype=u.dtype, device=u.device)
    above, levels = -blank[..., :1], blank
    shares = []
    for s in u.unsqueeze(-2).unbind(-1):
        before = torch.cat([above, levels[..., :-1]], -1)
        shares.append(_share(s - levels))
        between = torch.minimum(torch.maximum(s, levels), before)
        levels = between + _gain(s - levels) - _gain(s - before)
    return shares


def _share(ahead: Tensor) -> Tensor:
    """The best q for a choice that is better than the other one by that much."""
    return ((1 + ahead) / 2).clamp(0, 1)


def _gain(apart: Tensor) -> Tensor:
    """By how much the smooth maximum of two numbers exceeds their maximum."""
    return (1 - apart.abs()).relu().square() / 4


def _slopes(shares: list[Tensor], g: Tensor) -> list[Tensor]:
    """The derivatives of the shares along g."""
    rise = torch.zeros_like(shares[0])  # that of the levels
    slopes = []
    for share, ds in zip(shares, g.unsqueeze(-2).unbind(-1), strict=True):
        moving = ((share > 0) & (share < 1)).to(share.dtype)
        slopes.append(moving * (ds - rise) / 2)
        passed = share * (ds - rise)
        rise = rise + passed - pad(passed, (1, 0))[..., :-1]
    return slopes


def _taken(shares: list[Tensor], at: Tensor) -> Tensor:
    """How likely each score is taken; `at` is the law of how many of all n are to be, 1..most."""
    taken = []
    for share in reversed(shares):
        part = at * share
        taken.append(part.sum(-1))
        at = at - part + _one_down(part)
    return torch.stack(taken[::-1], -1)


def _taken_along(shares: list[Tensor], slopes: list[Tensor], at: Tensor) -> Tensor:
    """The derivative of `_taken` along those of the shares."""
    taken, drift = [], torch.zeros_like(at)
    for share, slope in zip(reversed(shares), reversed(slopes), strict=True):
        part, change = at * share, drift * share + at * slope
        taken.append(change.sum(-1))
        at, drift = at - part + _one_down(part), drift - change + _one_down(change)
    return torch.stack(taken[::-1], -1)


def _one_down(part: Tensor) -> Tensor:
    return pad(part[..., 1:], (0, 1))


class _Program(torch.autograd.Function):
    """(u, law of the count) -> dV/du."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, count: Tensor) -> Tensor:
        return _taken(_shares(u, count.shape[-1]), count)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        u, count = ctx.saved_tensors
        shares = _shares(u, count.shape[-1])
        # The passes are run again rather than kept: n k numbers a row.
        return _taken_along(shares, _slopes(shares, grad), count).sum_to_size(u.shape), None


@operator(
    monotone=False,
    uniform_limit=False,
    equivariant=False,
    ties=False,
    sparse=True,
    family="subset distribution",
    cost="n k, n steps in turn; memory n k",
    source="Vivier-Ardisson, Sander, Parmentier & Blondel 2026",
    checked="differences of the program's value",
)
def dp_gini(
    scores: Float[Tensor, "*rows n"], k: int | Int[Tensor, "*ks"], temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """The relaxed dynamic program of top-k with the Gini regulariser: sparse, dependent on the order.

    The gradient of V_n(k), where `V_i(j) = max_q (1-q) V_{i-1}(j) + q (V_{i-1}(j-1) + s_i) + T q (1-q)`.
    With Shannon's entropy for `q (1-q)` it would be `marginals`, and no other choice gives a mask that does
    not depend on the order of the scores (the source's theorem). Of two scores it is `sparsemax`.

    Equal scores get unequal entries, a larger score may get a smaller one, and at a high temperature the
    mask goes to something that is not k/n.

    VJP: the derivative of the mask along g, as its Jacobian is symmetric: both passes over the table, with
    slopes 1 / 2T of the shares that are inside (0, 1).

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The mask `(..., n)` in [0, 1], sum k, exactly 0 or 1 where no choice that matters is within a
        temperature; its derivative has kinks.

    Raises:
        ValueError: k or temperature out of range; more than the limit in one table.

    Cost: time and memory n k, three times that for the gradient, in n steps one after the other: a Python
    loop over the scores (not over rows), which is what the method is. At n = 1000 some 0.1 s whatever the
    rows and k, as long as those are few.

    Source: Vivier-Ardisson, Sander, Parmentier & Blondel 2026, "Differentiable Knapsack and Top-k Operators
    via Dynamic Programming". Differs: differences of values in place of values, so that large and infinite
    scores do no harm; the temperature is such that the choice between two is
    `clip(1/2 + difference / 2T, 0, 1)`.
    """
    target, ks = (k.unsqueeze(-1), k.shape) if isinstance(k, Tensor) else (k, ())
    most = largest(k, scores.shape[-1])
    rows = torch.broadcast_shapes(scores.shape[:-1], ks)
    check_size(math.prod(rows) * scores.shape[-1] * most, scores, "the dynamic program")
    top = scores.detach().amax(-1, keepdim=True)
    # FAR stands for infinity: differences of infinite scores, and their slope in the temperature, are finite.
    u = (scores - top.masked_fill(top.isinf(), 0)).clamp(-FAR, FAR) / temperature
    count = (torch.arange(1, most + 1, device=scores.device) == target).to(u.dtype)
    mask: Tensor = _Program.apply(u, count)
    return mask
