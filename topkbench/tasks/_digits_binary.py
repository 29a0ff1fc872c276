"""scikit-learn's digits as rows to learn from, split once for all replicates: grey, or black and white."""

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.randomness import Noise
from topkbench.tasks._digits import digits, split

PIXELS = 64


@functools.lru_cache(maxsize=8)
def halves(dtype: torch.dtype, device: torch.device) -> tuple[Float[Tensor, "T 64"], Float[Tensor, "H 64"]]:
    """1,257 training rows and 540 that are held out, pixels in [0, 1]."""
    table = digits()
    train, held_out = (torch.as_tensor(table.x[rows], dtype=dtype, device=device) for rows in split(table))
    return train, held_out


def black_and_white(pixels: Float[Tensor, "*rows 64"]) -> Float[Tensor, "*rows 64"]:
    """1 where a pixel is above one half, else 0."""
    return (pixels > 0.5).to(pixels.dtype)


def drawn(data: Float[Tensor, "T m"], noise: Noise, rows: int) -> Float[Tensor, "R B m"]:
    """`rows` of the data for each replicate, drawn with replacement."""
    place = noise("row", rows, law="uniform") * len(data)
    return data[place.long().clamp(max=len(data) - 1)]


def first(data: Float[Tensor, "T m"], rows: int, replicates: int) -> Float[Tensor, "R B m"]:
    """The first rows of the data, all of it where there are no more, the same for each replicate."""
    return data[:rows].expand(replicates, -1, -1)
