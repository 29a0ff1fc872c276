"""What the hard top-k's gradient misses: the boundary flux of the mean loss, on the batch's own x.

Where two scores tie for ranks k and k+1 the loss jumps; as W moves, the x on either side of the jump move
too, and with it the mean loss F(W) = E L. For scores W x and x of a known density

    grad F = E[gradient almost everywhere] + flux,
    flux   = sum over i < j of  E_x' [ rho (L with i kept - L with j kept) (x' added to row i, -x' to row j) ]

with x' = x less its component t along w_i - w_j, so that i and j tie; a pair counts where exactly k - 1
others score more; rho is the density of x along that direction at the tie over |w_i - w_j|: for x ~ N(0, I)
it is 1 / (sqrt(2 pi) |w_i - w_j|). (Reparameterisation of a non-differentiable model: Lee, Yu & Yang 2018.)

A row of x may serve any pair, whatever t is. Where `near` is given only pairs with |t| < near are looked at,
and count 1 / P(|t| < near) times, the chance being that given what lies across: the mean is the same, the
variance larger, and the time for a row much smaller, since few pairs are left.

Scores at x' follow from those at x and from W W^T. They move by at most |q_i - q_j| max_l |<w_l, w_i - w_j>|
/ |w_i - w_j|^2 on the way there, so that most pairs cannot tie for these ranks at x': that is looked at
first. Time goes as n^3 + n^2 d a replicate, n^2 a row (less with `near`: only scores near the k-th), n for
each pair that is left and a loss for each that ties. At n = 64, d = 32, k = 8, where learners start, 14 % of
the pairs are left and 23 tie in a row; with near = 0.3 it is 16 and 5.4 pairs.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkbench.methods._contract import Step
from topkbench.methods._ties import Pairs, Ties, Where
from topkbench.threads import keep_freed_memory, side_by_side, threads


def flux(step: Step, near: float = math.inf) -> Float[Tensor, " R"]:
    """A surrogate whose gradient with respect to W is the batch's flux, a mean over rows; its value is 0.

    Args:
        step: With `inputs`; its W carries the gradient. Rows of W that coincide give NaN.
        near: How far from x a tie is looked for, > 0.
    """
    W = step.W.detach()
    replicates, rows, n = step.scores.shape
    if n < 2 or step.k == n:
        return W.new_zeros(replicates)
    keep_freed_memory()
    pairs = Pairs(W, near)
    blocks, find = pairs.search(step.x, step.k)

    def part(where: Where) -> Float[Tensor, "some n d"]:
        with torch.no_grad():
            return _push(step, find(where), where[0], near)

    total = W * pairs.undefined[:, None, None]
    with side_by_side(threads(W.device, len(blocks))) as each_of:
        for (some, _), push in zip(blocks, each_of(part, blocks), strict=True):
            total[some] += push
    # Less its value, which is what W would make of it.
    value = (step.W * (total / rows)).sum((1, 2))
    return value - value.detach()


def _push(step: Step, ties: Ties, some: slice, near: float) -> Float[Tensor, "some n d"]:
    """What all ties together add to the gradient."""
    assert step.inputs is not None
    count, n = some.stop - some.start, step.W.shape[1]
    replicate = ties.replicate - some.start
    place, most = _places(replicate, count)

    def beside(values: Tensor) -> Tensor:
        """Replicates beside each other, a replicate's ties below each other."""
        if count == 1:
            return values.unsqueeze(0)
        padded = values.new_zeros(count * most, *values.shape[1:]).index_copy_(0, place, values)
        return padded.view(count, most, *values.shape[1:])

    row, x, direction = (beside(each) for each in (ties.row, ties.x, ties.direction))
    loss = step.inputs.elsewhere(some, row, x)
    weight = (loss(beside(ties.with_i)) - loss(beside(ties.with_j))) * step.inputs.line_density(x, direction)
    if near < math.inf:
        weight /= step.inputs.line_mass(x, direction, near)
    push = ties.x * (weight.flatten().index_select(0, place) / ties.length)[:, None]
    total = push.new_zeros(count * n, push.shape[1])
    total.index_add_(0, replicate * n + ties.i, push).index_add_(0, replicate * n + ties.j, push, alpha=-1)
    return total.view(count, n, -1)


def _places(replicate: Int[Tensor, " T"], count: int) -> tuple[Int[Tensor, " T"], int]:
    """Where each goes when replicates lie beside each other, as wide as the widest of them; how wide."""
    widths = torch.bincount(replicate, minlength=count)
    most = int(widths.amax())
    first = widths.cumsum(0) - widths
    return torch.arange(len(replicate), device=replicate.device) + (most * replicate - first[replicate]), most
