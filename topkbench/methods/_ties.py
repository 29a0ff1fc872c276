"""Which pairs of scores tie for ranks k and k+1 near a row of x: see `_flux`, which sums over them.

Two routes to the same ties. In passes over tensors, all pairs of ranks that any row of a block needs. Or row
by row, by `_search`, which Numba compiles: on a CPU, where it is installed.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PIECE = 1 << 18  # numbers in the largest tensor of a pass over pairs: they stay in the cache
MASKS = 1 << 20  # in the masks of a block of ties
EACH = 32  # ties of a row, about; fewer where only near ones count

Where = tuple[slice, slice]  # some replicates, and some of their rows


class Ties(NamedTuple):
    """What ties for ranks k and k+1, T of them, in the order of their replicates."""

    replicate: Int[Tensor, " T"]
    row: Int[Tensor, " T"]
    i: Int[Tensor, " T"]
    j: Int[Tensor, " T"]
    with_i: Float[Tensor, "T n"]  # the mask of who scores more, and i
    with_j: Float[Tensor, "T n"]
    x: Float[Tensor, "T d"]  # where they tie
    direction: Float[Tensor, "T d"]  # from j to i in W, of length 1
    length: Float[Tensor, " T"]  # |w_i - w_j|


class _Block(NamedTuple):
    """Some rows of some replicates."""

    replicate: int  # the first of them
    row: int
    scores: Float[Tensor, "R B n"]
    ranked: Float[Tensor, "R B n"]  # largest first
    order: Int[Tensor, "R B n"]  # whose these are
    window: Bool[Tensor, "R B n"]  # which ranks can tie


class Pairs:
    """What of W `(R, n, d)` its pairs of rows need: tables `(R, n, n)`."""

    def __init__(self, W: Float[Tensor, "R n d"], near: float) -> None:
        W = W - W.mean(1, keepdim=True)  # only differences of rows matter; a common part costs digits
        self.W, self.near, self.gram = W, near, W @ W.mT
        self.squared = torch.cdist(W, W, compute_mode="donot_use_mm_for_euclid_dist").square()
        apart = self.squared + torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
        self.undefined = torch.where(apart.amin((1, 2)) > 0, 0.0, torch.nan)
        self.slope = (self.gram.diagonal(dim1=1, dim2=2)[:, :, None] - self.gram) / apart
        self.limit = near * self.squared.sqrt()
        # No score moves further than this, be it of the pair or not.
        self.most = near * W.norm(dim=-1).amax(-1)[:, None, None]

    @functools.cached_property
    def reach(self) -> Float[Tensor, "R n n"]:
        """How far any other score moves, over |q_i - q_j|."""
        return _reach(self.gram) / self.squared

    def search(self, x: Float[Tensor, "R B d"], k: int) -> tuple[list[Where], Callable[[Where], Ties]]:
        """Blocks of rows, and what finds all that tie in one of them; it may do so in several threads."""
        scores = x @ self.W.mT
        compiled = _compiled() if x.device.type == "cpu" else None
        return self._in_passes(x, scores, k) if compiled is None else self._by_row(compiled, x, scores, k)

    def _by_row(
        self, compiled: Callable[..., Any], x: Float[Tensor, "R B d"], scores: Float[Tensor, "R B n"], k: int
    ) -> tuple[list[Where], Callable[[Where], Ties]]:
        tables = (self.gram, self.squared, self.slope, self.limit, self.most.flatten(), self.W)

        def find(where: Where) -> Ties:
            some, part = where
            block = (scores[where], *(table[some] for table in tables), x[where])
            found, *numbers = compiled(*(each.contiguous().numpy() for each in block), k)
            replicate, row, i, j = torch.from_numpy(found)
            return Ties(replicate + some.start, row + part.start, i, j, *map(torch.from_numpy, numbers))

        ties = EACH * math.erf(self.near / math.sqrt(2))
        return _blocks(scores, int(MASKS / max(1, ties * scores.shape[-1]))), find

    def _in_passes(
        self, x: Float[Tensor, "R B d"], scores: Float[Tensor, "R B n"], k: int
    ) -> tuple[list[Where], Callable[[Where], Ties]]:
        ranked, order = scores.sort(-1, descending=True)
        window = self._window(ranked, k)
        # Rows in the order of how many ranks are in it, so that few pairs do for a block of them.
        alike = (window * torch.arange(scores.shape[-1], device=scores.device)).amax(-1).argsort(-1)
        parts = [each.take_along_dim(alike.unsqueeze(-1), 1) for each in (scores, ranked, order, window)]

        def find(where: Where) -> Ties:
            some, part = where
            replicate, row, i, j, above = self._of(
                _Block(some.start, part.start, *(p[where] for p in parts)), k
            )
            row = alike[replicate, row]
            difference = _rows_of(self.W, replicate, i) - _rows_of(self.W, replicate, j)
            length = difference.norm(dim=-1)
            direction, here = difference / length[:, None], _rows_of(x, replicate, row)
            there = here - direction * (here * direction).sum(-1, keepdim=True)
            with_i, with_j = (above.scatter(1, each[:, None], 1) for each in (i, j))
            return Ties(replicate, row, i, j, with_i, with_j, there, direction, length)

        return _blocks(scores, PIECE // max(1, _ranks(window).shape[1])), find

    def _window(self, ranked: Float[Tensor, "R B n"], k: int) -> Bool[Tensor, "R B n"]:
        """Which ranks are near enough to the k-th and the next to tie there."""
        may = ranked <= ranked[..., k, None] + 2 * self.most
        return may.logical_and_(ranked >= ranked[..., k - 1, None] - 2 * self.most)

    def _of(self, block: _Block, k: int) -> list[Tensor]:
        """The first four of `Ties`, and the mask of who scores more than i and j."""
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
        ties = [torch.cat(each) for each in zip(*kept, strict=True)]
        if len(self.W) == 1:
            return ties
        order = ties[0].argsort(stable=True)
        return [each.index_select(0, order) for each in ties]

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


@functools.cache
def _compiled() -> Callable[..., Any] | None:
    """The search row by row, where there is Numba."""
    if importlib.util.find_spec("numba") is None:
        return None
    from topkbench.methods._search import search

    return search


def _blocks(scores: Float[Tensor, "R B n"], at_once: int) -> list[Where]:
    """So many rows at a time: of several replicates, or some of one."""
    replicates, rows, _ = scores.shape
    together, of_one = max(1, at_once // rows), max(1, min(rows, at_once))
    some = [slice(first, min(first + together, replicates)) for first in range(0, replicates, together)]
    return [(each, slice(low, min(low + of_one, rows))) for each in some for low in range(0, rows, of_one)]


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


def _rows_of(
    matrix: Float[Tensor, "R m d"], replicate: Int[Tensor, " T"], row: Int[Tensor, " T"]
) -> Float[Tensor, "T d"]:
    """A row of a replicate's matrix each."""
    return matrix.flatten(0, 1).index_select(0, replicate * matrix.shape[1] + row)
