"""Entropic optimal transport from the scores to anchors, solved by a fixed number of Sinkhorn iterations.

To the two anchors "not taken" and "taken" (`soft`), or to the n ranks (`sinkhorn`). An iteration scales rows
and columns in turn, in the log domain. At a low temperature a fixed number of iterations does not reach the
transport plan, and so the hard top-k is not the limit.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from topkbench.operators._contract import Temperature, check_size, operator
from topkbench.operators._loop import State, repeat


def _two_anchors(u: Tensor, k: Tensor, iterations: int) -> Tensor:
    """Sinkhorn for two anchors whose costs differ by u; the one unknown is v - u, of the two potentials.

    Scaling the rows splits the mass of each score by sigmoid(v); scaling the columns moves v so that the
    shares would add up to k and n - k.
    """
    odds = k.log() - (u.shape[-1] - k).clamp(min=1).log()

    def scaled(v: Tensor) -> State:
        taken = logsigmoid(v)
        return (v + (odds - taken.logsumexp(-1, keepdim=True) + (taken - v).logsumexp(-1, keepdim=True)),)

    (v,) = repeat(scaled, (u.expand(*torch.broadcast_shapes(u.shape, k.shape)),), iterations - 1)
    return k * logsigmoid(v).softmax(-1)


class _TwoAnchors(torch.autograd.Function):
    """u -> the mask after so many iterations, with the vector-Jacobian product of the limit."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, k: Tensor, iterations: int) -> Tensor:
        mask = _two_anchors(u, k, iterations)
        return torch.where(k == u.shape[-1], mask * 0 + 1, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shape = inputs[0].shape
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        a = (mask * (1 - mask)).clamp(min=0)
        total = a.sum(-1, keepdim=True)
        mean = (a * grad).sum(-1, keepdim=True) / torch.where(total > 0, total, 1)
        return (a * (grad - mean)).sum_to_size(ctx.shape), None, None


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")


@operator(
    family="optimal transport",
    cost="n iterations",
    source="Xie et al. 2020",
    checked="explicit plan; qfeval-functions",
    bounded=False,
    shift_invariant=False,
    hard_limit=False,
    infinite=False,
    gradient=False,
    twice=False,
)
def soft(
    scores: Float[Tensor, "*rows n"],
    k: int | Tensor,
    temperature: Temperature = 1.0,
    *,
    iterations: int = 200,
) -> Float[Tensor, "*out n"]:
    """SOFT: the share of each score that entropic optimal transport moves to the anchor 1 rather than 0.

    Costs `C_ij = (s_i - b_j)^2 / c`, anchors `b = (0, 1)` of mass `(n-k)/n` and `k/n`, c the largest of
    the row's squares, a constant for the gradient. Converged, it is
    `entropic(scores, k, temperature * c / 2)`.

    VJP: `2 a (g - <a, g> / <a, 1>) / (temperature c)`, a = m (1 - m): that of the limit.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`; the source's epsilon.
        iterations: Of Sinkhorn, at least 1.

    Returns:
        The mask `(..., n)`, sum k; its entries exceed 1 where the iterations have not converged. It depends
        on a common shift of the scores, through c.

    Raises:
        ValueError: k, temperature or iterations out of range.

    Cost: one pass over the scores an iteration; the backward pass needs nothing but the mask.

    Source: Xie, Dai, Chen, Dai, Zhao, Zha, Wei & Pfister 2020, "Differentiable Top-k with Optimal
    Transport", with its closed-form backward pass, that of the limit. Differs: c is the largest cost of
    the row, where the published code takes that of the batch, so that a row's mask would depend on its
    neighbours; of the two potentials an iteration updates, only their difference is kept.
    """
    _check_iterations(iterations)
    squares = torch.maximum(scores.detach().square(), (scores.detach() - 1).square())
    u = (2 * scores - 1) / (temperature * squares.amax(-1, keepdim=True))
    counts = torch.as_tensor(k, dtype=scores.dtype, device=scores.device).unsqueeze(-1)
    mask: Tensor = _TwoAnchors.apply(u, counts, iterations)
    return mask


@operator(
    has_rows=True,
    family="optimal transport",
    cost="n^2 iterations; memory n^2 iterations",
    source="Mena et al. 2018, without noise",
    checked="explicit plan; POT",
    bounded=False,
    monotone=False,
    hard_limit=False,
    infinite=False,
)
def sinkhorn(
    scores: Float[Tensor, "*rows n"],
    k: int,
    temperature: Temperature = 1.0,
    *,
    iterations: int = 20,
) -> Float[Tensor, "*rows k n"]:
    """Sinkhorn sorting: the first k rows of `S(w s^T / temperature)`, with the ranks w_j = (n+1)/2 - j.

    `S(X)` is exp(X) with rows, columns and rows again divided by their sums, in turn; in the limit the doubly
    stochastic matrix P that maximises `<P, w s^T> + temperature * entropy(P)`. Row j does not depend on k.

    VJP, g_j for row P_j: from G_j = P_j g_j (0 beyond k) back through the divisions, each of which takes
    `X sum G` off G, sums over the rows or columns divided, X what came out; then `w^T G / temperature`.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n].
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.
        iterations: Of columns and rows, at least 1.

    Returns:
        The selection `(..., k, n)`: each row non-negative and summing to 1; columns only in the limit, so
        that an entry of the mask may exceed 1, and a larger score may get a smaller one.

    Raises:
        ValueError: k, temperature or iterations out of range, or what autograd keeps is too large.

    Cost: 2 passes over n x n numbers an iteration, all of which are kept for the backward pass.

    Source: Mena, Belanger, Linderman & Snoek 2018, "Learning Latent Permutations with Gumbel-Sinkhorn
    Networks", without the noise. Differs: there X is any matrix, here that of sorting; one division of rows
    more, in front, which makes a shift of the scores drop out.
    """
    _check_iterations(iterations)
    n = scores.shape[-1]
    check_size((2 * iterations + 1) * n * scores.numel(), scores, f"{2 * iterations + 1} matrices n x n")
    ranks = torch.arange(1, n + 1, dtype=scores.dtype, device=scores.device).unsqueeze(-1) - (n + 1) / 2
    centred = scores - scores.detach().amax(-1, keepdim=True)
    x = (-ranks * (centred / temperature).unsqueeze(-2)).log_softmax(-1)
    for _ in range(iterations):
        x = x.log_softmax(-2).log_softmax(-1)
    return x[..., :k, :].exp()
