"""scikit-learn's digits as rows to learn from, split alike for all replicates: grey, or black and white."""

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkbench.randomness import Noise
from topkbench.tasks._digits import digits
from topkbench.tasks._split import Split, again, common

PIXELS = 64


@functools.lru_cache(maxsize=8)
def halves(
    dtype: torch.dtype, device: torch.device, split: Split = "evaluation"
) -> tuple[Float[Tensor, "T 64"], Float[Tensor, "H 64"]]:
    """1,257 training rows and 540 that are held out, pixels in [0, 1]; 879 and 378 for tuning."""
    table = digits()
    train, held_out = (
        torch.as_tensor(table.x[rows], dtype=dtype, device=device) for rows in common(table, split, "digits")
    )
    return train, held_out


@functools.lru_cache(maxsize=8)
def labels(device: torch.device, split: Split = "evaluation") -> tuple[Int[Tensor, " T"], Int[Tensor, " H"]]:
    """The classes of the rows of `halves`."""
    y = torch.as_tensor(digits().y, device=device).long()
    train, held_out = (y[torch.as_tensor(rows, device=device)] for rows in common(digits(), split, "digits"))
    return train, held_out


def black_and_white(pixels: Float[Tensor, "*rows 64"]) -> Float[Tensor, "*rows 64"]:
    """1 where a pixel is above one half, else 0."""
    return (pixels > 0.5).to(pixels.dtype)


def drawn(data: Float[Tensor, "T m"], noise: Noise, rows: int) -> Float[Tensor, "R B m"]:
    """`rows` of the data for each replicate, drawn with replacement."""
    return data[again(noise, rows, len(data))]


def first(data: Float[Tensor, "T m"], rows: int, replicates: int) -> Float[Tensor, "R B m"]:
    """The first rows of the data, all of it where there are no more, the same for each replicate."""
    return data[:rows].expand(replicates, -1, -1)
