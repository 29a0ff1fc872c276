"""The one segment of an isotonic regression that top-k looks at, found without the others.

The non-increasing regression of a row is the slope of the least concave majorant of the points (x_j, y_j),
y a running sum and x the running weight, j = 0..n. Its value at place k is the slope of the segment that
spans k-1 and k, by the min-max formula

    slope_k = min_{l < k} max_{r >= k} (y_r - y_l) / (x_r - x_l).

With l given the maximum is one pass; the best l at that slope is the one that maximises y_l - slope x_l.
Repeating the two is Newton's method for the minimum over l: the slopes fall, and it ends at the segment,
after 2 or 3 rounds for most rows. No pooling goes from block to block.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import readable

ROUNDS = 16  # on an accelerator, where nobody asks whether it is done, all of them


class Segment(NamedTuple):
    """Points `left` and `right` of the majorant and its slope between them, each (..., 1)."""

    left: Tensor
    right: Tensor
    slope: Tensor


def descending(scores: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """The sorted scores, NaN first."""
    if readable(scores) and scores.dtype in (torch.float32, torch.float64):
        # Only the values are wanted, and NumPy sorts those with vector instructions, some 20 times as fast.
        return torch.from_numpy(np.sort(scores.detach().numpy(), -1)).flip(-1)
    return scores.sort(-1, descending=True).values


def segment(x: Float[Tensor, " points"], y: Float[Tensor, "*rows points"], k: int | Tensor) -> Segment:
    """The segment of the least concave majorant of (x_j, y_j) that spans k-1 and k.

    Args:
        x: Increasing, n + 1 of them.
        y: The points above x, for each row.
        k: In [1, n]; a tensor gives each row its own.

    Returns:
        The segment, with left < k <= right.

    Cost: a pass over y for each round.
    """
    (x_left, y_left), (x_right, y_right), left = _sides(x, y, k)
    look = readable(y)
    slopes, slope = torch.empty_like(y_right), torch.empty_like(y[..., :1])
    for _ in range(ROUNDS):
        torch.sub(y_right, y.gather(-1, left), out=slopes)
        slope = slopes.div_(x_right - x.take(left)).amax(-1, keepdim=True)
        better = torch.addcmul(y_left, slope, x_left, value=-1).argmax(-1, keepdim=True)
        if look and torch.equal(better, left):
            break
        left = better
    right = slopes.argmax(-1, keepdim=True) + (k if isinstance(k, int) else 0)
    return Segment(left, right, slope)


def _sides(
    x: Tensor, y: Tensor, k: int | Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """The points before k, those from k on, and the point k-1 to start from."""
    if isinstance(k, int):
        left = torch.full_like(y[..., :1], k - 1, dtype=torch.int64)
        return (x[:k], y[..., :k]), (x[k:], y[..., k:]), left
    count = k.unsqueeze(-1).expand(*y.shape[:-1], 1)
    is_left = torch.arange(len(x), device=y.device) < count
    # A point that is out of play lies infinitely low, where the other side's points are not.
    low = y.new_full((), -torch.inf)
    before = (torch.where(is_left, x, x[0] - 1), torch.where(is_left, y, low))
    after = (torch.where(is_left, x[-1] + 1, x), torch.where(is_left, low, y))
    return before, after, count - 1
