"""Soft ranks one row at a time, by pooling adjacent violators and by counting."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.special import expit

Array = NDArray[np.float64]


def soft_rank(scores: Array, k: int, temperature: float) -> Array:
    """Ranks by pooling adjacent violators."""
    order = np.argsort(-scores)
    u = scores[order] / temperature
    ranks = np.empty(len(u))
    ranks[order] = isotonic_regression(u + np.arange(1, len(u) + 1), increasing=False).x - u
    return np.clip(k + 1 - ranks, 0, 1)


def soft_rank_kl(scores: Array, k: int, temperature: float) -> Array:
    """The same, where a block has the ratio of the sums of e^-u and of ranks for its level."""
    order = np.argsort(-scores)
    u = (scores[order] - scores.max()) / temperature
    blocks: list[tuple[float, float, int]] = []  # log of the sum of e^-u, sum of ranks, length
    for rank, log_power in enumerate(-u, start=1):
        blocks.append((log_power, float(rank), 1))
        while len(blocks) > 1 and blocks[-2][0] - np.log(blocks[-2][1]) >= blocks[-1][0] - np.log(
            blocks[-1][1]
        ):
            last, before = blocks.pop(), blocks.pop()
            blocks.append((np.logaddexp(before[0], last[0]), before[1] + last[1], before[2] + last[2]))
    levels = np.concatenate([np.full(length, total - np.log(ranks)) for total, ranks, length in blocks])
    ranks = np.empty(len(u))
    ranks[order] = np.exp(-u - levels)
    return np.clip(k + 1 - ranks, 0, 1)


def smooth_rank(scores: Array, k: int, temperature: float, margin: float = 1.0) -> Array:
    apart = (scores - scores[:, None]) / temperature
    return expit((k + 0.5 - (0.5 + expit(apart).sum(1))) / margin)
