"""Perturbed top-k: the mean of hard masks of noisy scores, and its gradient without a derivative.

    y(s) = E H(s + sigma Z),      dy/ds = E H(s + sigma Z) nu'(Z)^T / sigma,      density of Z = exp(-nu)

The hard mask H is constant nearly everywhere, but its mean is as smooth as the density: a change of s is a
change of the density. With N draws Z_i and a cotangent g both expectations are means,

    y = mean_i H_i,               vjp = mean_i nu'(Z_i) (<H_i, g> - b_i) / sigma,

with any b_i that does not depend on Z_i. nu'(z) is z for the normal law and 1 - exp(-z) for the Gumbel law.
<H_i, g> is a sum over the k indices kept, so that those and the Z_i are all that is saved.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from topkbench.operators._contract import Temperature, check_size, prepared
from topkbench.operators._top import top_indices

Law = Literal["normal", "gumbel"]
AT_ONCE = 1 << 19  # numbers in a piece of the noise: it stays in the cache
LARGE = 1 << 14


class _Mean(torch.autograd.Function):
    """Indices `(a, N / a, ..., k)` of the kept scores -> the mean of their one-hots; a = 2 for pairs."""

    @staticmethod
    def forward(
        scores: Tensor,
        temperature: Tensor,  # noqa: ARG004
        index: Tensor,
        rows: bool,
        law: Law,  # noqa: ARG004
        centred: bool,  # noqa: ARG004
        *noise: Tensor,  # noqa: ARG004
    ) -> Tensor:
        index = index.flatten(0, 1)
        draws = index.movedim(0, -1) if rows else index.movedim(0, -2).flatten(-2)
        counts = torch.zeros((*draws.shape[:-1], scores.shape[-1]), dtype=scores.dtype, device=scores.device)
        counts.scatter_add_(-1, draws, counts.new_ones(()).expand(draws.shape))
        return counts.div_(len(index))  # a sum of 1 / N would exceed 1

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        scores, temperature, index, ctx.rows, ctx.law, ctx.centred, *noise = inputs
        ctx.shape = scores.shape
        ctx.save_for_backward(temperature, index, *noise)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        temperature, index, *noise = ctx.saved_tensors
        weight = _kept(grad, index, ctx.rows)
        pairs, draws = weight.shape[:2]
        count = pairs * draws
        if ctx.centred and pairs == 1:
            weight, count = weight - weight.mean(1, keepdim=True), count - 1
        odd = weight[0] - weight[1] if pairs == 2 else weight[0]  # of a pair, nu' has both signs
        slope = sum(_weighted(_slope(z, ctx.law), w) for z, w in _parts(noise, odd / count))
        grad_temperature = None
        if ctx.needs_input_grad[1]:
            n = grad.shape[-1]
            away = sum(
                (((_slope(z, ctx.law) * z).sum(-1, keepdim=True) - n) * w).sum(0)
                for z, w in _parts(noise, weight.sum(0) / count)
            )
            grad_temperature = (away / temperature).sum_to_size(temperature.shape)
        return (slope / temperature).sum_to_size(ctx.shape), grad_temperature, *[None] * (4 + len(noise))


def _parts(noise: list[Tensor], weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each piece of the noise with the weights of its draws, (draws, ..., 1)."""
    weights = weight.unsqueeze(-1).split([len(piece) for piece in noise])
    return list(zip(noise, weights, strict=True))


def _kept(grad: Tensor, index: Tensor, rows: bool) -> Tensor:
    """<H_i, g> for every draw: (a, N / a, ...)."""
    grad = grad.expand(*index.shape[:2], *grad.shape)
    if rows:
        return grad.gather(-1, index.unsqueeze(-1)).sum((-1, -2))
    return grad.gather(-1, index).sum(-1)


def _weighted(slope: Tensor, weight: Tensor) -> Tensor:
    """The sum over draws of `weight * slope`; of large ones without their products side by side."""
    if slope[0].numel() < LARGE:
        return (slope * weight).sum(0)
    total = slope[0] * weight[0]
    for one, w in zip(slope[1:], weight[1:], strict=True):
        total.addcmul_(one, w)
    return total


def _slope(noise: Tensor, law: Law) -> Tensor:
    """nu', the derivative of minus the log density."""
    return noise if law == "normal" else 1 - torch.exp(-noise)


def _draw(like: Tensor, count: int, law: Law, generator: torch.Generator | None) -> list[Tensor]:
    """Standard noise `(count, *like.shape)`, in pieces along the first axis."""
    at_once = max(1, AT_ONCE // max(1, like.numel()))
    pieces = [
        torch.empty((min(at_once, count - start), *like.shape), dtype=like.dtype, device=like.device)
        for start in range(0, count, at_once)
    ]
    for piece in pieces:
        if law == "normal":
            piece.normal_(generator=generator)
        else:  # two logarithms are several times faster than exponential_; the uniform law includes 0
            piece.uniform_(generator=generator).clamp_(min=2.0**-25).log_().neg_().log_().neg_()
    return pieces


def _perturbed(
    scores: Tensor,
    k: int,
    temperature: Temperature,
    rows: bool,
    samples: int,
    law: Law,
    antithetic: bool,
    centred: bool,
    noise: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    if isinstance(k, Tensor):
        raise TypeError(f"k must be an int for perturbed top-k, got a tensor of shape {tuple(k.shape)}")
    if scores.dtype in (torch.float16, torch.bfloat16):  # too coarse for the noise
        options = (rows, samples, law, antithetic, centred, noise, generator)
        return _perturbed(scores.float(), k, temperature, *options).to(scores.dtype)
    temperature = prepared(scores, k, temperature)
    check_draws(samples, law, antithetic, centred)
    draws = samples // 2 if antithetic else samples
    size = draws * scores.numel()
    check_size(max(size, k * scores.numel()) if rows else size, scores, "noise and rows")
    plain, heat = scores.detach(), torch.as_tensor(temperature, dtype=scores.dtype, device=scores.device)
    if noise is None:
        pieces = _draw(plain, draws, law, generator)
    elif noise.shape == (draws, *scores.shape):
        pieces = list(noise.to(scores.dtype).split(max(1, AT_ONCE // max(1, scores.numel()))))
    else:
        raise ValueError(f"noise must have shape {(draws, *scores.shape)}, got {tuple(noise.shape)}")

    def ranked(piece: Tensor, side: int) -> Tensor:
        if isinstance(temperature, Tensor):
            return torch.addcmul(plain, piece, heat.detach(), value=side)
        return torch.add(plain, piece, alpha=side * temperature)

    index = [
        torch.stack([top_indices(ranked(piece, side), k, ranked=rows) for side in (1, -1)[: 1 + antithetic]])
        for piece in pieces
    ]
    mean: Tensor = _Mean.apply(scores, heat, torch.cat(index, 1), rows, law, centred, *pieces)
    return mean


def check_draws(samples: int, law: str, antithetic: bool, centred: bool) -> None:
    """Refuse numbers of draws that an estimate cannot be made from.

    Raises:
        ValueError: samples < 1, or < 2 where they are centred, or odd where they come in pairs; a law that
            is not one of the two; pairs of draws of a law that is not symmetric.
    """
    if law not in ("normal", "gumbel"):
        raise ValueError(f"noise must be normal or gumbel, got {law}")
    if antithetic and law != "normal":
        raise ValueError(f"antithetic draws need symmetric noise: normal, got {law}")
    if samples < 1 or (antithetic and samples % 2):
        raise ValueError(f"samples must be {'even and ' if antithetic else ''}>= 1, got {samples}")
    if centred and not antithetic and samples < 2:
        raise ValueError(f"samples must be >= 2 where they are centred, got {samples}")


def perturbed_mask(
    scores: Float[Tensor, "*rows n"],
    k: int,
    temperature: Temperature = 1.0,
    *,
    samples: int = 10,
    law: Law = "normal",
    antithetic: bool = False,
    centred: bool = True,
    noise: Float[Tensor, "draws *rows n"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*rows n"]:
    """The mean of the hard masks of `samples` noisy copies of the scores.

    VJP: `mean_i nu'(Z_i) (<H_i, g> - b_i) / temperature` over the draws Z_i, H_i their hard masks; nu'(z) is
    z (normal) or 1 - exp(-z) (Gumbel), b_i the mean of the other <H_j, g> where centred, else 0.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n].
        temperature: > 0, the size of the noise; a scalar or a tensor that broadcasts `(..., 1)`.
        samples: N, how many copies.
        law: Of the noise: "normal" or "gumbel", standard.
        antithetic: Whether the draws come in pairs Z, -Z (N even, normal law).
        centred: Whether the mean of the others is taken off each <H_i, g>. Where pairs cancel it changes
            nothing.
        noise: The draws `(N, ..., n)`, `(N / 2, ..., n)` of pairs; drawn where not given.
        generator: What they are drawn from; torch's own if None.

    Returns:
        The mask `(..., n)` in [0, 1], sum k. Its gradient is unbiased for that of the mean over all noise,
        not the derivative of this mask (a step function). There is no second derivative.

    Raises:
        ValueError: k, temperature or samples out of range, noise of another shape.

    Cost: N top-k and N n numbers, the noise, kept for the backward pass.

    Source: Berthet et al. 2020, "Learning with Differentiable Perturbed Optimizers", Prop. 3.1.
    Differs: the b_i (the mean of the others, which keeps the estimate unbiased: a division by
    N - 1), the pairs, and the derivative in the temperature.
    """
    return _perturbed(scores, k, temperature, False, samples, law, antithetic, centred, noise, generator)


def perturbed_selection(
    scores: Float[Tensor, "*rows n"],
    k: int,
    temperature: Temperature = 1.0,
    *,
    samples: int = 10,
    law: Law = "normal",
    antithetic: bool = False,
    centred: bool = True,
    noise: Float[Tensor, "draws *rows n"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*rows k n"]:
    """As `perturbed_mask`, of the selection: row j is the mean one-hot of the j-th largest noisy score.

    VJP: as that of `perturbed_mask`, with H_i and g of all k rows.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n].
        temperature: > 0, the size of the noise; a scalar or a tensor that broadcasts `(..., 1)`.
        samples: N, how many copies.
        law: Of the noise: "normal" or "gumbel", standard.
        antithetic: Whether the draws come in pairs Z, -Z (N even, normal law).
        centred: Whether the mean of the others is taken off each <H_i, g>.
        noise: The draws `(N, ..., n)`, `(N / 2, ..., n)` of pairs; drawn where not given.
        generator: What they are drawn from; torch's own if None.

    Returns:
        The selection `(..., k, n)`; its rows are non-negative, sum to 1 and add up to the mask.

    Raises:
        ValueError: k, temperature or samples out of range, noise of another shape.

    Cost: as the mask, and k n numbers.

    Source: Cordonnier et al. 2021, "Differentiable Patch Selection for Image Recognition".
    Differs: rows by rank and not by place, and as the mask.
    """
    return _perturbed(scores, k, temperature, True, samples, law, antithetic, centred, noise, generator)
