"""NeuralSort and SoftSort one row at a time."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax_of(logits: Array) -> Array:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def neuralsort(scores: Array, k: int, temperature: float) -> Array:
    n = len(scores)
    distances = np.abs(scores[:, None] - scores).sum(1)
    return np.stack(
        [softmax_of(((n + 1 - 2 * j) * scores - distances) / temperature) for j in range(1, k + 1)]
    )


def softsort(scores: Array, k: int, temperature: float, power: int = 1) -> Array:
    ranked = np.sort(scores)[::-1]
    return np.stack([softmax_of(-(np.abs(ranked[j] - scores) ** power) / temperature) for j in range(k)])
