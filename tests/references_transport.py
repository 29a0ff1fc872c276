"""Optimal transport one row at a time, by explicit plans."""

import numpy as np


def largest_cost(scores):
    return max((scores**2).max(), ((scores - 1) ** 2).max())


def soft(scores, k, temperature, iterations=200):
    """Sinkhorn on the plan (n, 2), by potentials as everywhere: rows first, columns last."""
    n = len(scores)
    if k == n:
        return np.ones(n)
    kernel = -((scores[:, None] - np.array([0.0, 1.0])) ** 2) / largest_cost(scores) / temperature
    rows, columns = np.log(np.full((n, 1), 1 / n)), np.log([[(n - k) / n, k / n]])
    f, g = np.zeros((n, 1)), np.zeros((1, 2))
    for _ in range(iterations):
        f = rows - np.logaddexp.reduce(kernel + g, axis=1, keepdims=True)
        g = columns - np.logaddexp.reduce(kernel + f, axis=0, keepdims=True)
    return n * np.exp(kernel + f + g)[:, 1]


def sinkhorn(scores, k, temperature, iterations=20):
    n = len(scores)
    x = np.outer((n + 1) / 2 - np.arange(1, n + 1), scores) / temperature
    x = x - np.logaddexp.reduce(x, axis=1, keepdims=True)
    for axis in [0, 1] * iterations:
        x = x - np.logaddexp.reduce(x, axis=axis, keepdims=True)
    return np.exp(x)[:k]
