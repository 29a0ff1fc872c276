"""Successive softmax: the rows, and the mask without them.

    v_1 = s / temperature,   a_j = softmax(v_j),   v_{j+1} = v_j + rate * log(1 - a_j),   j = 1..k

The vector-Jacobian product walks back from v_k to v_1. With M the argmax of v and o the sum of the other a,
that of l = log(1 - a) is

    g  ->  a (C - c - g + g_M a_M / o),     c_i = g_i a_i / (1 - a_i),  C = sum c,

with c_M = 0 and no last term at M, which has no 0/0 where a_M rounds to 1. Where no a is above 1/2, M needs
no care: `a (C - c - g)` with all c.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from topkbench.operators._contract import readable

KEPT = 1 << 26  # numbers; where all v_j are more, the mask keeps some and finds the others again


def _split(v: Tensor) -> tuple[Tensor, Tensor]:
    """Where the maximum is (one place, also at ties), and v without it."""
    top = torch.zeros_like(v, dtype=torch.bool).scatter(-1, v.argmax(-1, keepdim=True), True)
    return top, v.masked_fill(top, -torch.inf)


def _log_rest(v: Tensor, a: Tensor) -> Tensor:
    """log(1 - a), a = softmax(v): where a is above 1/2 as a ratio of sums, since 1 - a may round to 0."""
    # Not at the maximum as such: equal scores must stay equal, or 1 / temperature blows up their difference.
    if readable(a) and not (a.amax(-1) > 0.5).any():
        return torch.log1p(-a)
    if not torch.is_grad_enabled():
        place = a.argmax(-1, keepdim=True)
        top, rest = a.gather(-1, place), torch.log1p(-a)
        own = v.scatter(-1, place, -torch.inf).logsumexp(-1, keepdim=True) - v.logsumexp(-1, keepdim=True)
        return rest.scatter(-1, place, torch.where(top > 0.5, own, rest.gather(-1, place)))
    most, (_, others) = a > 0.5, _split(v)
    total = v.logsumexp(-1, keepdim=True)
    return torch.where(most, others.logsumexp(-1, keepdim=True) - total, torch.log1p(-a.masked_fill(most, 0)))


def _log_rest_vjp(v: Tensor, a: Tensor, grad: Tensor) -> Tensor:
    if readable(a) and not torch.is_grad_enabled() and not (a.amax(-1) > 0.5).any():
        c = (1 - a).reciprocal_().mul_(a).mul_(grad)
        return (c.sum(-1, keepdim=True) - grad).sub_(c).mul_(a)
    if not torch.is_grad_enabled():
        place = a.argmax(-1, keepdim=True)
        of_top = (grad * a).gather(-1, place)
        c = (grad * a / (1 - a)).scatter(-1, place, 0.0)
        others = v.scatter(-1, place, -torch.inf).softmax(-1)
        return a * (c.sum(-1, keepdim=True) - c - grad) + of_top * others
    top, others = _split(v)
    c = torch.where(top, 0, grad * a) / torch.where(top, 1, 1 - a)
    of_top = torch.where(top, grad * a, 0).sum(-1, keepdim=True)
    return a * (c.sum(-1, keepdim=True) - c - grad) + of_top * others.softmax(-1)


class Path(torch.autograd.Function):
    """(v_1, rate) -> v_1, ..., v_k stacked: (..., k, n)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, rate: Tensor, k: int) -> Tensor:
        path = [v]
        for _ in range(k - 1):
            v = v + rate * _log_rest(v, v.softmax(-1))
            path.append(v)
        return torch.stack(path, -2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, rate, ctx.k = inputs
        ctx.save_for_backward(rate, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        rate, path = ctx.saved_tensors
        grad_v, grad_rate = grad[..., -1, :], None
        if ctx.needs_input_grad[1]:
            grad_rate = torch.zeros_like(rate)
        for j in range(ctx.k - 2, -1, -1):
            v = path[..., j, :]
            a = v.softmax(-1)
            if grad_rate is not None:
                grad_rate = grad_rate + (grad_v * _log_rest(v, a)).sum_to_size(rate.shape)
            grad_v = grad[..., j, :] + grad_v + _log_rest_vjp(v, a, rate * grad_v)
        return grad_v, grad_rate, None


class Mask(torch.autograd.Function):
    """(v_1, rate) -> a_1 + ... + a_k, keeping every `every`-th v_j."""

    @staticmethod
    def forward(ctx: FunctionCtx, v: Tensor, rate: Tensor, k: int) -> Tensor:
        every = 1 if k * v.numel() <= KEPT else math.isqrt(k)
        mask, kept = torch.zeros_like(v), [v]
        for j in range(k):
            a = v.softmax(-1)
            mask += a
            if j < k - 1:
                v = _log_rest(v, a).mul_(rate).add_(v)
                if (j + 1) % every == 0:
                    kept.append(v)
        ctx.save_for_backward(rate, *kept)
        ctx.k, ctx.every = k, every  # type: ignore[attr-defined]
        return mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rate, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # the backward pass is itself differentiated
            mask = Path.apply(kept[0], rate, ctx.k).softmax(-1).sum(-2)
            inputs = (kept[0], rate) if ctx.needs_input_grad[1] else (kept[0],)
            grads = torch.autograd.grad(mask, inputs, grad, create_graph=True, allow_unused=True)
            return grads[0], grads[1] if len(grads) > 1 else None, None
        grad_v, grad_rate = torch.zeros_like(kept[0]), torch.zeros_like(rate)
        last = True
        for first in reversed(kept):
            for v, a, rest in reversed(_segment(first, rate, ctx.every, ctx.k, last)):
                if rest is not None:
                    if ctx.needs_input_grad[1]:
                        grad_rate += (grad_v * rest).sum_to_size(rate.shape)
                    grad_v += _log_rest_vjp(v, a, rate * grad_v)
                grad_v += (grad - torch.linalg.vecdot(a, grad).unsqueeze(-1)).mul_(a)
            last = False
        return grad_v, grad_rate if ctx.needs_input_grad[1] else None, None


def _segment(
    v: Tensor, rate: Tensor, every: int, k: int, last: bool
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """The v_j from one that was kept to the next, each with its softmax and, but for v_k, log(1 - a)."""
    length = (k - 1) % every + 1 if last else every
    steps: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for j in range(length):
        a = v.softmax(-1)
        rest = None if last and j == length - 1 else _log_rest(v, a)
        steps.append((v, a, rest))
        if j < length - 1 and rest is not None:
            v = v + rate * rest
    return steps
