"""The finite-difference template: the scores are moved against the gradient and ranked once more.

With z = H(s + noise), g = dL/dz and a strength lambda > 0, the vector-Jacobian product is

    one-sided   ( H(s + noise) - H(s + noise - lambda g) ) / lambda
    symmetric   ( H(s + noise + lambda g) - H(s + noise - lambda g) ) / (2 lambda)

g is that of the loss of one row, so that an estimate does not depend on how many rows there are. Where the
loss wants values, the selection is made of the nested masks of the 1, ..., k largest: `P_j = H_j - H_{j-1}`.
Each H_j is differentiated in that way, and the results are added up.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods._contract import Step
from topkbench.operators import hard_mask
from topkbench.operators._contract import check_size
from topkbench.operators._top import top_indices

Strength = Callable[[Tensor], Tensor | float]
Observer = Callable[[Tensor], None]


def finite_difference(
    step: Step,
    noise: Float[Tensor, "*samples R B n"],
    strength: Strength,
    *,
    symmetric: bool = False,
    observe: Observer = lambda _: None,
) -> Float[Tensor, "R B"]:
    """The loss of the hard top-k of noisy scores, with the finite difference as its gradient.

    What flows to the scores beside the mask (where the loss multiplies them by it) is kept.

    Args:
        step: Where.
        noise: On the scores, `(R, B, n)` or with a sample axis in front; losses and gradients are averaged.
        strength: lambda as a function of g; a tensor broadcasts with g. Where it is 0 the gradient is 0.
        symmetric: Whether the scores are moved both ways.
        observe: Is shown the difference of the masks `(*samples, R, B, n)`.
    """
    ranked = step.scores.detach() + noise
    if step.wants == "values":
        check_size(step.k * ranked.numel(), ranked, "nested masks")
        ranked = ranked.unsqueeze(-2).expand(*ranked.shape[:-1], step.k, -1)
    part = _taken(ranked, step)
    if not torch.is_grad_enabled():
        return _mean(_loss(step, part), step.scores.shape[:-1])
    loss = _loss(step, part.requires_grad_())
    (g,) = torch.autograd.grad(loss.sum(), part, retain_graph=True)
    size = torch.as_tensor(strength(g), dtype=g.dtype, device=g.device)
    ahead = _taken(ranked + size * g, step) if symmetric else part.detach()
    difference = ahead - _taken(ranked - size * g, step)
    if step.wants == "values":
        difference = difference.sum(-2)
        size = size.squeeze(-2) if size.dim() > 1 else size
    observe(difference)
    quotient = difference / torch.where(size > 0, size * (2 if symmetric else 1), 1)
    path = (step.scores * _mean(quotient, step.scores.shape)).sum(-1)
    return _mean(loss, step.scores.shape[:-1]) + (path - path.detach())


def _taken(ranked: Tensor, step: Step) -> Tensor:
    """The hard mask; where values are wanted, row j of `(..., k, n)` the mask of its j largest."""
    if step.wants == "mask":
        return hard_mask(ranked, step.k)
    index = top_indices(ranked, step.k, ranked=True)
    ones = torch.ones(step.k, step.k, dtype=ranked.dtype, device=ranked.device).tril()
    return torch.zeros_like(ranked, memory_format=torch.contiguous_format).scatter(
        -1, index, ones.expand(index.shape)
    )


def _loss(step: Step, part: Tensor) -> Tensor:
    if step.wants == "mask":
        return step.of(part)
    return step.of(torch.diff(part, dim=-2, prepend=torch.zeros_like(part[..., :1, :])))


def _mean(numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Over samples, where there are any: (*samples, *shape) -> shape."""
    return numbers.reshape(-1, *shape).mean(0)
