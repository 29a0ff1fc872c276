"""Optimal transport to anchors, one row at a time, by explicit plans (scores, anchors)."""

import numpy as np


def plan(costs, masses, temperature, iterations):
    """Sinkhorn by potentials, scores first and anchors last, between masses 1 and `masses`."""
    kernel = -costs / temperature
    f, g = np.zeros((len(costs), 1)), np.zeros((1, costs.shape[1]))
    for _ in range(iterations):
        f = -np.logaddexp.reduce(kernel + g, axis=1, keepdims=True)
        g = np.log(masses) - np.logaddexp.reduce(kernel + f, axis=0, keepdims=True)
    return np.exp(kernel + f + g)


def soft_sorted(scores, k, temperature, iterations=200):
    n = len(scores)
    costs = (scores[:, None] - np.arange(k, -1, -1)) ** 2
    costs = costs / costs.max()
    if k == n:  # no anchor for the rest
        return plan(costs[:, :k], np.ones(k), temperature, iterations).T
    return plan(costs, np.array([1.0] * k + [n - k]), temperature, iterations)[:, :k].T


def squash(scores):
    deviation = scores.std() + 1e-10
    return 1 / (1 + np.exp(-(scores - scores.mean()) / deviation))


def sinkhorn_rank(scores, k, temperature, anchors=None, iterations=200):
    n = len(scores)
    m = n if anchors is None else anchors
    levels = np.linspace(1, 0, m) if m > 1 else np.ones(1)
    costs = (squash(scores)[:, None] - levels) ** 2
    moved = plan(costs, np.full(m, n / m), temperature, iterations)
    # The j-th row: the j-th n-th of the mass of the anchors, of which each has an m-th.
    edges = np.arange(m) / m
    rows = []
    for j in range(k):
        overlap = np.minimum(edges + 1 / m, (j + 1) / n) - np.maximum(edges, j / n)
        rows.append(moved @ (np.maximum(overlap, 0) * m))
    return np.stack(rows)


def cardinality_sinkhorn(scores, k, temperature, iterations=50):
    n = len(scores)
    if k == n:
        return np.ones(n)
    costs = np.abs(scores[:, None] - np.array([scores.max(), scores.min()]))
    return plan(costs, np.array([k, n - k]), temperature, iterations)[:, 0]
