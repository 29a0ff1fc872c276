"""The mask of SoftSort without its rows, in O(n + k^2): an exponential of a distance is a product.

Scores u in units of the temperature, less the k-th largest. Among the others (not the k largest) the row of
the r-th largest is e^-(u_r - u_j) = a_r E_j with a_r = e^-u_r and E_j = e^u_j, both at most 1. So with K the
k x k matrix of e^-|u_r - u_i| among the k largest, and row weights w (1; 0 for rows that are not wanted),

    Z_r = a_r sum E + sum_i K_ri,   v = w / Z,   m_j = E_j <v, a>   (others),   m_i = (v^T K)_i   (k largest).

With g the gradient of the mask and c_r = (a_r <E, g> + (K g)_r) / Z_r, that of the logits is
H_rj = w_r P_rj (g_j - c_r), and u_j gets sum_r H_rj sign(u_r - u_j), u_r minus the sum over j. The sign is 1
for the others, but 0 for those that tie with the k-th largest.
"""

from typing import Any

import torch
from torch import Tensor

from topkbench.operators._rowwise import blocks
from topkbench.operators._vmap import in_front

CACHE = 1 << 17  # numbers in a block of rows of K, of which there are several at a time


def _parts(u: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k largest, E (0 for them), its sum, and a."""
    top = u.gather(-1, index)
    # The clamp touches none of the others; without it the k largest may overflow before they become 0.
    others = u.clamp(max=0).exp().scatter(-1, index, 0)
    return top, others, others.sum(-1, keepdim=True), top.neg().exp()


class _SoftSortMask(torch.autograd.Function):
    """u, where its k largest are, row weights -> the mask."""

    @staticmethod
    def forward(u: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        top, others, total, a = _parts(u, index)
        of_top, of_others = torch.zeros_like(top), torch.zeros_like(total)
        for block in blocks(top.shape[-1], top.numel(), CACHE):
            kernel = (top[..., block].unsqueeze(-1) - top.unsqueeze(-2)).abs_().neg_().exp_()
            z = a[..., block] * total + kernel.sum(-1)
            v = weights[..., block] / z
            of_top += (v.unsqueeze(-2) @ kernel).squeeze(-2)
            of_others += torch.linalg.vecdot(v, a[..., block]).unsqueeze(-1)
        return others.mul_(of_others).scatter_(-1, index, of_top)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        u, index, weights = ctx.saved_tensors
        top, others, total, a = _parts(u, index)
        of_top = grad.gather(-1, index)
        of_others = torch.linalg.vecdot(others, grad).unsqueeze(-1)
        sides = torch.stack([of_top, torch.ones_like(of_top)], -1)
        rows, pushed = [], torch.zeros_like(top)
        for block in blocks(top.shape[-1], top.numel(), CACHE):
            apart = top[..., block].unsqueeze(-1) - top.unsqueeze(-2)
            kernel = apart.abs().neg().exp()
            of_kernel, sums = (kernel @ sides).unbind(-1)
            z = a[..., block] * total + sums
            v, c = weights[..., block] / z, (a[..., block] * of_others + of_kernel) / z
            signed = kernel * apart.sign()
            of_signed, sums = (signed @ sides).unbind(-1)
            plain, with_c = (torch.stack([v, v * c], -2) @ signed).unbind(-2)
            pushed = pushed + of_top * plain - with_c
            rows.append(torch.stack([v, c, v * (of_signed - c * sums)], 0))
        v, c, pull = torch.cat(rows, -1)
        va, tie = v * a, v * (top == 0).to(v.dtype)
        tied = (u == 0).to(u.dtype).scatter(-1, index, 0)
        of_tied = torch.linalg.vecdot(tied, grad).unsqueeze(-1)
        du = others * (grad * va.sum(-1, keepdim=True) - torch.linalg.vecdot(va, c).unsqueeze(-1))
        du = du - tied * (grad * tie.sum(-1, keepdim=True) - torch.linalg.vecdot(tie, c).unsqueeze(-1))
        pull = pull + va * (of_others - c * total) - tie * (of_tied - c * tied.sum(-1, keepdim=True))
        return du.scatter_add(-1, index, pushed - pull), None, None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        return _SoftSortMask.apply(*in_front(info.batch_size, inputs, dims, (1, 1, 1))), 0


def softsort_mask(u: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`sum_r w_r softmax(-|u_(r) - u|)` over the rows r of the largest u.

    Args:
        u: `(..., n)`, less the smallest of the k largest.
        index: `(..., k)`, where the k largest are.
        weights: `(..., k)`, w in the order of the index.

    Returns:
        `(..., n)`.
    """
    mask: Tensor = _SoftSortMask.apply(u, index, weights)
    return mask
