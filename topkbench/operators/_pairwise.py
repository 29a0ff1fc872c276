"""Ranks by counting softly: r_i = 1/2 + sum_j sigmoid(u_j - u_i), a few rows of the n x n matrix at a time.

The derivative of a sigmoid is even, so with D_ij = sigmoid'(u_j - u_i) the vector-Jacobian product
`h -> D h - h * (D 1)` needs for each row no more than that row of D.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._rowwise import blocks
from topkbench.operators._vmap import in_front


class _PairwiseRanks(torch.autograd.Function):
    """u -> r."""

    @staticmethod
    def forward(u: Tensor) -> Tensor:
        # Written into one tensor: small ones that stay among large ones that go leave memory in pieces.
        ranks = torch.empty_like(u)
        for block in blocks(u.shape[-1], u.numel()):
            ranks[..., block] = _wins(u, block).sum(-1)
        return ranks.add_(0.5)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        sides = torch.stack([grad, torch.ones_like(grad)], -2).mT  # each in one piece: the product is faster
        products = torch.empty_like(sides)
        for block in blocks(u.shape[-1], u.numel()):
            wins = _wins(u, block)
            # sigmoid' = sigmoid - sigmoid^2
            slopes = torch.addcmul(wins, wins, wins, value=-1)
            products[..., block, :] = slopes @ sides
        of_grad, total = products.unbind(-1)
        return of_grad - grad * total

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        return _PairwiseRanks.apply(*in_front(info.batch_size, inputs, dims, (1,))), 0


def _wins(u: Tensor, block: slice) -> Tensor:
    """sigmoid(u_j - u_i) for the i of the block: (..., block, n)."""
    apart = u.unsqueeze(-2) - u[..., block].unsqueeze(-1)
    return apart.sigmoid() if torch.is_grad_enabled() else apart.sigmoid_()


def pairwise_ranks(u: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """`1/2 + sum_j sigmoid(u_j - u_i)` for each i; they sum to n (n + 1) / 2, and u_i itself counts 1/2."""
    ranks: Tensor = _PairwiseRanks.apply(u)
    return ranks
