"""Which pairs of scores tie for ranks k and k+1, row by row, compiled by Numba: what `_flux` does in passes.

A row has few pairs to look at, and which they are differs from row to row; a pass over tensors looks at what
any of them needs, and writes down what it finds each time. Row by row it takes a third to
a fifth of the time, on a CPU.
"""

import math
from typing import Any, no_type_check

import numpy as np
from numba import njit

_compiled = njit(nogil=True, cache=True, error_model="numpy")  # 0 / 0 is NaN, as everywhere else


@_compiled
@no_type_check  # the tests' checks of signatures do not compile
def search(
    scores: Any,
    gram: Any,
    squared: Any,
    slope: Any,
    limit: Any,
    most: Any,
    W: Any,
    x: Any,
    k: int,
) -> Any:
    """All ties: replicate, row, i and j `(4, T)`, and the other parts of `_ties.Ties`.

    Args: as `_ties.Pairs` has them.
    """
    replicates, rows, n = scores.shape
    count = 0
    found, by = np.empty((4, rows), np.int64), np.empty(rows, scores.dtype)
    moved, level, who = np.empty(n, scores.dtype), np.empty(n, scores.dtype), np.empty(n, np.int64)
    for r in range(replicates):
        reach = _reach(gram[r], squared[r])
        for row in range(rows):
            first, end = _rank(scores[r, row], k, 2 * most[r], level, who)
            for a in range(first, end - 1):
                i = who[a]
                for b in range(a + 1, end):
                    j, far = who[b], level[a] - level[b]
                    if not far < limit[r, i, j]:
                        continue
                    tie = level[a] - far * slope[r, i, j]
                    move = far * reach[i, j]
                    # The k-th of the others must be able to come below, and the one before to be above.
                    if k <= n - 2 and level[_without(a, b, k - 1)] > tie + move:
                        continue
                    if k >= 2 and level[_without(a, b, k - 2)] < tie - move:
                        continue
                    part = far / squared[r, i, j]
                    _move(scores[r, row], gram[r, i], gram[r, j], part, moved)
                    if _count(moved, i, j) != k - 1:
                        continue
                    if count == len(by):
                        found = np.concatenate((found, np.empty_like(found)), 1)
                        by = np.concatenate((by, np.empty_like(by)), 0)
                    found[0, count], found[1, count], found[2, count], found[3, count] = r, row, i, j
                    by[count] = part
                    count += 1
    # Once more for those that tie: several times as fast as room for large arrays that grows.
    with_i, with_j = np.empty((count, n), scores.dtype), np.empty((count, n), scores.dtype)
    there, direction = np.empty((count, x.shape[2]), x.dtype), np.empty((count, x.shape[2]), x.dtype)
    length = np.empty(count, x.dtype)
    for tie in range(count):
        r, row, i, j = found[0, tie], found[1, tie], found[2, tie], found[3, tie]
        _move(scores[r, row], gram[r, i], gram[r, j], by[tie], moved)
        _count(moved, i, j)
        with_i[tie], with_j[tie] = moved, moved
        with_i[tie, i], with_j[tie, j] = 1, 1
        _move(x[r, row], W[r, i], W[r, j], by[tie], there[tie])
        length[tie] = math.sqrt(squared[r, i, j])
        for each in range(x.shape[2]):
            direction[tie, each] = (W[r, i, each] - W[r, j, each]) / length[tie]
    return found[:, :count], with_i, with_j, there, direction, length


@_compiled
@no_type_check
def _reach(gram: Any, squared: Any) -> Any:
    """How far any other score moves, over |q_i - q_j|."""
    n = len(gram)
    reach = np.zeros((n, n), gram.dtype)
    apart = np.empty(n, gram.dtype)
    for i in range(n):
        for j in range(i):
            for each in range(n):
                apart[each] = abs(gram[i, each] - gram[j, each])
            apart[i] = apart[j] = 0
            most = apart[0]
            for each in range(n):
                most = max(most, apart[each])
            reach[i, j] = reach[j, i] = most / squared[i, j]
    return reach


@_compiled
@no_type_check
def _rank(scores: Any, k: int, most: Any, level: Any, who: Any) -> Any:
    """Sort those near enough to the k-th and the next to tie there: their first rank and their last + 1."""
    n = len(scores)
    level[: k + 1] = -np.inf
    for each in range(n):
        if scores[each] > level[k]:
            place = k
            while place > 0 and level[place - 1] < scores[each]:
                level[place] = level[place - 1]
                place -= 1
            level[place] = scores[each]
    high, low = level[k] + most, level[k - 1] - most
    first = 0
    for each in range(n):
        first += scores[each] > high
    end = first
    for each in range(n):
        if low <= scores[each] <= high:
            place = end
            while place > first and level[place - 1] < scores[each]:
                level[place], who[place] = level[place - 1], who[place - 1]
                place -= 1
            level[place], who[place] = scores[each], each
            end += 1
    level[:first] = np.inf
    level[end:] = -np.inf
    return first, end


@_compiled
@no_type_check
def _move(q: Any, of_i: Any, of_j: Any, by: Any, moved: Any) -> None:
    """What is where i and j tie, of scores or of x: `q - by (of_i - of_j)`."""
    for each in range(len(q)):
        moved[each] = q[each] - (of_i[each] - of_j[each]) * by


@_compiled
@no_type_check
def _count(moved: Any, i: int, j: int) -> int:
    """How many others score more than i and j; leaves 1 for them, and 0 for all else."""
    tie = moved[i]
    moved[i] = moved[j] = -np.inf
    more = np.int32(0)
    for each in range(len(moved)):
        more += np.int32(moved[each] > tie)
    for each in range(len(moved)):
        moved[each] = moved[each] > tie
    return more


@_compiled
@no_type_check
def _without(a: int, b: int, place: int) -> int:
    """The rank, counted from 0, of who is at this place among all but the ranks a < b."""
    return place + (a <= place) + (b <= place + 1)
