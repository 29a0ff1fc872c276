"""The k scores that are largest in magnitude, with their signs, relaxed: values, not a mask.

With a_i = |s_i|, r = 1 / (p - 1) and T the temperature, the source sorts a downwards and solves

    min_{v_1 >= ... >= v_n}  sum_i T^-r |a_i - v_i|^(r+1) / (r+1)  +  sum_{i <= k} v_i^2 / 2,

and `m_i = ((a_i - v_i) / T)^r`. Without the constraint that v falls, m = v for the first k, whose
values come out as they are, and v = a, m = 0 for the others. Both are in order already, so the constraint
makes one block of its own, around the ranks k and k+1, with a common v; what is left to solve is

    sum_i min(((a_i - v)_+ / T)^r, v) = k v :

the i above the block are those that the minimum cuts off, the i below it those with a_i <= v. In the
block the derivative is `dv = <b, da> / (sum b + c)`, b = dm/da, c how many of the k are in it.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from topkbench.operators._contract import Temperature, largest, prepared, readable
from topkbench.operators._loop import Step, constant, settle
from topkbench.operators._top import at_rank, top_values

STEPS = 64  # at most; on an accelerator, where nobody asks whether it is done, all of them


class _Block(NamedTuple):
    """Which scores are in it and which above, and (a - v) / T inside, 1 elsewhere."""

    inside: Tensor
    above: Tensor
    over: Tensor


def _block(apart: Tensor, base: Tensor, drop: Tensor, temperature: Tensor, power: float) -> _Block:
    """The block at level v = base - drop, for apart = a - base."""
    over = (apart + drop).relu() / temperature
    above = over.detach() ** power >= base - drop
    inside = (over > 0) & ~above
    # Outside nothing is raised to a power: 0 has no second derivative there, and infinity no first.
    return _Block(inside, above, over.masked_fill(~inside, 1))


def _solve(apart: Tensor, base: Tensor, temperature: Tensor, k: int | Tensor, power: float) -> Tensor:
    """How far below base, the (k+1)-th magnitude, v lies: 0 where nothing is smooth."""
    eps = torch.finfo(apart.dtype).eps
    # There the (k+1)-th is cut off as well, so that the sum exceeds k v.
    width = torch.minimum(base, temperature * base ** (1 / power))

    def guarded(drop: Tensor, moved: Tensor, low: Tensor, high: Tensor) -> Step:
        block = _block(apart, base, drop, temperature, power)
        total, mass, _ = _sums(block, temperature, k, power)
        short = k - block.above.sum(-1, keepdim=True)
        excess = mass - short * (base - drop)
        low, high = torch.where(excess <= 0, drop, low), torch.where(excess >= 0, drop, high)
        newton = drop - excess / torch.where(total == 0, 1, total)
        length = (newton - drop).abs()
        settled = length <= eps * width
        # Not at the upper end: v = 0 is a root as well, and not the one.
        good = settled | ((newton >= low) & (newton < high) & (length <= moved / 2))
        proposed = torch.where(good, torch.minimum(torch.maximum(newton, low), high), (low + high) / 2)
        return settled, (proposed, (proposed - drop).abs(), low, high)

    start = torch.zeros_like(width)
    return settle(guarded, (start, 2 * width, start, width), STEPS, look=readable(apart))[0]


def _sums(block: _Block, temperature: Tensor, k: int | Tensor, power: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of b and c of the block, its sum of m, and b itself."""
    inside = block.inside.to(block.over.dtype)
    slope = inside * block.over ** (power - 1) * (power / temperature)
    total = slope.sum(-1, keepdim=True) + (k - block.above.sum(-1, keepdim=True))
    return total, (inside * block.over**power).sum(-1, keepdim=True), slope


class _Drop(torch.autograd.Function):
    """(a - base, temperature) -> base - v, base being held constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(apart: Tensor, temperature: Tensor, base: Tensor, k: int | Tensor, power: float) -> Tensor:
        return _solve(apart, base, temperature, k, power)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        apart, temperature, base, k, ctx.power = inputs
        ctx.k = None if isinstance(k, Tensor) else k
        ctx.save_for_backward(apart, temperature, base, output, *([k] if ctx.k is None else []))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        apart, temperature, base, drop, *count = ctx.saved_tensors
        block = _block(apart, base, drop, temperature, ctx.power)
        total, _, slope = _sums(block, temperature, count[0] if count else ctx.k, ctx.power)
        pull = grad / torch.where(total == 0, 1, total)  # no block: nothing depends on v
        heat = (pull * (slope * block.over).sum(-1, keepdim=True)).sum_to_size(temperature.shape)
        return -pull * slope, heat, None, None, None


def magnitude(
    scores: Float[Tensor, "*rows n"],
    k: int | Int[Tensor, "*ks"],
    temperature: Temperature = 1.0,
    *,
    p: float = 2.0,
) -> Float[Tensor, "*out n"]:
    """The k scores that are largest in magnitude as they are, the others 0, with a continuous change-over.

    `sign(s) (m + temperature m^(p-1))`, `m = ((|s| - v) / temperature)^(1 / (p-1))`, v as in this module's
    introduction; in other words `sign(s) (m + |s| - v)` in the block around the ranks k and k+1, s above it
    and 0 below. It is not a mask, nor an operator of masks: it ranks by |s|, and it is what a pruned weight
    or a sparse code is.

    VJP: `sign(s) ((1 + b) h - b <1 + b, h> / (sum b + c))` in the block, g above it, 0 below; b = dm/d|s|,
    c how many of the k largest are in the block, h = sign(s) g.

    Args:
        scores: `(..., n)`, floating point.
        k: How many, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`; the lambda of the source. At p = 2
            it has no unit: scores c times as large give c times the output. The lower, the harder; as it
            goes to infinity the output goes to the scores.
        p: In (1, 2]. At 2 it is piecewise linear; below, differentiable where an entry leaves 0. The
            published default is 4/3.

    Returns:
        `(..., n)`: 0 where |s| <= v, s where |s| is far above the (k+1)-th; two scores that tie around rank
        k share. A score of exactly 0 gets no gradient.

    Raises:
        ValueError: k, temperature or p out of range.
        TypeError: scores that are not floating point, k no whole number.

    Cost: one top-(k+1), then up to 12 passes over the scores at p = 2; at a lower p up to 64 where the
    temperature is so far above the scores that v is 0 to rounding.

    Source: Sander, Puigcerver, Djolonga, Peyre & Blondel 2023, "Fast, Differentiable and Sparse Top-k: a
    Convex Analysis Perspective", the operator in magnitude, as their published code scales it. Differs: one
    equation for v by Newton steps within a bracket, where the source pools adjacent violators after a
    sort, or runs Dykstra's projections; p <= 2, as beyond it the derivative is infinite where an entry
    leaves 0.
    """
    if not 1 < p <= 2:
        raise ValueError(f"p must be in (1, 2], got {p}")
    hot = torch.as_tensor(prepared(scores, k, temperature), dtype=scores.dtype, device=scores.device)
    power = constant(round(1 / (p - 1), 12))  # 1 / (4/3 - 1) rounds to something beside 3
    count = k.unsqueeze(-1) if isinstance(k, Tensor) else k
    size = scores.abs()
    # A 0 after the last stands for the (n+1)-th.
    ranked = top_values(pad(size.detach(), (0, 1)), largest(k, scores.shape[-1]) + 1)
    base = at_rank(ranked, k + 1)
    apart = size - base
    drop = _Drop.apply(apart, hot, base, count, power)
    block = _block(apart, base, drop, hot, power)
    shared = block.over**power + block.over * hot
    return scores.sign() * torch.where(block.inside, shared, size * block.above.to(size.dtype))
