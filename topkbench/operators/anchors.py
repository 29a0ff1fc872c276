"""Entropic optimal transport from the scores to anchors on the line, by Sinkhorn iterations.

To k anchors of mass 1 and one for the rest (`soft_sorted`), to m anchors of one mass (`sinkhorn_rank`), or
to the least and the largest score (`cardinality_sinkhorn`). How the plan is found and differentiated:
`_plan.py`. A cost (s - b)^2 counts only by its product 2 s b: what depends on s or b alone goes into the
potentials. At a low temperature a fixed number of iterations does not reach the plan.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, largest, operator
from topkbench.operators._plan import check_iterations, check_plan, lifted, transport


def _counts(k: int | Tensor, like: Tensor) -> Tensor:
    """How many to take, as (..., 1, 1)."""
    return torch.as_tensor(k, dtype=like.dtype, device=like.device).unsqueeze(-1).unsqueeze(-1)


def _places(m: int, like: Tensor) -> Tensor:
    """0, ..., m - 1 as (m, 1)."""
    return torch.arange(m, dtype=like.dtype, device=like.device).unsqueeze(-1)


def _sorted_plan(scores: Tensor, k: int | Tensor, temperature: Temperature, iterations: int) -> Tensor:
    """To anchors k, ..., 1 and 0, the last with what is left; as many more of no mass as a larger k needs."""
    check_iterations(iterations)
    n, most = scores.shape[-1], largest(k, scores.shape[-1])
    check_plan(most + 1, scores)
    count, place = _counts(k, scores), _places(most + 1, scores)
    anchors = (count - place).clamp(min=0)
    masses = (place < count).to(scores.dtype) + (place == count) * (n - count)
    s = scores.unsqueeze(-2)
    costs = torch.maximum(s.detach().square(), (s.detach() - count).square())
    scale = costs.amax(-1, keepdim=True) * lifted(temperature)
    return transport(anchors * (2 * s - anchors) / scale, masses, iterations)


def _soft_sorted_mask(
    scores: Tensor, k: int | Tensor, temperature: Temperature = 1.0, *, iterations: int = 200
) -> Tensor:
    plan = _sorted_plan(scores, k, temperature, iterations)
    if isinstance(k, int):
        return plan[..., :k, :].sum(-2)
    taken = _places(plan.shape[-2], scores) < _counts(k, scores)
    return (plan * taken).sum(-2)


@operator(
    has_rows=True,
    streamed=_soft_sorted_mask,
    family="optimal transport",
    cost="k n iterations, k^2 n backward; memory k n",
    source="Xie et al. 2020",
    checked="explicit plan",
    bounded=False,
    monotone=False,
    shift_invariant=False,
    hard_limit=False,
    infinite=False,
    gradient=False,
    twice=False,
)
def soft_sorted(
    scores: Float[Tensor, "*rows n"],
    k: int,
    temperature: Temperature = 1.0,
    *,
    iterations: int = 200,
) -> Float[Tensor, "*rows k n"]:
    """Sorted SOFT: row j is the share of each score that entropic optimal transport moves to anchor k+1-j.

    Costs `C_ij = (s_i - b_j)^2 / c`, anchors `b = (k, ..., 1, 0)` of mass 1/n each and (n-k)/n, c the
    largest of them, a constant for the gradient. The anchors depend on k, and so does row j: these rows are
    not nested. The mask is their sum, for a tensor k too.

    VJP, P the shares of the plan, G their incoming gradient, c(A) = P (A - mean of A under P): with y from
    the Schur complement, S y = sum over scores of c(G), that of the exponents is c(G - y).

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; of the mask also a tensor, for each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`; the source's epsilon.
        iterations: Of Sinkhorn, at least 1.

    Returns:
        The selection `(..., k, n)`: each row non-negative and summing to 1. Only where the iterations have
        converged does an entry of the mask not exceed 1, and a larger score not get a smaller one: by
        default down to a temperature of about 0.03. A common shift of the scores changes c.

    Raises:
        ValueError: k, temperature or iterations out of range, or rows that do not fit.

    Cost: 2 passes over (k+1) x n numbers an iteration; the backward pass keeps the plan alone and takes one
    product n k^2 and one factorisation k^3.

    Source: Xie, Dai, Chen, Dai, Zhao, Zha, Wei & Pfister 2020, "Differentiable Top-k with Optimal
    Transport", with its backward pass, that of the limit. Differs: c is the largest cost of the row, where
    the published code takes that of the batch, so that a row's plan would depend on its neighbours; the
    Schur complement is factorised and not inverted.
    """
    return _sorted_plan(scores, k, temperature, iterations)[..., :k, :]


def _squashed(scores: Tensor) -> Tensor:
    """The logistic of the standardised scores; where all are equal, 1/2."""
    shifted = scores - scores.detach().amax(-1, keepdim=True)
    centred = shifted - shifted.mean(-1, keepdim=True)
    # The norm has a derivative of 0 where a root of the variance would have none.
    deviation = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / scores.shape[-1] ** 0.5
    return (centred / (deviation + 1e-10)).sigmoid()


def _rank_plan(scores: Tensor, temperature: Temperature, anchors: int | None, iterations: int) -> Tensor:
    """To m anchors between 1 and 0, of mass n/m each."""
    check_iterations(iterations)
    if anchors is not None and anchors < 2:
        raise ValueError(f"anchors must be at least 2, or None for as many as scores, got {anchors}")
    n = scores.shape[-1]
    m = n if anchors is None else anchors
    check_plan(m, scores)
    place = _places(m, scores)
    levels = 1 - place / max(m - 1, 1)
    logits = levels * (2 * _squashed(scores).unsqueeze(-2) - levels) / lifted(temperature)
    return transport(logits, torch.full_like(levels, n / m), iterations)


def _taken(k: int | Tensor, plan: Tensor) -> Tensor:
    """How much of each anchor is of the top k/n of the mass: (..., m, 1)."""
    m, n = plan.shape[-2:]
    return (_counts(k, plan) * m / n - _places(m, plan)).clamp(0, 1)


def _sinkhorn_rank_mask(
    scores: Tensor,
    k: int | Tensor,
    temperature: Temperature = 1.0,
    *,
    anchors: int | None = None,
    iterations: int = 200,
) -> Tensor:
    plan = _rank_plan(scores, temperature, anchors, iterations)
    return (_taken(k, plan) * plan).sum(-2)


@operator(
    has_rows=True,
    streamed=_sinkhorn_rank_mask,
    family="optimal transport",
    cost="m n iterations, m^2 n backward; memory m n",
    source="Cuturi, Teboul & Vert 2019",
    checked="explicit plan; ott-jax",
    bounded=False,
    monotone=False,
    hard_limit=False,
    infinite=False,
)
def sinkhorn_rank(
    scores: Float[Tensor, "*rows n"],
    k: int,
    temperature: Temperature = 1.0,
    *,
    anchors: int | None = None,
    iterations: int = 200,
) -> Float[Tensor, "*rows k n"]:
    """Sinkhorn ranks: the share of each score that entropic optimal transport moves to the top k/n.

    The scores, standardised and squashed to `x = sigmoid((s - mean) / deviation)`, are transported to m
    anchors evenly spread over [0, 1], all of one mass, at the cost `(x_i - b_j)^2`. Rank j is the j-th n-th
    of their mass from the top, m/n of an anchor: where m = n, one anchor. Row j is what it gets.

    VJP, P the shares of the plan, G their incoming gradient, c(A) = P (A - mean of A under P): with y from
    the Schur complement, S y = sum over scores of c(G), that of the exponents is c(G - y).

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; of the mask also a tensor, for each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`; the source's epsilon.
        anchors: m, at least 2; None for n. With few anchors rows are alike, and the mask stays soft where
            the top k/n ends within an anchor.
        iterations: Of Sinkhorn, at least 1.

    Returns:
        The selection `(..., k, n)`: each row non-negative and summing to 1; row j does not depend on k. Only
        where the iterations have converged does an entry of the mask not exceed 1, and a larger score not get
        a smaller one, and is the gradient the derivative: by default down to a temperature of about 0.03.
        All scores count, through mean and deviation, but neither their shift nor their scale.

    Raises:
        ValueError: k, temperature, anchors or iterations out of range, or a plan that does not fit.

    Cost: 2 passes over m x n numbers an iteration; the backward pass keeps the plan alone and takes one
    product n m^2 and one factorisation m^3.

    Source: Cuturi, Teboul & Vert 2019, "Differentiable Ranking and Sorting using Optimal Transport", with
    the squashing of its code, ott. Differs: the mask is read from the plan, where the source gives ranks; the
    number of iterations is fixed, where ott goes on until the sums are right.
    """
    plan = _rank_plan(scores, temperature, anchors, iterations)
    upto = torch.arange(1, k + 1, device=scores.device)
    nested = _taken(upto, plan).squeeze(-1)
    return nested.diff(dim=0, prepend=torch.zeros_like(nested[:1])) @ plan


@operator(
    family="optimal transport",
    cost="n iterations",
    source="Wang et al. 2023",
    checked="explicit plan",
    bounded=False,
    hard_limit=False,
    infinite=False,
    rows_sum_to_1=False,
    gradient=False,
    twice=False,
)
def cardinality_sinkhorn(
    scores: Float[Tensor, "*rows n"],
    k: int | Tensor,
    temperature: Temperature = 1.0,
    *,
    iterations: int = 50,
) -> Float[Tensor, "*out n"]:
    """The share of each score that entropic optimal transport moves to the largest and not to the least.

    Anchors `(max s, min s)` of mass k and n - k, at the cost of the distance. As no score lies outside, the
    two costs differ by `2 s - max s - min s`: converged, it is `entropic(scores, k, temperature / 2)`.

    Noise. Gumbel-Sinkhorn adds `-g_i` to minus the cost of "taken" and `+g_i` to that of "not taken", so the
    difference becomes `2 (s_i - g_i) - max s - min s`. That is this operator on noisy scores, but for the
    anchors, whose sum is one constant for all scores and drops out of the plan: noise on the scores, as
    `methods.Relaxed` has it, is the same. There it is `+g_i`, so that the k largest are draws without
    replacement; the published code has the mirrored law.

    VJP, P the shares of the plan, G their incoming gradient, c(A) = P (A - mean of A under P): with y from
    the Schur complement, S y = sum over scores of c(G), that of the exponents is c(G - y).

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n]; a tensor gives each row its own.
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.
        iterations: Of Sinkhorn, at least 1.

    Returns:
        The mask `(..., n)`, sum k; its entries exceed 1 where the iterations have not converged.

    Raises:
        ValueError: k, temperature or iterations out of range.

    Cost: 4 passes over the scores an iteration; the backward pass needs nothing but the plan.

    Source: Wang, Shen, Chen, Yang, Tao & Yan 2023, "Towards One-Shot Neural Combinatorial Solvers:
    Theoretical and Empirical Notes on the Cardinality-Constrained Case", and its code, which counts both
    halves of an iteration (its 100 are 50) and stops early. Differs: the gradient is that of the limit, where
    the source goes back through the iterations, with anchors held constant.
    """
    check_iterations(iterations)
    high, low = (end(scores.detach(), -1, keepdim=True) for end in (torch.amax, torch.amin))
    count = _counts(k, scores)
    costs = torch.stack([high - scores, scores - low], -2)
    masses = torch.cat([count, scores.shape[-1] - count], -2)
    return transport(-costs / lifted(temperature), masses, iterations)[..., 0, :]
