"""What the hard top-k's gradient misses: the boundary flux of the mean loss, on the batch's own x.

Where two scores tie for ranks k and k+1 the loss jumps; as W moves, the x on either side of the jump move
too, and with it the mean loss F(W) = E L. For scores W x and x of a known density

    grad F = E[gradient almost everywhere] + flux,
    flux   = sum over i < j of  E_x' [ rho (L with i kept - L with j kept) (x' added to row i, -x' to row j) ]

with x' = x less its component along w_i - w_j, so that i and j tie; a pair counts where exactly k - 1 others
score more; rho is the density of x along that direction at the tie over |w_i - w_j|: for x ~ N(0, I) it is
1 / (sqrt(2 pi) |w_i - w_j|). (Reparameterisation of a non-differentiable model: Lee, Yu & Yang 2018.)

Every row of x is used for every pair. Its scores at x' follow from its scores at x and from W W^T. Most
pairs cannot tie for these ranks at x', since the other scores move by at most |q_i - q_j| max_l |<w_l, w_i -
w_j>| / |w_i - w_j|^2 on the way there; that is looked at first. So time goes as n^2 a row, then n for each
pair that is left (10 % of them at n = 64, d = 32, k = 8), then a loss for each that ties: about n / 2.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topkbench.methods._contract import Step

PIECE = 1 << 18  # numbers in the largest tensor of a pass over pairs: they stay in the cache


def flux(step: Step) -> Float[Tensor, "R B"]:
    """A surrogate per row whose gradient with respect to W is the row's flux; its value means nothing.

    Args:
        step: With `inputs`; its W carries the gradient. Rows of W that coincide give NaN.
    """
    replicates, rows, n = step.scores.shape
    if n < 2 or step.k == n:
        return step.scores.new_zeros(replicates, rows)
    found: list[list[_Ties]] = [[] for _ in range(replicates)]
    undefined = []
    for r in range(replicates):  # each has pairs enough to keep the processor busy
        pairs = _Pairs(step.W[r].detach())
        undefined.append(torch.where(pairs.squared.amin() > 0, 0.0, torch.nan))
        at_once = max(1, PIECE // len(pairs.i))
        for low in range(0, rows, at_once):
            found[r].append(_Ties(*pairs.ties(step.scores[r, low : low + at_once].detach(), step.k, low)))
    surrogate = _surrogate(step, found)
    return surrogate + (torch.stack(undefined) * step.W.sum((1, 2)))[:, None]


class _Ties(NamedTuple):
    """What ties for ranks k and k+1 in a replicate: T of them."""

    row: Int[Tensor, " T"]
    one: Int[Tensor, " T"]
    other: Int[Tensor, " T"]
    above: Float[Tensor, "T n"]  # 1 for who scores more


class _Pairs:
    """What of W `(n, d)` the P pairs of its rows need."""

    def __init__(self, W: Float[Tensor, "n d"]) -> None:
        self.i, self.j = torch.triu_indices(len(W), len(W), 1, device=W.device)
        gram = W @ W.mT
        self.squared = (W.index_select(0, self.i) - W.index_select(0, self.j)).square().sum(-1)
        self.moves = (gram.index_select(0, self.i) - gram.index_select(0, self.j)) / self.squared[:, None]
        others = self.moves.abs().scatter_(1, self.i[:, None], 0).scatter_(1, self.j[:, None], 0)
        self.reach = others.amax(-1)  # how far any other score moves, over |q_i - q_j|
        self.slope = self.moves.gather(1, self.i[:, None])

    def ties(self, q: Float[Tensor, "B n"], k: int, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row (counted from `first`), i, j, and who scores more, of all that tie."""
        p, b = self._may_tie(q, k).nonzero(as_tuple=True)
        kept = []
        for start in range(0, max(1, len(p)), PIECE // q.shape[-1]):
            s = slice(start, start + PIECE // q.shape[-1])
            pair, row = p[s], b[s]
            i, j = self.i[pair, None], self.j[pair, None]
            scores = q.index_select(0, row)
            far = scores.gather(1, i) - scores.gather(1, j)
            moved = scores.addcmul_(self.moves.index_select(0, pair), far, value=-1)
            # Numbers, not truth values: several times as fast on a CPU, and what the mask will be made of.
            above = torch.gt(moved, moved.gather(1, i), out=torch.empty_like(moved))
            above.scatter_(1, i, 0).scatter_(1, j, 0)
            tie = above.sum(-1) == k - 1
            kept.append((row[tie] + first, i[tie, 0], j[tie, 0], above[tie]))
        row, i, j, above = (torch.cat(each) for each in zip(*kept, strict=True))
        return row, i, j, above

    def _may_tie(self, q: Float[Tensor, "B n"], k: int) -> Bool[Tensor, "P B"]:
        """Which pairs are not ruled out: at most k - 1 others are sure to score more, and that many may."""
        by_score = q.mT.contiguous()
        level = by_score.index_select(0, self.i)
        difference = level - by_score.index_select(0, self.j)
        level.addcmul_(difference, self.slope, value=-1)
        move = difference.abs_().mul_(self.reach[:, None])
        ranked = q.topk(min(k + 2, q.shape[-1]), dim=-1).values.mT
        room = torch.full_like(level, torch.inf)
        if k + 2 <= q.shape[-1]:  # i and j may be among those above
            room = level + move - ranked[k + 1]
        if k >= 2:
            room = torch.minimum(room, move.sub_(level).add_(ranked[k - 2]))
        return room >= 0


def _surrogate(step: Step, found: list[list[_Ties]]) -> Float[Tensor, "R B"]:
    """The sum over the ties of a row of rho * (L_i - L_j) * (w_i - w_j) . x'; only w carries a gradient."""
    assert step.inputs is not None
    replicates, rows, _ = step.scores.shape
    none = step.scores.new_zeros(replicates, rows)
    if not any(len(ties.row) for own in found for ties in own):
        return none

    def side_by_side(name: str) -> Tensor:
        """A replicate's ties below each other, replicates beside each other."""
        columns = [torch.cat([getattr(ties, name) for ties in own]) for own in found]
        return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True)

    row, one, other, above = (side_by_side(name) for name in ("row", "one", "other", "above"))
    counts = torch.tensor([sum(len(ties.row) for ties in own) for own in found], device=row.device)
    real = torch.arange(row.shape[1], device=row.device) < counts[:, None]
    difference = _rows_of(step.W, one) - _rows_of(step.W, other)
    with torch.no_grad():
        length = torch.where(real, difference.norm(dim=-1), 1)
        direction = difference / length.unsqueeze(-1)
        x = _rows_of(step.x, row)
        x = x - direction * (x * direction).sum(-1, keepdim=True)
        loss = step.inputs.elsewhere(row, x)
        with_one, with_other = (above.scatter(-1, each.unsqueeze(-1), 1) for each in (one, other))
        weight = (loss(with_one) - loss(with_other)) * step.inputs.line_density(x, direction) / length
        weight = torch.where(real, weight, 0)
    return none.scatter_add(1, row, weight * (difference * x).sum(-1))


def _rows_of(matrix: Float[Tensor, "R m d"], index: Int[Tensor, "R T"]) -> Float[Tensor, "R T d"]:
    """Rows of a matrix for each replicate."""
    replicates, m, d = matrix.shape
    flat = index + m * torch.arange(replicates, device=index.device)[:, None]
    return matrix.reshape(-1, d).index_select(0, flat.flatten()).reshape(replicates, -1, d)
