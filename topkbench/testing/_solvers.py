"""What published relaxations are solved by: bisection, fixed points, pooling, a small linear system."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

STEPS = 200_000  # of an iteration that is run to its fixed point, at most


class Stated(torch.autograd.Function):
    """A mask with the vector-Jacobian product that goes with it."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor, vjp: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: ARG004
        ctx.vjp = vjp
        return mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.vjp(grad), None, None


def settled(step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The fixed point of a step, to the last digits."""
    for _ in range(STEPS):
        before, x = x, step(x)
        if (x - before).abs().max() <= 1e-14 * (1 + x.abs().max()):
            return x
    raise RuntimeError(f"no fixed point after {STEPS} steps")


def bisected(excess: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The root of a falling function."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (low + high) / 2


def affine(active: Tensor, x: Tensor) -> Tensor:
    """The p with sum 1, of any sign, that brings `active @ p` closest to x."""
    one = torch.ones(1, active.shape[1], dtype=x.dtype)
    system = torch.cat([torch.cat([active.T @ active, one.T], 1), torch.cat([one, one.new_zeros(1, 1)], 1)])
    return torch.linalg.solve(system, torch.cat([active.T @ x, one[0, :1]]))[:-1]


def pooled(n: int, level: Callable[[slice], Tensor]) -> Tensor:
    """Pool adjacent violators: the non-increasing vector that is level(block) on each of its blocks."""
    blocks: list[slice] = []
    for i in range(n):
        blocks.append(slice(i, i + 1))
        while len(blocks) > 1 and level(blocks[-2]) < level(blocks[-1]):
            stop = blocks.pop().stop
            blocks.append(slice(blocks.pop().start, stop))
    return torch.cat([level(block).expand(block.stop - block.start) for block in blocks])


def symmetric(w: Tensor) -> Tensor:
    """The elementary symmetric polynomials e_0(w), e_1(w), ...: the coefficients of prod(1 + w_i x)."""
    e = torch.ones(1, dtype=w.dtype)
    for one in w:
        e = torch.cat([e, e.new_zeros(1)]) + one * torch.cat([e.new_zeros(1), e])
    return e
