"""The k-subset distribution: `p(z) = exp(<z, s> / temperature) / e_k`, z with k ones and n - k zeros.

It is the law of independent Bernoulli variables given that their sum is k (conditional Poisson). Adding a
constant to all log-odds does not change it, so they are shifted until the probabilities sum to about k;
then the sum is k with a probability of at least about `1 / sqrt(n)` (k is its mode), and all that is asked
for is a ratio of numbers that neither under- nor overflow: see `topkbench.operators.esp`.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, pad, softplus

from topkbench.operators._contract import Temperature, check_size, largest, operator, prepared, readable
from topkbench.operators._top import at_rank, top_values
from topkbench.operators.esp import down, up
from topkbench.operators.threshold import entropic

Counted = tuple[int | Tensor, int, bool]


def _counted(k: int | Tensor, n: int) -> Counted:
    """How many to count, the largest such number in any row, and whether zeros are counted, not ones.

    Zeros are where they are fewer. A tensor k is looked at on the CPU, and elsewhere taken for n.
    """
    if isinstance(k, Tensor) and not (readable(k) and k.numel()):
        return k, n, False
    least, most = (k, k) if isinstance(k, int) else (int(k.min()), int(k.max()))
    return (n - k, n - least, True) if n - least < most else (k, most, False)


def _tilted(scores: Tensor, k: int | Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
    """Log-odds u, `(..., n)`, that sum to about k, and the shift, `(..., 1)`, from `scores / temperature`.

    The shift need not be exact: whatever it is, u has the same law given the sum. For autograd it does not
    depend on the scores.
    """
    bound = torch.finfo(scores.dtype).max ** 0.5
    scores = scores.clamp(-bound, bound)  # infinite scores: differences and quotients stay finite
    fixed = scores.detach()
    p = entropic.function(fixed, k, temperature).detach()
    most = largest(k, scores.shape[-1])
    kth, p_kth = (at_rank(top_values(rows, most), k) for rows in (fixed, p))
    # By the k-th score: one that all others are far from must not be shifted far itself.
    odds = torch.logit(p_kth.clamp(max=1 - torch.finfo(p.dtype).eps))
    return (scores - kth) / temperature + odds, kth / temperature - odds


def _tree(p: Tensor, q: Tensor, counted: Counted) -> tuple[list[Tensor], Tensor]:
    """The levels of `prod(q + p x)`, or `prod(p + q x)`, and a 1 at the power of x that is counted."""
    target, degree, zeros = counted
    check_size(p.numel() * (degree + 1), p, "the k-subset distribution")
    factors = torch.stack([p, q] if zeros else [q, p], -1)
    wanted = torch.as_tensor(target, device=p.device).unsqueeze(-1)
    at = (torch.arange(degree + 1, device=p.device) == wanted).to(p.dtype).unsqueeze(-2)
    at = at.expand(*p.shape[1:-1], 1, degree + 1).unsqueeze(0)
    return up(factors[..., : degree + 1], degree), torch.cat([at, torch.zeros_like(at)])[: len(p)]


def _conditional(p: Tensor, q: Tensor, counted: Counted) -> Tensor:
    """`p_i P(the others sum to k - 1) / P(all sum to k)`, with its derivative where p has one."""
    levels, root = _tree(p, q, counted)
    n, taken = p.shape[-1], 0 if counted[2] else 1
    others = down(levels, root)[..., :n, taken]
    total = (levels[-1] * root[:1]).sum(-1)
    mask = p[:1] * others[:1] / total[:1]
    if len(p) == 1:
        return mask
    rise = p[1:] * others[:1] + p[:1] * others[1:]
    return torch.cat([mask, (rise - mask * total[1:]) / total[:1]])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    u, target, *ctx.rest = inputs
    tensors = [target] if isinstance(target, Tensor) else []
    ctx.target = None if tensors else target
    ctx.save_for_backward(u, *tensors)


def _recalled(ctx: Any) -> tuple[Tensor, Counted]:
    u, *tensors = ctx.saved_tensors
    return u, (tensors[0] if tensors else ctx.target, *ctx.rest)


class _Marginals(torch.autograd.Function):
    """u -> E z. The Jacobian, the covariance of z, is symmetric: the VJP of g is the derivative along g."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, target: int | Tensor, degree: int, zeros: bool) -> Tensor:
        return _conditional(u.sigmoid()[None], (-u).sigmoid()[None], (target, degree, zeros))[0]

    setup_context = staticmethod(_remember)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        u, counted = _recalled(ctx)
        return _covariance(u, grad, counted), None, None, None


def _covariance(u: Tensor, g: Tensor, counted: Counted) -> Tensor:
    """C g. A constant added to g does not change it: one is taken out that leaves little to cancel."""
    p, q = u.sigmoid(), (-u).sigmoid()
    weight = (p * q).detach()
    total = weight.sum(-1, keepdim=True)
    centre = (weight * g.detach()).sum(-1, keepdim=True) / torch.where(total > 0, total, 1)
    slope = p * q * (g - centre)
    return _conditional(torch.stack([p, slope]), torch.stack([q, -slope]), counted)[1]


@operator(
    family="subset distribution",
    cost="n k",
    source="Ahmed, Zeng, Niepert & Van den Broeck 2023",
    checked="enumeration; difftopk",
)
def marginals(
    scores: Float[Tensor, "*rows n"], k: int | Int[Tensor, "*ks"], temperature: Temperature = 1.0
) -> Float[Tensor, "*out n"]:
    """The probability of each score to be in a random k-subset, `p(z) ~ exp(<z, s> / temperature)`.

    `m_i = w_i e_(k-1)(w without i) / e_k(w)`, w = exp(s / temperature), e_k the elementary symmetric
    polynomial; at k = 1 the softmax.

    VJP: `C g / temperature`, C the covariance of z, `C_ij = P(z_i z_j = 1) - m_i m_j`, which is never built.

    Args:
        scores: `(..., n)`, floating point.
        k: How many to take, in [1, n].
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.

    Returns:
        The mask `(..., n)` in (0, 1), sum k; all derivatives exist.

    Raises:
        ValueError: k or temperature out of range; more than the limit in one tensor.

    Cost: time and memory n min(k, n-k), in 2 log2 n batched steps; three times that for the gradient. What
    is kept for the backward pass is n numbers. A tensor k on an accelerator costs as much as k = n.

    Source: Ahmed, Zeng, Niepert & Van den Broeck 2023, "SIMPLE: A Gradient Estimator for k-Subset Sampling";
    as a relaxation, Vivier-Ardisson et al. 2026, "Differentiable Knapsack and Top-k Operators via
    Dynamic Programming". Differs: a tree in place of a recursion over the n scores, probabilities shifted
    to sum k in place of logarithms (and of their floor of -300 in the published code).
    """
    u, _ = _tilted(scores, k, temperature)
    mask: Tensor = _Marginals.apply(u, *_counted(k, scores.shape[-1]))
    return mask


class _LogChance(torch.autograd.Function):
    """u -> log P(Bernoulli variables with log-odds u sum to k), (..., 1)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, target: int | Tensor, degree: int, zeros: bool) -> Tensor:
        levels, root = _tree(u.sigmoid()[None], (-u).sigmoid()[None], (target, degree, zeros))
        return (levels[-1] * root).sum(-1)[0].log()

    setup_context = staticmethod(_remember)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        u, counted = _recalled(ctx)
        mask = _Marginals.apply(u, *counted)
        return grad * (mask - u.sigmoid()), None, None, None


def log_normalizer(
    scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0
) -> Float[Tensor, "*rows"]:
    """`log e_k(exp(s / temperature))`; its gradient is `marginals / temperature`.

    Raises:
        ValueError: k or temperature out of range.
    """
    temperature = prepared(scores, k, temperature)
    u, shift = _tilted(scores, k, temperature)
    chance = _LogChance.apply(u, *_counted(k, scores.shape[-1]))
    return (softplus(u).sum(-1, keepdim=True) + chance + k * shift).squeeze(-1)


def log_probability(
    scores: Float[Tensor, "*rows n"],
    mask: Float[Tensor, "*samples n"],
    k: int,
    temperature: Temperature = 1.0,
) -> Float[Tensor, "*samples"]:
    """`log p(z)` of hard masks with k ones; its gradient is `(z - marginals) / temperature`.

    Args:
        scores: `(..., n)`.
        mask: `(*s, ..., n)`; axes in front are samples, for which the normaliser is found once.
        k: How many ones each has (not looked at).
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.
    """
    temperature = prepared(scores, k, temperature)
    u, _ = _tilted(scores, k, temperature)
    chance = _LogChance.apply(u, *_counted(k, scores.shape[-1])).squeeze(-1)
    return (mask * logsigmoid(u) + (1 - mask) * logsigmoid(-u)).sum(-1) - chance


def entropy(
    scores: Float[Tensor, "*rows n"], k: int, temperature: Temperature = 1.0
) -> Float[Tensor, "*rows"]:
    """`-E log p(z)`, in [0, log C(n, k)]; its gradient is `-C s / temperature^2`, C as in `marginals`."""
    temperature = prepared(scores, k, temperature)
    u, _ = _tilted(scores, k, temperature)
    counted = _counted(k, scores.shape[-1])
    mask, chance = _Marginals.apply(u, *counted), _LogChance.apply(u, *counted)
    bound = -math.log(torch.finfo(u.dtype).tiny)
    near = u.clamp(-bound, bound)  # a mask that rounds to 1 must not be paired with log-odds of 1e19
    cross = mask * logsigmoid(near) + (1 - mask) * logsigmoid(-near)
    return (chance - cross.sum(-1, keepdim=True)).squeeze(-1)


def sample(
    scores: Float[Tensor, "*rows n"],
    k: int,
    temperature: Temperature,
    uniforms: Float[Tensor, "*samples m"],
) -> Float[Tensor, "*samples n"]:
    """Exact draws: hard masks with k ones, with probability `p(z)`. A constant for autograd.

    From the root down, each node splits its count between its two halves: j to the left with probability
    proportional to `P(left sums to j) P(right sums to count - j)`.

    Args:
        scores: `(..., n)`.
        k: How many to take, in [1, n].
        temperature: > 0, a scalar or a tensor that broadcasts `(..., 1)`.
        uniforms: `(*s, ..., n - 1)` on [0, 1), one for each split; axes in front are samples.

    Cost: that of the mask, and n min(k, n-k) for each sample, in log2 n batched steps.

    Source: Ahmed et al. 2023. Differs: by halves, not score by score.

    Raises:
        ValueError: k or temperature out of range; uniforms of another length than n - 1.
    """
    temperature = prepared(scores, k, temperature)
    n = scores.shape[-1]
    if uniforms.shape[-1] != n - 1:
        raise ValueError(f"uniforms must be (..., {n - 1}) for {n} scores, got {tuple(uniforms.shape)}")
    with torch.no_grad():
        u, _ = _tilted(scores, k, temperature)
        target, degree, zeros = counted = _counted(k, n)
        levels, _ = _tree(u.sigmoid()[None], (-u).sigmoid()[None], counted)
        count = torch.full((*uniforms.shape[:-1], 1), int(target), device=u.device)
        check_size(count.numel() * n * (degree + 1), u, "the samples of the k-subset distribution")
        used = 0
        for height in range(len(levels) - 2, -1, -1):
            nodes = -(-n // 2**height)  # that a level was filled up to an even number takes no draw
            draw = uniforms[..., used : used + nodes // 2]
            used += nodes // 2
            count = _split(levels[height][0], count[..., : -(-nodes // 2)], pad(draw, (0, nodes % 2)))
        count = count[..., :n]
        return (1 - count if zeros else count).to(scores.dtype)


def _split(level: Tensor, count: Tensor, draw: Tensor) -> Tensor:
    """The counts of the two children of each node, side by side: (..., m / 2) -> (..., m)."""
    left, right = level[..., 0::2, :], level[..., 1::2, :]
    rest = count.unsqueeze(-1) - torch.arange(level.shape[-1], device=level.device)
    possible = (rest >= 0) & (rest < level.shape[-1])
    right = right.expand(*rest.shape[:-1], -1).gather(-1, rest.clamp(0, level.shape[-1] - 1))
    weights = torch.where(possible, left * right, 0)
    below = weights.cumsum(-1)
    # The first j whose sum exceeds a share of the total; never one of weight 0: the count must add up.
    over = (below > draw.unsqueeze(-1) * below[..., -1:]) & (weights > 0)
    taken = over.to(torch.uint8).argmax(-1)
    return torch.stack([taken, count - taken], -1).flatten(-2)
