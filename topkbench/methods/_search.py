"""Which pairs of scores tie for ranks k and k+1, row by row, compiled by Numba: what `_flux` does in passes.

A row has few pairs to look at, and which they are differs from row to row; a pass over tensors looks at what
any of them needs, and writes down what it finds each time. Row by row it takes a tenth of the time, on a CPU.
"""

from typing import Any, no_type_check

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
@no_type_check  # the tests' checks of signatures do not compile
def search(
    scores: Any,
    gram: Any,
    squared: Any,
    slope: Any,
    reach: Any,
    limit: Any,
    most: Any,
    k: int,
) -> Any:
    """Replicate, row, i and j of each tie, `(4, T)`, and who scores more than the two, 1 or 0: `(T, n)`.

    Args: as `_flux` has them: scores `(R, B, n)`, tables `(R, n, n)`, most `(R,)`.
    """
    replicates, rows, n = scores.shape
    count = 0
    found = np.empty((4, rows), np.int64)
    above = np.empty((rows, n), scores.dtype)
    moved, level, who = np.empty(n, scores.dtype), np.empty(n, scores.dtype), np.empty(n, np.int64)
    for r in range(replicates):
        for row in range(rows):
            q = scores[r, row]
            first, end = _rank(q, k, 2 * most[r], level, who)
            for a in range(first, end - 1):
                i = who[a]
                for b in range(a + 1, end):
                    j, far = who[b], level[a] - level[b]
                    if not far < limit[r, i, j]:
                        continue
                    tie = level[a] - far * slope[r, i, j]
                    move = far * reach[r, i, j]
                    # The k-th of the others must be able to come below, and the one before to be above.
                    if k <= n - 2 and level[_without(a, b, k - 1)] > tie + move:
                        continue
                    if k >= 2 and level[_without(a, b, k - 2)] < tie - move:
                        continue
                    _move(q, gram[r, i], gram[r, j], far / squared[r, i, j], moved)
                    tie = moved[i]
                    moved[i] = moved[j] = -np.inf
                    if _count(moved, tie) != k - 1:
                        continue
                    if count == len(above):
                        found = np.concatenate((found, np.empty_like(found)), 1)
                        above = np.concatenate((above, np.empty_like(above)), 0)
                    found[0, count], found[1, count], found[2, count], found[3, count] = r, row, i, j
                    for each in range(n):
                        above[count, each] = moved[each] > tie
                    count += 1
    return found[:, :count], above[:count]


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
@no_type_check
def _move(q: Any, of_i: Any, of_j: Any, by: Any, moved: Any) -> None:
    """The scores where i and j tie."""
    for each in range(len(q)):
        moved[each] = q[each] - (of_i[each] - of_j[each]) * by


@njit(nogil=True, cache=True)
@no_type_check
def _count(moved: Any, tie: Any) -> int:
    """How many score more."""
    more = np.int32(0)
    for each in range(len(moved)):
        more += np.int32(moved[each] > tie)
    return more


@njit(nogil=True, cache=True)
@no_type_check
def _without(a: int, b: int, place: int) -> int:
    """The rank, counted from 0, of who is at this place among all but the ranks a < b."""
    return place + (a <= place) + (b <= place + 1)
