"""Readable NumPy twins of the operators: one row, float64, values only. Nothing of ours is imported."""

from collections.abc import Callable
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from references_anchors import cardinality_sinkhorn, sinkhorn_rank, soft_sorted  # noqa: F401
from references_networks import bitonic, odd_even  # noqa: F401
from references_permutation import neuralsort, softsort  # noqa: F401
from references_ranks import smooth_rank, soft_rank  # noqa: F401
from references_splitter import splitter  # noqa: F401
from references_transport import sinkhorn, soft  # noqa: F401
from references_uncapped import dp_gini, scaled_entmax  # noqa: F401
from scipy.optimize import brentq
from scipy.special import expit, logit, logsumexp
from scipy.stats import norm

Array = NDArray[np.float64]
Reference = Callable[[Array, int, float], Array]


def hard_mask(scores: Array, k: int) -> Array:
    return hard_selection(scores, k).sum(0)


def hard_selection(scores: Array, k: int) -> Array:
    ranked = np.argsort(-scores, kind="stable")
    return np.eye(len(scores))[ranked[:k]]


def hard_values(scores: Array, k: int) -> Array:
    return np.sort(scores)[::-1][:k]


def _threshold(cdf: Callable[[Array], Array], u: Array, k: int, low: float, high: float) -> Array:
    """`cdf(u - t)` with sum k, for a root between `low` and `high`; all ones where k = n."""
    if k == len(u):
        return np.ones(len(u))
    t = brentq(lambda t: cdf(u - t).sum() - k, low, high, xtol=1e-15, rtol=1e-15, maxiter=1000)
    return cdf(u - t)


def _wide(cdf: Callable[[Array], Array], quantile: Callable[[float], float]) -> Reference:
    """A threshold operator by bracketing: at the lower end every entry is at least k / n."""

    def reference(scores: Array, k: int, temperature: float) -> Array:
        # Centred between ranks k and k + 1: where the mask is nearly hard, the root is in between.
        ranked = np.sort(scores)[::-1]
        u = (scores - (ranked[k - 1] + ranked[min(k, len(scores) - 1)]) / 2) / temperature
        if u.min() == u.max():
            return np.full(len(u), k / len(u))
        centre = quantile(k / len(u)) if k < len(u) else 0.0
        return _threshold(cdf, u, k, u.min() - centre - 1, u.max() - centre + 1)

    return reference


def _laplace(u: Array) -> Array:
    return np.where(u < 0, np.exp(-abs(u)) / 2, 1 - np.exp(-abs(u)) / 2)


entropic = _wide(expit, logit)
lapsum = _wide(_laplace, lambda p: np.sign(p - 0.5) * -np.log(2 * min(p, 1 - p)))
gaussian = _wide(norm.cdf, norm.ppf)
cauchy = _wide(lambda u: np.arctan2(1, -u) / np.pi, lambda p: np.tan(np.pi * (p - 0.5)))


def _clipped(scores: Array, k: int, temperature: float, power: float) -> Array:
    """`clip(u - t, 0, 1) ** power` with sum k; t is among the kinks u and u - 1, or between two of them."""
    u = (scores - scores.max()) / temperature
    kinks = np.sort(np.concatenate([u, u - 1]))[::-1]
    sums = np.array([(np.clip(u - t, 0, 1) ** power).sum() for t in kinks])
    at = np.searchsorted(sums, k)
    low, high = kinks[min(at, len(kinks) - 1)], kinks[max(at - 1, 0)]
    if low == high:
        return np.clip(u - low, 0, 1) ** power
    return _threshold(lambda v: np.clip(v, 0, 1) ** power, u, k, low, high)


def sparsemax(scores: Array, k: int, temperature: float) -> Array:
    return _clipped(scores, k, temperature, 1)


def entmax(scores: Array, k: int, temperature: float, alpha: float = 1.5) -> Array:
    return _clipped(scores, k, temperature / (alpha - 1), 1 / (alpha - 1))


def pnorm(scores: Array, k: int, temperature: float, p: float = 4 / 3) -> Array:
    return _clipped(scores, k, temperature, 1 / (p - 1))


def csoftmax(scores: Array, k: int, temperature: float) -> Array:
    """What would exceed 1 is set to 1, and the rest of k shared out again, until nothing does."""
    u = (scores - scores.max()) / temperature
    ones = np.zeros(len(u), dtype=bool)
    while ones.sum() < k:
        rest = np.where(ones, -np.inf, u)
        mask = np.exp(rest - logsumexp(rest)) * (k - ones.sum())
        if mask.max() <= 1:
            return np.where(ones, 1, mask)
        ones |= mask > 1
    return ones.astype(float)


def dftopk(scores: Array, k: int, temperature: float) -> Array:
    if k == len(scores):
        return np.ones(len(scores))
    ranked = np.sort(scores)[::-1]
    return expit((scores - ranked[k - 1]) / temperature + (ranked[k - 1] - ranked[k]) / 2 / temperature)


sigmoid = dftopk  # the values are the same, the gradients are not


def scaled_softmax(scores: Array, k: int, temperature: float) -> Array:
    return k * np.exp(scores / temperature - logsumexp(scores / temperature))


def kept_softmax(scores: Array, k: int, temperature: float) -> Array:
    kept = np.where(hard_mask(scores, k) > 0, scores / temperature, -np.inf)
    return np.exp(kept - logsumexp(kept))


def switch(scores: Array, k: int, temperature: float) -> Array:
    return hard_mask(scores, k) * np.exp(scores / temperature - logsumexp(scores / temperature))


def marginals(scores: Array, k: int, temperature: float) -> Array:
    """By enumeration of all k-subsets, each with a probability proportional to exp(sum of its scores)."""
    subsets = list(combinations(range(len(scores)), k))
    masks = np.array([[i in subset for i in range(len(scores))] for subset in subsets], dtype=float)
    energy = masks @ ((scores - scores.max()) / temperature)
    return np.exp(energy - logsumexp(energy)) @ masks


def n3(scores: Array, k: int, temperature: float) -> Array:
    """As `softmax`, but what is taken is pushed down by `log(1 - a)` and not by that over the temperature."""
    return _successive((scores - scores.max()) / temperature, k, 1.0)


def softmax(scores: Array, k: int, temperature: float) -> Array:
    """The rows `softmax(v_j)` with `v_{j+1} = v_j + log(1 - softmax(v_j)) / temperature`.

    `1 - softmax(v)_i` is summed over the others, so that no digits are lost where it is nearly 0.
    """
    return _successive((scores - scores.max()) / temperature, k, temperature)


def _successive(v: Array, k: int, step: float) -> Array:
    rows = []
    for j in range(k):
        if j > 0:
            rest = np.array([logsumexp(np.delete(v, i)) for i in range(len(v))])
            v = v + (rest - logsumexp(v)) / step
        rows.append(np.exp(v - logsumexp(v)))
    return np.stack(rows)


def identity(scores: Array, k: int, temperature: float) -> Array:
    return np.stack([scores / temperature / k] * k)


def projected_identity(scores: Array, k: int, temperature: float) -> Array:
    centred = scores - scores.mean()
    return np.stack([centred / max(np.linalg.norm(centred), 1e-300) / temperature / k] * k)


ROWS = ("softmax", "n3", "identity", "projected_identity", "bitonic", "odd_even")
ROWS += ("sinkhorn", "neuralsort", "softsort")
ROWS += ("soft_sorted", "sinkhorn_rank", "splitter")


def selection(name: str, scores: Array, k: int, temperature: float) -> Array:
    """The rows of the operator of that name; of one that has only masks, differences of nested masks."""
    reference = globals()[name]
    if name in ROWS:
        return reference(scores, k, temperature)
    nested = [np.zeros(len(scores))] + [reference(scores, j, temperature) for j in range(1, k + 1)]
    return np.diff(nested, axis=0)
