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
from topkbench.methods._ties import Pairs, Ties


def flux(step: Step, near: float = math.inf) -> Float[Tensor, "R B"]:
    """A surrogate per row whose gradient with respect to W is the row's flux; its value means nothing.

    Args:
        step: With `inputs`; its W carries the gradient. Rows of W that coincide give NaN.
        near: How far from x a tie is looked for, > 0.
    """
    replicates, rows, n = step.scores.shape
    total = step.scores.new_zeros(replicates * rows)
    if n < 2 or step.k == n:
        return total.view(replicates, rows)
    W = step.W.detach()
    W = W - W.mean(1, keepdim=True)  # only differences of rows matter; a common part costs digits
    pairs = Pairs(W, near)
    for some, ties in pairs.ties(step.x @ W.mT, step.k):
        with torch.no_grad():
            push = _push(step, ties, some, near)
        difference = _rows_of(step.W, ties.replicate, ties.i) - _rows_of(step.W, ties.replicate, ties.j)
        total = total.index_add(0, ties.replicate * rows + ties.row, (difference * push).sum(-1))
    return total.view(replicates, rows) + (pairs.undefined * step.W.sum((1, 2)))[:, None]


def _push(step: Step, ties: Ties, some: slice, near: float) -> Float[Tensor, "T d"]:
    """What each tie adds to row i of the gradient, and takes from row j."""
    assert step.inputs is not None
    count = some.stop - some.start
    difference = _rows_of(step.W, ties.replicate, ties.i) - _rows_of(step.W, ties.replicate, ties.j)
    length = difference.norm(dim=-1)
    direction = difference / length[:, None]
    here = _rows_of(step.x, ties.replicate, ties.row)
    x = here - direction * (here * direction).sum(-1, keepdim=True)

    place, most = _places(ties.replicate - some.start, count)

    def beside(values: Tensor) -> Tensor:
        """Replicates beside each other, a replicate's ties below each other."""
        if count == 1:
            return values.unsqueeze(0)
        padded = values.new_zeros(count * most, *values.shape[1:]).index_copy_(0, place, values)
        return padded.view(count, most, *values.shape[1:])

    row, x_beside, direction = (beside(each) for each in (ties.row, x, direction))
    loss = step.inputs.elsewhere(some, row, x_beside)
    i, j, mask = ties.i[:, None], ties.j[:, None], ties.above  # one mask for both: it is the largest tensor
    with_i = loss(beside(mask.scatter_(-1, i, 1)))
    with_j = loss(beside(mask.scatter_(-1, i, 0).scatter_(-1, j, 1)))
    weight = (with_i - with_j) * step.inputs.line_density(x_beside, direction)
    if near < math.inf:
        weight /= step.inputs.line_mass(x_beside, direction, near)
    return x * (weight.flatten().index_select(0, place) / length)[:, None]


def _places(replicate: Int[Tensor, " T"], count: int) -> tuple[Int[Tensor, " T"], int]:
    """Where each goes when replicates lie beside each other, as wide as the widest of them; how wide."""
    widths = torch.bincount(replicate, minlength=count)
    most = int(widths.amax())
    first = widths.cumsum(0) - widths
    return torch.arange(len(replicate), device=replicate.device) + (most * replicate - first[replicate]), most


def _rows_of(
    matrix: Float[Tensor, "R m d"], replicate: Int[Tensor, " T"], row: Int[Tensor, " T"]
) -> Float[Tensor, "T d"]:
    """A row of a replicate's matrix each."""
    return matrix.flatten(0, 1).index_select(0, replicate * matrix.shape[1] + row)
