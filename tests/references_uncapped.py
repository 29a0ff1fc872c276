"""One row at a time: entmax by sorting, the dynamic program cell by cell, magnitudes by pooling."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

Array = NDArray[np.float64]
Maximum = Callable[[float, float], float]


def scaled_entmax(scores: Array, k: int, temperature: float, alpha: float = 1.5) -> Array:
    """k times alpha-entmax by its support: the first r sorted scores, for the only r that fits."""
    z = (alpha - 1) * (scores - scores.max()) / temperature
    ranked = np.sort(z)[::-1]
    # A score is in the support if what is left where it is just 0 sums to less than 1.
    sums = [(np.maximum(ranked - t, 0) ** (1 / (alpha - 1))).sum() for t in ranked]
    support = ranked[: np.sum(np.array(sums) < 1)]
    return k * np.maximum(z - _level(support, alpha), 0) ** (1 / (alpha - 1))


def _level(support: Array, alpha: float) -> float:
    """The t with `sum (support - t)^(1 / (alpha - 1)) = 1`."""
    r = len(support)
    mean = support.mean()
    if alpha == 2:
        return mean - 1 / r
    if alpha == 1.5:
        return mean - np.sqrt(max(1 / r - support.var(), 0))

    def excess(t: float) -> float:
        return (np.maximum(support - t, 0) ** (1 / (alpha - 1))).sum() - 1

    return brentq(excess, support.max() - 1, support.max(), xtol=1e-15, rtol=1e-15)


def maximum_gini(a: float, b: float) -> float:
    """`max_q (1 - q) a + q b + q (1 - q)`, q in [0, 1]."""
    if np.isneginf(a) or np.isneginf(b):
        return max(a, b)
    q = np.clip((1 + b - a) / 2, 0, 1)
    return (1 - q) * a + q * b + q * (1 - q)


def table(u: Array, k: int, maximum: Maximum) -> Array:
    """V[i][j], the smooth value of the best j of the first i scores; -inf where i < j."""
    V = np.full((len(u) + 1, k + 1), -np.inf)
    V[:, 0] = 0
    for i, s in enumerate(u, start=1):
        for j in range(1, k + 1):
            V[i, j] = maximum(V[i - 1, j], V[i - 1, j - 1] + s)
    return V


def dp_gini(scores: Array, k: int, temperature: float) -> Array:
    """Back from (n, k): what reaches a cell is split between taking the score and leaving it."""
    u = (scores - scores.max()) / temperature
    V = table(u, k, maximum_gini)
    reached = np.zeros_like(V)
    reached[-1, k] = 1
    mask = np.zeros(len(u))
    for i in range(len(u), 0, -1):
        for j in range(k + 1):
            take = _share(V[i - 1, j - 1] + u[i - 1] - V[i - 1, j]) if 0 < j < i else float(j > 0)
            mask[i - 1] += take * reached[i, j]
            reached[i - 1, j] += (1 - take) * reached[i, j]
            reached[i - 1, max(j - 1, 0)] += take * reached[i, j]
    return mask


def _share(difference: float) -> float:
    return np.clip((1 + difference) / 2, 0, 1)


def magnitude(scores: Array, k: int, temperature: float, p: float = 2.0) -> Array:
    """By pooling adjacent violators, each block with its level by bracketing."""
    power = 1 / (p - 1)
    order = np.argsort(-abs(scores), kind="stable")
    ranked = abs(scores)[order]
    blocks: list[tuple[list[int], float]] = []
    for i in range(len(ranked)):
        blocks.append(_pooled(ranked, [i], k, temperature, power))
        while len(blocks) > 1 and blocks[-2][1] <= blocks[-1][1]:
            (last, _), (before, _) = blocks.pop(), blocks.pop()
            blocks.append(_pooled(ranked, before + last, k, temperature, power))
    v = np.concatenate([[level] * len(block) for block, level in blocks])
    m = (np.maximum(ranked - v, 0) / temperature) ** power
    values = np.empty(len(scores))
    values[order] = m + temperature * m ** (p - 1)
    return np.sign(scores) * values


def _pooled(
    ranked: Array, block: list[int], k: int, temperature: float, power: float
) -> tuple[list[int], float]:
    """Where the derivative of the block's part of the objective is 0."""
    a, taken = ranked[block], sum(i < k for i in block)

    def slope(v: float) -> float:
        return taken * v - (np.sign(a - v) * (abs(a - v) / temperature) ** power).sum()

    if slope(0) == 0:
        return block, 0.0
    return block, brentq(slope, 0, a.max(), xtol=1e-300, rtol=1e-15, maxiter=1000)
