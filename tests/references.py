"""Readable NumPy twins of the operators: one row, float64, values only. Nothing of ours is imported."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit, logsumexp

Array = NDArray[np.float64]


def hard_mask(scores: Array, k: int) -> Array:
    return hard_selection(scores, k).sum(0)


def hard_selection(scores: Array, k: int) -> Array:
    ranked = np.argsort(-scores, kind="stable")
    return np.eye(len(scores))[ranked[:k]]


def hard_values(scores: Array, k: int) -> Array:
    return np.sort(scores)[::-1][:k]


def sparsemax(scores: Array, k: int, temperature: float) -> Array:
    """`clip(u - t, 0, 1)` with sum k: the sum is piecewise linear in t, with kinks at the u and the u - 1."""
    u = (scores - scores.max()) / temperature
    kinks = np.sort(np.concatenate([u, u - 1]))[::-1]
    sums = np.array([np.clip(u - t, 0, 1).sum() for t in kinks])
    t = np.interp(k, sums, kinks)
    return np.clip(u - t, 0, 1)


def entropic(scores: Array, k: int, temperature: float) -> Array:
    """`sigmoid(u - t)` with sum k, by bracketing: at the lower end every entry is at least k / n."""
    u = (scores - scores.max()) / temperature
    n = len(u)
    if k == n:
        return np.ones(n)
    if u.min() == u.max():
        return np.full(n, k / n)
    low, high = u.min() - logit(k / n) - 1, u.max() - logit(k / n) + 1
    t = brentq(lambda t: expit(u - t).sum() - k, low, high, xtol=1e-15, rtol=1e-15, maxiter=1000)
    return expit(u - t)


def softmax(scores: Array, k: int, temperature: float) -> Array:
    """The rows `softmax(v_j)` with `v_{j+1} = v_j + log(1 - softmax(v_j)) / temperature`.

    `1 - softmax(v)_i` is summed over the others, so that no digits are lost where it is nearly 0.
    """
    v = (scores - scores.max()) / temperature
    rows = []
    for j in range(k):
        if j > 0:
            rest = np.array([logsumexp(np.delete(v, i)) for i in range(len(v))])
            v = v + (rest - logsumexp(v)) / temperature
        rows.append(np.exp(v - logsumexp(v)))
    return np.stack(rows)


def identity(scores: Array, k: int, temperature: float) -> Array:
    return np.stack([scores / temperature / k] * k)


def selection(name: str, scores: Array, k: int, temperature: float) -> Array:
    """The rows of the operator of that name; of one that has only masks, differences of nested masks."""
    reference = globals()[name]
    if name in ("softmax", "identity"):
        return reference(scores, k, temperature)
    nested = [np.zeros(len(scores))] + [reference(scores, j, temperature) for j in range(1, k + 1)]
    return np.diff(nested, axis=0)
