"""Entropic optimal transport from n scores of mass 1 to m anchors: the plan by Sinkhorn, and its VJP.

The plan is P_ji = exp(x_ji + f_i + g_j), (m, n), x the logits (minus the costs, over the temperature), with
sums 1 over the anchors and c_j, the masses, over the scores. An iteration scales scores, then anchors, in
the log domain; the sums over the scores are exact, those over the anchors only in the limit.

Vector-Jacobian product for G = dL/dP, by the implicit function theorem at the fixed point. In what follows
P is divided by its sums over the anchors, and Z(A)_ji = P_ji (A_ji - sum_l P_li A_li). The n potentials f
are eliminated from dP = P * (dx + df + dg); what is left for g is the Schur complement, m x m,

    S = diag(sum_i P_ji) - P P^T,     S y = sum_i Z(G)_ji,     dL/dx = Z(G - y).

S is the Laplacian of a graph on the anchors with weights (P P^T)_jl, never negative: it is summed from those,
so that nothing cancels where the plan is nearly hard. Constants on a connected part are in its kernel, and
the right side has none of them: a multiple of the identity far below all that counts makes it invertible.

Where the iterations have not converged, that is the derivative of the limit taken at a plan which is not yet
it: neither the derivative of what is computed, nor that of the limit; the better, the closer they are.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Temperature, check_size
from topkbench.operators._loop import State, repeat


def check_iterations(iterations: int) -> None:
    """Refuse fewer than one iteration with a ValueError."""
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")


def transport(
    logits: Float[Tensor, "*rows m n"], masses: Float[Tensor, "*masses m 1"], iterations: int
) -> Float[Tensor, "*out m n"]:
    """The plan, whose sums over the scores are the masses.

    Args:
        logits: `(..., m, n)`, minus the costs over the temperature.
        masses: `(..., m, 1)`, that broadcast with the logits and sum to n; an anchor of mass 0 gets nothing.
        iterations: Of Sinkhorn, at least 1.

    Cost: 2 m n exponentials an iteration; the backward pass takes n m^2 + m^3 in double precision, and keeps
    the plan.
    """
    plan: Tensor = _Plan.apply(logits, masses, iterations)
    return plan


def lifted(temperature: Temperature) -> Temperature:
    """A temperature `(..., 1)` of rows `(..., n)` as one of their `(..., m, n)`."""
    if isinstance(temperature, Tensor) and temperature.dim():
        return temperature.unsqueeze(-1)
    return temperature


def check_plan(anchors: int, scores: Tensor) -> None:
    """Refuse a plan that does not fit with a ValueError."""
    check_size(anchors * scores.numel(), scores, f"a plan to {anchors} anchors")


def _sinkhorn(logits: Tensor, masses: Tensor, iterations: int) -> Tensor:
    absent = masses == 0

    def scaled(x: Tensor) -> State:
        x = x.log_softmax(-2)
        missing = masses.log() - x.logsumexp(-1, keepdim=True)
        return (x + missing.masked_fill(absent, 0),)

    (x,) = repeat(scaled, (logits.masked_fill(absent, -torch.inf),), iterations)
    return x.exp()


def _centred(shares: Tensor, a: Tensor) -> Tensor:
    """`shares * (a - their mean of a)`, which does not cancel where nearly all goes to one anchor."""
    most = shares.argmax(-2, keepdim=True)
    a = a.expand(shares.shape)
    a = a - a.gather(-2, most)
    return shares * (a - (shares * a).sum(-2, keepdim=True))


def _potentials(shares: Tensor, pushes: Tensor) -> Tensor:
    """The solution y of S y = pushes, (..., m, 1)."""
    weights = shares @ shares.mT
    weights = weights - weights.diagonal(dim1=-2, dim2=-1).diag_embed()
    degrees = weights.sum(-1)
    most = degrees.detach().amax(-1, keepdim=True)
    # As large as the roundings of m steps of the factorisation; not 0 where the plan is hard.
    ridge = 4 * shares.shape[-2] * torch.finfo(shares.dtype).eps * most + 1e-300
    factor, _ = torch.linalg.cholesky_ex((degrees + ridge).diag_embed() - weights)
    return torch.cholesky_solve(pushes, factor)


class _Plan(torch.autograd.Function):
    """(logits, masses) -> the plan after so many iterations, with the VJP of the limit."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, masses: Tensor, iterations: int) -> Tensor:
        return _sinkhorn(logits, masses, iterations)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shape = inputs[0].shape
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (plan,) = ctx.saved_tensors
        shares, g = plan.double(), grad.double()
        shares = shares / shares.sum(-2, keepdim=True)
        y = _potentials(shares, _centred(shares, g).sum(-1, keepdim=True))
        return _centred(shares, g - y).to(grad.dtype).sum_to_size(ctx.shape), None, None
