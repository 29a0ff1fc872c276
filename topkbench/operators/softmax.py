"""Successive softmax: k softmaxes, each with what the earlier ones took pushed down.

    v_1 = s / temperature,   a_j = softmax(v_j),   v_{j+1} = v_j + log(1 - a_j) / temperature,   j = 1..k

a_j is the relaxed one-hot of the j-th largest score. Only the v_j are saved; the vector-Jacobian product
walks back from v_k to v_1. With M the argmax of v and b the softmax of the others (b_M = 0), that of
l = log(1 - a) is

    g  ->  a (C - c - g) + g_M a_M b,     c_i = g_i a_i / (1 - a_i) for i != M, c_M = 0,  C = sum c,

which has no 0/0 where a_M rounds to 1.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, operator

FAR = 1e18  # beyond every score, and still finite when it is divided by a low temperature twice


def _split(v: Tensor) -> tuple[Tensor, Tensor]:
    """Where the maximum is (one place, also at ties), and v without it."""
    top = torch.zeros_like(v, dtype=torch.bool).scatter(-1, v.argmax(-1, keepdim=True), True)
    return top, v.masked_fill(top, -torch.inf)


def _log_rest(v: Tensor) -> Tensor:
    """log(1 - softmax(v)): where that is above 1/2 as a ratio of sums, since it may round to 1."""
    _, others = _split(v)
    total = v.logsumexp(-1, keepdim=True)
    a = (v - total).exp()
    # Not at the maximum as such: equal scores must stay equal, or 1 / temperature blows up their difference.
    most = a > 0.5
    return torch.where(most, others.logsumexp(-1, keepdim=True) - total, torch.log1p(-a.masked_fill(most, 0)))


def _log_rest_vjp(v: Tensor, grad: Tensor) -> Tensor:
    top, others = _split(v)
    a = v.softmax(-1)
    c = torch.where(top, 0, grad * a) / torch.where(top, 1, 1 - a)
    of_top = torch.where(top, grad * a, 0).sum(-1, keepdim=True)
    return a * (c.sum(-1, keepdim=True) - c - grad) + of_top * others.softmax(-1)


class _Successive(torch.autograd.Function):
    """(v_1, 1 / temperature) -> v_1, ..., v_k stacked: (..., k, n)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, rate: Tensor, k: int) -> Tensor:
        path = [v]
        for _ in range(k - 1):
            v = v + rate * _log_rest(v)
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
            if grad_rate is not None:
                grad_rate = grad_rate + (grad_v * _log_rest(v)).sum_to_size(rate.shape)
            grad_v = grad[..., j, :] + grad_v + _log_rest_vjp(v, rate * grad_v)
        return grad_v, grad_rate, None


def centred(scores: Tensor) -> Tensor:
    """The scores less their maximum, so that large equal scores keep their digits; FAR stands for +inf."""
    top = scores.detach().amax(-1, keepdim=True)
    return (scores - top.masked_fill(top == torch.inf, 0)).clamp(max=FAR)


@operator(
    has_rows=True,
    bounded=False,
    monotone=False,
    family="softmax",
    cost="k n, memory k n",
    source="Xie & Ermon 2019",
    checked="explicit formula",
)
def softmax(
    scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0
) -> Float[Tensor, "*rows k n"]:
    """Successive softmax: the j-th row is the softmax of the scores less what rows 1..j-1 took.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n].
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The selection `(..., k, n)`: each row in (0, 1) and summing to 1. The mask, its sum over rows, sums
        to k, but an entry may exceed 1 at high temperature, and a larger score may get a smaller entry.

    Raises:
        ValueError: k or temperature out of range.

    Cost: k passes over the scores one after the other, and k n numbers kept for the backward pass.

    Source: Xie & Ermon 2019, "Reparameterizable Subset Sampling via Continuous Relaxations", eq. (4)-(6),
    without the Gumbel noise. Differs: log(1 - a) is exact, where the published code clamps 1 - a from
    below, so that temperature -> 0 gives the hard top-k whatever the scores. As in the source, what is
    taken is pushed down in units of the scores, so `softmax(c s, k, c temperature)` depends on c.
    """
    rate = torch.as_tensor(1 / temperature, dtype=scores.dtype, device=scores.device)
    path: Tensor = _Successive.apply(centred(scores) * rate, rate, k)
    return path.softmax(-1)


@operator(
    has_rows=True,
    bounded=False,
    hard_limit=False,
    infinite=False,
    family="softmax",
    cost="k n, memory k n",
    source="Plötz & Roth 2018",
    checked="explicit formula",
)
def n3(
    scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0
) -> Float[Tensor, "*rows k n"]:
    """Successive softmax with the temperature applied once: `v_{j+1} = v_j + log(1 - a_j)`.

    What is taken is pushed down in units of the temperature, by no more than it stands above the rest: two
    scores that are far above the others share the first two rows, and a low temperature does not make every
    row hard.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n].
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The selection `(..., k, n)`: each row in (0, 1) and summing to 1. An entry of the mask may exceed 1.

    Raises:
        ValueError: k or temperature out of range.

    Cost: k passes over the scores one after the other, and k n numbers kept for the backward pass.

    Source: Plötz & Roth 2018, "Neural Nearest Neighbors Networks", as their published code has it; the paper
    divides by the temperature at each step, and is then `softmax`. Differs: log(1 - a) is exact.
    """
    logits = centred(scores) / temperature
    path: Tensor = _Successive.apply(logits, torch.ones_like(logits[..., :1]), k)
    return path.softmax(-1)


@operator(
    bounded=False,
    hard_limit=False,
    infinite=False,
    family="softmax",
    cost="n",
    source="folklore",
    checked="explicit formula",
)
def scaled_softmax(
    scores: Float[Tensor, "*rows n"], k: int | Tensor, temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """K times the softmax: `k softmax(s / temperature)`.

    The naive baseline. At a low temperature it goes to k times the argmax and not to the hard mask.

    Args:
        scores: `(..., n)`, floating point.
        k: In [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The mask `(..., n)` in (0, k), sum k. All rows of the selection are the same.

    Raises:
        ValueError: k or temperature out of range.

    Cost: one softmax.

    Source: folklore.
    """
    count = k.unsqueeze(-1) if isinstance(k, Tensor) else k
    return count * (centred(scores) / temperature).softmax(-1)
