"""Which k scores are the largest: `torch.topk`, faster on long rows."""

import math

import torch
from jaxtyping import Float, Int, Shaped
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
    if not _is_long(scores, k):
        return scores.topk(k, dim=-1, sorted=ranked).indices
    blocks, size, best = _best_blocks(scores, k)
    offsets = torch.arange(0, size * blocks, blocks, device=scores.device)
    places = (best.unsqueeze(-2) + offsets.unsqueeze(-1)).flatten(-2)
    rest = torch.arange(size * blocks, scores.shape[-1], device=scores.device).expand(*places.shape[:-1], -1)
    places = torch.cat([places, rest], -1)
    found = scores.gather(-1, places).topk(k, dim=-1, sorted=ranked).indices
    return places.gather(-1, found)


def top_values(scores: Float[Tensor, "*rows n"], k: int) -> Float[Tensor, "*rows k"]:
    """The k largest scores, descending, found in the same way."""
    if not _is_long(scores, k):
        return scores.topk(k, dim=-1).values
    blocks, size, best = _best_blocks(scores, k)
    whole = scores[..., : size * blocks].unflatten(-1, (size, blocks))
    found = whole.gather(-1, best.unsqueeze(-2).expand(*best.shape[:-1], size, k)).flatten(-2)
    return torch.cat([found, scores[..., size * blocks :]], -1).topk(k, dim=-1).values


def at_rank(ranked: Shaped[Tensor, "*rows m"], k: int | Int[Tensor, "*ks"]) -> Shaped[Tensor, "*out 1"]:
    """The k-th of what is ranked; a tensor k, which may have more rows than that, gives each its own."""
    if isinstance(k, int):
        return ranked[..., k - 1 : k]
    shape = torch.broadcast_shapes(k.shape, ranked.shape[:-1])
    place = (k - 1).unsqueeze(-1).expand(*shape, 1)
    return ranked.expand(*shape, ranked.shape[-1]).gather(-1, place)


def _is_long(scores: Tensor, k: int) -> bool:
    # An accelerator's topk is another algorithm, with no queue of n pairs to fill.
    n = scores.shape[-1]
    return scores.device.type == "cpu" and n >= LONG and n >= RARE * k


def _best_blocks(scores: Tensor, k: int) -> tuple[int, int, Tensor]:
    """How many blocks, of how many scores, and which k have the largest maxima."""
    n = scores.shape[-1]
    size = math.isqrt(n // k)
    blocks = n // size
    # Block i holds i, i + blocks, i + 2 blocks, ...: maxima over an outer axis use vector instructions.
    maxima = scores[..., : size * blocks].unflatten(-1, (size, blocks)).amax(-2)
    return blocks, size, maxima.topk(k, dim=-1, sorted=False).indices
