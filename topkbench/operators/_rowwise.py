"""Row-wise softmax of rank-one logits, all rows or their weighted sum a few rows at a time.

Row r is P_r = softmax over j of (alpha_r u_j - b_j). NeuralSort is one such, and SoftSort with squares
another, with b = u^2 and alpha_r = 2 u_(r). With H the gradient of the logits, those of u, b and alpha are
alpha^T H, -1^T H and H u. For the mask w^T P with gradient g, and c = P g,

    H_rj = w_r P_rj (g_j - c_r),   so that   v^T H = g * (v w)^T P - (v w c)^T P   for any v:

P is needed in matrix products with a few vectors alone. So a block of rows is made, used, and made again in
the backward pass, in memory that stays in the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import largest
from topkbench.operators._vmap import in_front

BLOCK = 1 << 21  # numbers in a block of rows
GROUP = 32  # rows that share one that is taken in full precision


@dataclass(frozen=True)
class Job:
    """How the logits are computed.

    Attributes:
        squares: b is u^2, and the logits are computed as the -(alpha/2 - u)^2 that they are up to a constant.
        dtype: The precision of P; u and b may come in a higher one.
    """

    squares: bool
    dtype: torch.dtype


def row_weights(k: int | Tensor, n: int, like: Tensor) -> Float[Tensor, "*ks rows"]:
    """1 for the first k rows, 0 for the others, as many rows as the largest k asks for."""
    if isinstance(k, int):
        return like.new_ones(k)
    most = largest(k, n)
    return (torch.arange(most, device=k.device) < k.unsqueeze(-1)).to(like.dtype)


def weighted(rows: Float[Tensor, "*rows k n"], weights: Float[Tensor, "*ks k"]) -> Float[Tensor, "*rows n"]:
    """The weighted sum of rows that are few."""
    if weights.dim() == 1:  # of one k for all, so that each is 1
        return rows.sum(-2)
    return (rows * weights.unsqueeze(-1)).sum(-2)


def blocks(rows: int, each: int, block: int = BLOCK) -> Iterator[slice]:
    """Slices of `rows` rows with `each` numbers a row, of `block` numbers or one row."""
    size = max(1, block // max(each, 1))
    return (slice(start, start + size) for start in range(0, rows, size))


class _Softmax:
    """The rows of P, some at a time. Where autograd does not look on, they share one piece of memory."""

    def __init__(self, alpha: Tensor, u: Tensor, b: Tensor, job: Job) -> None:
        self.alpha, self.u, self.b, self.job = alpha, u, b, job
        self.row = u.to(job.dtype).unsqueeze(-2)
        self.memory: list[Tensor] | None = None
        self.from_row, self.base = -1, self.row

    def rows(self, block: slice) -> Tensor:
        column = self.alpha[..., block].unsqueeze(-1)
        logits, rows = self._take(torch.broadcast_shapes(column.shape, self.row.shape))
        if self.job.squares:
            x = torch.sub(column / 2, self.row, out=logits)
            x = x.square().neg() if logits is None else x.square_().neg_()
        else:
            # Both terms may be large and their difference not: a first row is taken exactly, and the next
            # ones differ from it by a few times u.
            from_row = block.start - block.start % GROUP
            first = self.alpha[..., from_row : from_row + 1]
            if from_row != self.from_row:
                base = first * self.u - self.b
                base = base - base.detach().amax(-1, keepdim=True)
                self.from_row, self.base = from_row, base.to(self.job.dtype).unsqueeze(-2)
            x = torch.addcmul(
                self.base, (column - first.unsqueeze(-1)).to(self.job.dtype), self.row, out=logits
            )
        return torch.softmax(x, -1, out=rows)

    def _take(self, shape: torch.Size) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if torch.is_grad_enabled():
            return None, None
        if self.memory is None:  # the first block is the largest
            self.memory = [self.row.new_empty(shape.numel()) for _ in range(2)]
        logits, rows = (memory[: shape.numel()].view(shape) for memory in self.memory)
        return logits, rows


def _accumulated(total: Tensor | None, part: Tensor) -> Tensor:
    if total is None:
        return part
    return total + part if torch.is_grad_enabled() else total.add_(part)


class Rows(torch.autograd.Function):
    """(alpha, u, b) -> P, (..., k, n)."""

    @staticmethod
    def forward(alpha: Tensor, u: Tensor, b: Tensor, job: Job) -> Tensor:
        return _Softmax(alpha, u, b, job).rows(slice(0, alpha.shape[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        alpha, u, _, _ = inputs
        ctx.save_for_backward(alpha, u, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        alpha, u, rows = ctx.saved_tensors
        h = rows * grad
        h = torch.addcmul(h, rows, h.sum(-1, keepdim=True), value=-1)
        # As for the logits: alpha may be large, what it differs by is not.
        first = alpha[..., :1]
        left = torch.stack([alpha - first, torch.ones_like(alpha)], -2).to(h.dtype)
        with_alpha, total = (left @ h).to(u.dtype).unbind(-2)
        of_alpha = (h @ u.to(h.dtype).unsqueeze(-1)).squeeze(-1) if ctx.needs_input_grad[0] else None
        return of_alpha, with_alpha + first * total, -total, None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return Rows.apply(*in_front(info.batch_size, inputs, dims, (1, 1, 1, 0))), 0


class Mask(torch.autograd.Function):
    """(weights, alpha, u, b) -> weights^T P, (..., n), a block of rows at a time."""

    @staticmethod
    def forward(weights: Tensor, alpha: Tensor, u: Tensor, b: Tensor, job: Job) -> Tensor:
        softmax, mask = _Softmax(alpha, u, b, job), torch.zeros_like(u, dtype=job.dtype)
        for block in blocks(alpha.shape[-1], u.numel()):
            mask += (weights[..., None, block] @ softmax.rows(block)).squeeze(-2)
        return mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.job = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor, Tensor, None]:
        weights, alpha, u, b, mask = ctx.saved_tensors
        softmax, sums, of_alpha = _Softmax(alpha, u, b, ctx.job), None, []
        g, values = grad.unsqueeze(-2), u.to(grad.dtype).unsqueeze(-2)
        first = alpha[..., :1]
        steps = (alpha - first).to(grad.dtype)
        for block in blocks(alpha.shape[-1], u.numel()):
            rows = softmax.rows(block)
            c = torch.linalg.vecdot(rows, g)
            w, a = weights[..., block].expand_as(c), steps[..., block]
            sums = _accumulated(sums, torch.stack([w * c, w * a, w * a * c], -2) @ rows)
            if ctx.needs_input_grad[1]:
                mean = torch.linalg.vecdot(rows, values)
                of_alpha.append(w * (torch.linalg.vecdot(rows, g * values) - c * mean))
        with_c, with_a, with_both = torch.as_tensor(sums).unbind(-2)
        total = (grad * mask - with_c).to(u.dtype)
        of_u = (grad * with_a - with_both).to(u.dtype) + first * total
        return None, torch.cat(of_alpha, -1) if of_alpha else None, of_u, -total, None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return Mask.apply(*in_front(info.batch_size, inputs, dims, (1, 1, 1, 1, 0))), 0
