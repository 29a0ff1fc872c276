"""Rows of a relaxed permutation matrix: softmaxes that peak at the first, second, ... largest score."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, check_size, operator
from topkbench.operators._rowwise import BLOCK, Job, Mask, Rows, row_weights, weighted
from topkbench.operators._softsort import softsort_mask
from topkbench.operators._spread import spread
from topkbench.operators._top import top_indices
from topkbench.operators._vmap import in_front

Power = Literal[1, 2]
FEW = 1 << 17  # numbers in all rows: up to here they are no slower than the detour without them


def _neuralsort_parts(scores: Tensor, k: int, temperature: Temperature) -> tuple[Tensor, Tensor, Tensor, Job]:
    """alpha, u and the sums of distances: logits of the size of n scores, so in double precision."""
    n = scores.shape[-1]
    u = (scores.double() - scores.detach().amax(-1, keepdim=True)) / temperature
    alpha = torch.arange(n - 1, n - 1 - 2 * k, -2, dtype=u.dtype, device=u.device)
    return alpha, u, spread(u, scores.detach()), Job(squares=False, dtype=scores.dtype)


def _neuralsort_mask(scores: Tensor, k: int | Tensor, temperature: Temperature) -> Tensor:
    weights = row_weights(k, scores.shape[-1], scores)
    parts = _neuralsort_parts(scores, weights.shape[-1], temperature)
    if weights.shape[-1] * scores.numel() <= BLOCK:
        return weighted(Rows.apply(*parts), weights)
    mask: Tensor = Mask.apply(weights, *parts)
    return mask


@operator(
    has_rows=True,
    streamed=_neuralsort_mask,
    bounded=False,
    monotone=False,
    infinite=False,
    family="permutation",
    cost="k n, memory n",
    source="Grover, Wang, Zweig & Ermon 2019",
    checked="explicit formula; difftopk",
)
def neuralsort(
    scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0
) -> Float[Tensor, "*rows k n"]:
    """NeuralSort: row j is the softmax of `((n + 1 - 2j) s_i - sum_l |s_i - s_l|) / temperature` over i.

    VJP, g_j for row P_j (for the mask all are g): with `h_j = P_j (g_j - <P_j, g_j>) / temperature`, h their
    sum, `sum_j (n + 1 - 2j) h_ji - sum_l (h_i + h_l) sign(s_i - s_l)` at score i.

    Args:
        scores: `(..., n)`, floating point.
        k: How many rows, in [1, n].
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The selection `(..., k, n)`: each row in (0, 1) and summing to 1. The mask, its sum over rows, sums
        to k, but an entry may exceed 1, and a larger score may get a smaller entry.

    Raises:
        ValueError: k or temperature out of range, or rows that do not fit.

    Cost: one sort, then k n exponentials. The mask alone is made a few rows at a time, and again in the
    backward pass, so that memory stays at a few n.

    Source: Grover, Wang, Zweig & Ermon 2019, "Stochastic Optimization of Sorting Networks via Continuous
    Relaxations", without the noise. Differs: the k rows needed of n; the sums of distances by
    sorting and not from the n x n matrix, and in double precision.
    """
    check_size(k * scores.numel(), scores, f"a selection of {k} rows")
    rows: Tensor = Rows.apply(*_neuralsort_parts(scores, k, temperature))
    return rows


class _Nearest(torch.autograd.Function):
    """(anchors, u) -> the rows softmax(-|anchor_r - u|), (..., k, n)."""

    @staticmethod
    def forward(anchors: Tensor, u: Tensor) -> Tensor:
        return (anchors.unsqueeze(-1) - u.unsqueeze(-2)).abs_().neg_().softmax(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        anchors, u, rows = ctx.saved_tensors
        h = rows * grad
        h = torch.addcmul(h, rows, h.sum(-1, keepdim=True), value=-1)
        h = h * (anchors.detach().unsqueeze(-1) - u.detach().unsqueeze(-2)).sign_()
        return -h.sum(-1), h.sum(-2)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        return _Nearest.apply(*in_front(info.batch_size, inputs, dims, (1, 1))), 0


def _softsort_parts(
    scores: Tensor, k: int, temperature: Temperature, power: Power, *, ranked: bool = True
) -> tuple[Tensor, Tensor]:
    """The scores in units of the temperature less the k-th largest, and where the k largest are."""
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power!r}")
    source = scores.detach()
    index = top_indices(source, k, ranked=ranked)
    kth = source.gather(-1, index).amin(-1, keepdim=True)
    return (scores - kth) / (temperature if power == 1 else temperature**0.5), index


def _softsort_mask(scores: Tensor, k: int | Tensor, temperature: Temperature, *, power: Power = 1) -> Tensor:
    weights = row_weights(k, scores.shape[-1], scores)
    many = weights.shape[-1]
    u, index = _softsort_parts(scores, many, temperature, power, ranked=isinstance(k, Tensor) or power == 2)
    if many * scores.numel() <= (FEW if power == 1 else BLOCK):
        return weighted(_softsort_rows(u, index, power), weights)
    if power == 1:
        return softsort_mask(u, index, weights)
    mask: Tensor = Mask.apply(weights, 2 * u.gather(-1, index), u, u * u, Job(True, scores.dtype))
    return mask


def _softsort_rows(u: Tensor, index: Tensor, power: Power) -> Tensor:
    anchors = u.gather(-1, index)
    if power == 1:
        nearest: Tensor = _Nearest.apply(anchors, u)
        return nearest
    rows: Tensor = Rows.apply(2 * anchors, u, u * u, Job(True, u.dtype))
    return rows


@operator(
    has_rows=True,
    streamed=_softsort_mask,
    bounded=False,
    monotone=False,
    infinite=False,
    family="permutation",
    cost="n + k^2; k n with power=2",
    source="Prillo & Eisenschlos 2020",
    checked="explicit formula; difftopk, softtorch",
)
def softsort(
    scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0, *, power: Power = 1
) -> Float[Tensor, "*rows k n"]:
    """SoftSort: row j is the softmax of `-|s_(j) - s|^power / temperature`, s_(j) the j-th largest score.

    VJP, g_j for row P_j (for the mask all are g): with `h_j = P_j (g_j - <P_j, g_j>) / temperature` and
    `D_j = h_j power |s_(j) - s|^(power - 1) sign(s_(j) - s)`, `sum_j D_j` less `<D_j, 1>` at the score of
    rank j.

    Args:
        scores: `(..., n)`, floating point.
        k: How many rows, in [1, n].
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.
        power: 1 or 2.

    Returns:
        The selection `(..., k, n)`: each row in (0, 1) and summing to 1. The mask, its sum over rows, sums
        to k, but an entry may exceed 1, and a larger score may get a smaller entry. With power=1 it has
        kinks where scores tie; there the derivative of a distance is taken as 0. Which of equal scores has
        the rank, and its share of the gradient, is left open.

    Raises:
        ValueError: k, temperature or power out of range, or rows that do not fit.

    Cost: one top-k, then k n exponentials. The mask alone takes n + k^2 of them with power=1 (the rows are
    not needed for it, `_softsort.py`), and memory of a few n with either.

    Source: Prillo & Eisenschlos 2020, "SoftSort: A Continuous Relaxation for the argsort Operator".
    Differs: the k rows needed of n.
    """
    check_size(k * scores.numel(), scores, f"a selection of {k} rows")
    return _softsort_rows(*_softsort_parts(scores, k, temperature, power), power)
