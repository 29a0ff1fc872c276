"""Which k scores are the largest: `torch.topk`, faster on long rows."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

LONG = 4096  # shorter rows are not worth the detour, nor are rows of which many are taken
RARE = 16


def top_indices(scores: Float[Tensor, "*rows n"], k: int, *, ranked: bool = False) -> Int[Tensor, "*rows k"]:
    """The places of the k largest scores, as `torch.topk` gives them; at ties any choice.

    A long row is cut into blocks. The k blocks with the largest maxima hold k numbers none of which is
    smaller than anything in the other blocks, so only they, and what is left over at the end, are searched.

    Args:
        scores: `(..., n)`.
        k: How many, in [1, n].
        ranked: Whether the largest comes first; else in no order.

    Cost: on the CPU one pass for the maxima and two `torch.topk` of about sqrt(n k) numbers.
    """
    n = scores.shape[-1]
    # An accelerator's topk is another algorithm, with no queue of n pairs to fill.
    if scores.device.type != "cpu" or n < LONG or n < RARE * k:
        return scores.topk(k, dim=-1, sorted=ranked).indices
    size = math.isqrt(n // k)
    blocks = n // size
    # Block i holds i, i + blocks, i + 2 blocks, ...: maxima over an outer axis use vector instructions.
    maxima = scores[..., : size * blocks].unflatten(-1, (size, blocks)).amax(-2)
    best = maxima.topk(k, dim=-1, sorted=False).indices
    offsets = torch.arange(0, size * blocks, blocks)
    places = (best.unsqueeze(-2) + offsets.unsqueeze(-1)).flatten(-2)
    rest = torch.arange(size * blocks, n).expand(*places.shape[:-1], n - size * blocks)
    places = torch.cat([places, rest], -1)
    found = scores.gather(-1, places).topk(k, dim=-1, sorted=ranked).indices
    return places.gather(-1, found)
