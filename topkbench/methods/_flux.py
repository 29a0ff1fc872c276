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
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topkbench.methods._contract import Step

PIECE = 1 << 18  # numbers in the largest tensor of a pass over pairs: they stay in the cache


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
    scores = step.x @ W.mT
    pairs = _Pairs(W, near)
    ranked, order = scores.sort(-1, descending=True)
    window = pairs.window(ranked, step.k)
    # Rows in the order of how many ranks are in it, so that few pairs do for a block of them.
    alike = (window * torch.arange(n, device=W.device)).amax(-1).argsort(-1)
    parts = [each.take_along_dim(alike.unsqueeze(-1), 1) for each in (scores, ranked, order, window)]
    for some, part in _blocks(replicates, rows, PIECE // max(1, _ranks(window).shape[1])):
        with torch.no_grad():
            ties = pairs.ties(_Block(some.start, part.start, *(each[some, part] for each in parts)), step.k)
            ties = ties._replace(row=alike[ties.replicate, ties.row])
            push = _push(step, ties, some, near)
        difference = _rows_of(step.W, ties.replicate, ties.i) - _rows_of(step.W, ties.replicate, ties.j)
        total = total.index_add(0, ties.replicate * rows + ties.row, (difference * push).sum(-1))
    return total.view(replicates, rows) + (pairs.undefined * step.W.sum((1, 2)))[:, None]


def _blocks(replicates: int, rows: int, at_once: int) -> Iterator[tuple[slice, slice]]:
    """Replicates and rows that go together: several whole replicates, or some rows of one."""
    together, of_one = max(1, at_once // rows), max(1, min(rows, at_once))
    for first in range(0, replicates, together):
        for low in range(0, rows, of_one):
            yield slice(first, min(first + together, replicates)), slice(low, min(low + of_one, rows))


class _Block(NamedTuple):
    """Some rows of some replicates."""

    replicate: int  # the first of them
    row: int
    scores: Float[Tensor, "R B n"]
    ranked: Float[Tensor, "R B n"]  # largest first
    order: Int[Tensor, "R B n"]  # whose these are
    window: Bool[Tensor, "R B n"]  # which ranks can tie


class _Ties(NamedTuple):
    """What ties for ranks k and k+1, T of them, in the order of their replicates."""

    replicate: Int[Tensor, " T"]
    row: Int[Tensor, " T"]
    i: Int[Tensor, " T"]
    j: Int[Tensor, " T"]
    above: Float[Tensor, "T n"]  # 1 for who scores more


class _Pairs:
    """What of W `(R, n, d)` its pairs of rows need: tables `(R, n, n)`."""

    def __init__(self, W: Float[Tensor, "R n d"], near: float) -> None:
        self.near, self.gram = near, W @ W.mT
        self.squared = torch.cdist(W, W, compute_mode="donot_use_mm_for_euclid_dist").square()
        apart = self.squared + torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
        self.undefined = torch.where(apart.amin((1, 2)) > 0, 0.0, torch.nan)
        self.slope = (self.gram.diagonal(dim1=1, dim2=2)[:, :, None] - self.gram) / apart
        self.reach = _reach(self.gram) / apart  # how far any other score moves, over |q_i - q_j|
        self.limit = near * self.squared.sqrt()
        # No score moves further than this, be it of the pair or not.
        self.most = near * W.norm(dim=-1).amax(-1)[:, None, None]

    def window(self, ranked: Float[Tensor, "R B n"], k: int) -> Bool[Tensor, "R B n"]:
        """Which ranks are near enough to the k-th and the next to tie there."""
        may = ranked <= ranked[..., k, None] + 2 * self.most
        return may.logical_and_(ranked >= ranked[..., k - 1, None] - 2 * self.most)

    def ties(self, block: _Block, k: int) -> _Ties:
        """All that tie."""
        rows, n = block.scores.shape[1:]
        where, i, j = self._may_tie(block, _ranks(block.window), k)
        q, gram, squared = block.scores.reshape(-1, n), self.gram.flatten(0, 1), self.squared.flatten()
        at_once = max(1, PIECE // n)
        kept = []
        for start in range(0, max(1, len(where)), at_once):
            w, one, other = (each[start : start + at_once] for each in (where, i, j))
            r = torch.div(w, rows, rounding_mode="floor").add_(block.replicate)
            moved, at_one, at_other = q.index_select(0, w), one[:, None], other[:, None]
            moves = gram.index_select(0, r * n + one).sub_(gram.index_select(0, r * n + other))
            far = moved.gather(1, at_one) - moved.gather(1, at_other)
            far /= squared.index_select(0, (r * n + one) * n + other)[:, None]
            moved.addcmul_(moves, far, value=-1)
            # Numbers, not truth values: several times as fast on a CPU, and what the mask will be made of.
            above = torch.gt(moved, moved.gather(1, at_one), out=moves)
            above.scatter_(1, at_one, 0).scatter_(1, at_other, 0)
            tie = (above.sum(-1) == k - 1).nonzero().squeeze(-1)
            kept.append([each.index_select(0, tie) for each in (r, w % rows + block.row, one, other, above)])
        ties = _Ties(*(torch.cat(each) for each in zip(*kept, strict=True)))
        if len(self.gram) == 1:
            return ties
        order = ties.replicate.argsort(stable=True)
        return _Ties(*(each.index_select(0, order) for each in ties))

    def _may_tie(self, block: _Block, ranks: Int[Tensor, "2 P"], k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, i and j of those that are not ruled out."""
        replicates, rows, n = block.ranked.shape
        ranked, order = (each.flatten(0, 1).mT.contiguous() for each in (block.ranked, block.order))
        a, b = ranks
        tables = torch.arange(block.replicate, block.replicate + replicates, device=order.device) * n**2
        first = (order * n + tables.repeat_interleave(rows)).index_select(0, a)  # of i in the tables
        pair = order.index_select(0, b).add_(first).flatten()

        def of(table: Tensor) -> Tensor:
            return table.flatten().index_select(0, pair).view_as(first)

        level = ranked.index_select(0, a)
        far = level - ranked.index_select(0, b)
        may = far < (math.inf if self.near == math.inf else of(self.limit))
        level.addcmul_(far, of(self.slope), value=-1)
        move = of(self.reach).mul_(far)
        if k <= n - 2:  # the k-th of the others must be able to come below the level
            may &= ranked.index_select(0, _without(a, b, k - 1)) <= level + move
        if k >= 2:  # and the one before to be above it
            may &= ranked.index_select(0, _without(a, b, k - 2)) >= level - move
        left = may.flatten().nonzero().squeeze(-1)
        pair = pair.index_select(0, left) % n**2
        return left % (replicates * rows), torch.div(pair, n, rounding_mode="floor"), pair % n


def _ranks(window: Bool[Tensor, "R B n"]) -> Int[Tensor, "2 P"]:
    """The pairs of ranks, counted from 0, that are in the window of some row."""
    ranks = window.flatten(0, 1).any(0).nonzero().squeeze(-1)
    return ranks[torch.triu_indices(len(ranks), len(ranks), 1, device=window.device)]


def _without(a: Int[Tensor, " P"], b: Int[Tensor, " P"], place: int) -> Int[Tensor, " P"]:
    """The rank, counted from 0, of who is at this place among all but the ranks a < b."""
    return place + (a <= place).long() + (b <= place + 1).long()


def _reach(gram: Float[Tensor, "R n n"]) -> Float[Tensor, "R n n"]:
    """The largest |gram_il - gram_jl| over l other than i and j."""
    replicates, n, _ = gram.shape
    own = torch.arange(n, device=gram.device)
    found = []
    for some in own.split(max(1, PIECE // (replicates * n * n))):
        differences = (gram[:, some, None] - gram[:, None]).abs_()
        differences[:, some - some[0], :, some] = 0
        differences[:, :, own, own] = 0
        found.append(differences.amax(-1))
    return torch.cat(found, 1)


def _push(step: Step, ties: _Ties, some: slice, near: float) -> Float[Tensor, "T d"]:
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
    masks = (ties.above.scatter(-1, each[:, None], 1) for each in (ties.i, ties.j))
    with_i, with_j = (loss(beside(mask)) for mask in masks)
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
