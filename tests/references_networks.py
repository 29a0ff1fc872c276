"""Sorting networks one row at a time, by the explicit product of their layer matrices."""

import numpy as np
from scipy.special import expit, ndtr


def exchange(difference, temperature, step="logistic", art=0.25):
    """F of a difference of scores; symmetric about 0."""
    v = difference / temperature
    if step == "logistic_phi":
        return expit(v / abs(difference) ** art) if difference else 0.5
    if step == "optimal":
        return v + 0.5 if abs(v) < 0.25 else (1 - 1 / (16 * v) if v > 0 else -1 / (16 * v))
    return {
        "logistic": expit(v),
        "gaussian": ndtr(v),
        "reciprocal": 0.5 * v / (2 + abs(v)) + 0.5,
        "cauchy": np.arctan(v) / np.pi + 0.5,
    }[step]


def through(scores, k, layers, temperature, **options):
    """The last k rows of the product of the layer matrices; each (a, b) brings the smaller value to a."""
    n = len(scores)
    permutation = np.eye(n)
    for pairs in layers:
        matrix, x = np.eye(n), permutation @ scores
        for a, b in pairs:
            c = exchange(x[a] - x[b], temperature, **options)
            matrix[[a, b]] = 0
            matrix[a, a] = matrix[b, b] = 1 - c
            matrix[a, b] = matrix[b, a] = c
        permutation = matrix @ permutation
    return permutation[::-1][:k]


def odd_even_pairs(n):
    return [[(a, a + 1) for a in range(layer % 2, n - 1, 2)] for layer in range(n)]


def bitonic_pairs(n):
    """Wires in front are padding: comparators that have one are left out, and their numbers with them."""
    blocks = int(np.ceil(np.log2(n)))
    padding, layers = 2**blocks - n, []
    for block in range(blocks):
        for half in (2**j for j in range(block, -1, -1)):
            pairs = [(a, a + half) for a in range(2**blocks) if a // half % 2 == 0]
            down = [a // 2 ** (block + 1) % 2 == 1 for a, _ in pairs]
            directed = [(b, a) if flip else (a, b) for (a, b), flip in zip(pairs, down, strict=True)]
            layers.append([(a - padding, b - padding) for a, b in directed if min(a, b) >= padding])
    return layers


def odd_even(scores, k, temperature, **options):
    return through(scores, k, odd_even_pairs(len(scores)), temperature, **options)


def bitonic(scores, k, temperature, **options):
    return through(scores, k, bitonic_pairs(len(scores)), temperature, **options)
