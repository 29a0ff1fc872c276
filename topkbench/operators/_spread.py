"""How far each number lies from all others: A_i = sum_j |u_i - u_j|, by sorting and running sums.

With u sorted upwards, A_i = (2i - n) u_i + (u_1 + ... + u_n) - 2 (u_1 + ... + u_i). The vector-Jacobian
product is g -> g_i (below - above) + (sum of g below) - (sum of g above), where below and above say how many
numbers lie there: equal ones do not push each other.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import readable
from topkbench.operators._vmap import in_front


def _ascending_order(scores: Tensor) -> Tensor:
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # NumPy sorts with vector instructions.
        return torch.from_numpy(np.argsort(scores.detach().numpy(), -1))
    return scores.argsort(-1)


def _equals(ranked: Tensor) -> tuple[Tensor, Tensor] | None:
    """For each place of sorted rows the first of the numbers equal to its own, and one past the last.

    None where no two are equal, if that can be seen.
    """
    n = ranked.shape[-1]
    differ = ranked[..., 1:] != ranked[..., :-1]
    if readable(ranked) and bool(differ.all()):
        return None
    place = torch.arange(n, device=ranked.device)
    edge = torch.ones_like(differ[..., :1]) if n > 1 else torch.ones_like(ranked, dtype=torch.bool)
    first = (torch.cat([edge, differ], -1) * place).cummax(-1).values
    ends = torch.where(torch.cat([differ, edge], -1), place + 1, n)
    return first, ends.flip(-1).cummin(-1).values.flip(-1)


class _Spread(torch.autograd.Function):
    """u -> A; also the order, and u in it."""

    @staticmethod
    def forward(u: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, order = u.shape[-1], _ascending_order(scores).expand(u.shape)
        ranked = u.gather(-1, order)
        sums = ranked.cumsum(-1)
        above = torch.arange(2 - n, n + 1, 2, dtype=u.dtype, device=u.device)
        distances = (ranked * above).sub_(sums, alpha=2).add_(sums[..., -1:])
        return torch.empty_like(u).scatter_(-1, order, distances), order, ranked

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None]:
        order, ranked = ctx.saved_tensors
        equals, n = _equals(ranked), grad.shape[-1]
        g = grad.gather(-1, order)
        sums = g.cumsum(-1)
        if equals is None:
            below = torch.arange(-n, n, 2, dtype=g.dtype, device=g.device)
            push = g * below + (2 * sums - sums[..., -1:])
        else:
            first, after = equals
            before = sums - g
            push = g * (first + after - n) + before.gather(-1, first)
            push = push - (sums[..., -1:] - sums.gather(-1, after - 1))
        return torch.zeros_like(grad).scatter(-1, order, push), None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Any, Any]:
        return _Spread.apply(*in_front(info.batch_size, inputs, dims, (1, 1))), (0, 0, 0)


def spread(u: Float[Tensor, "*rows n"], scores: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """`sum_j |u_i - u_j|` for each i, in O(n log n); `scores` are in the same order, and faster to sort."""
    distances: Tensor = _Spread.apply(u, scores)[0]
    return distances
