"""scikit-learn's digits to retrieve from: a gallery of training rows, and queries that are not in it."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topkbench.randomness import Noise
from topkbench.tasks._contract import Teacher
from topkbench.tasks._digits_binary import PIXELS, first, halves, labels
from topkbench.tasks._split import Split, again

CLASSES = 10


class Queries(NamedTuple):
    """Rows to bring something back for, and their classes."""

    x: Float[Tensor, "R B 64"]
    label: Int[Tensor, "R B"]


def check(n: int, d: int, split: Split) -> None:
    """Refuse a gallery that cannot be.

    Raises:
        ValueError: d is not 64, n not a multiple of 10, or so large that a class has no row left to ask with.
    """
    if d != PIXELS:
        raise ValueError(f"d must be {PIXELS} for digits, got {d}")
    most = CLASSES * (int(labels(torch.device("cpu"), split)[0].bincount().min()) - 1)
    if n % CLASSES or not CLASSES <= n <= most:
        raise ValueError(f"n must be a multiple of {CLASSES} in [{CLASSES}, {most}] for digits, got {n}")


def gallery(noise: Noise, n: int, split: Split) -> Teacher:
    """Random training rows, n / 10 of each class, one class after the other; and the others, to ask with.

    Returns:
        `candidates` `(R, n, 64)`, `queries` `(R, T - n, 64)` and their classes, `labels` `(R, T - n)`.
    """
    size = len(labels(torch.device("cpu"), split)[0])
    order = noise("gallery", size, law="uniform")
    rows, label = halves(order.dtype, order.device, split)[0], labels(order.device, split)[0]
    by_class = (label + order.double()).argsort(-1)  # at random within a class
    counts = label.bincount(minlength=CLASSES)
    within = torch.arange(size, device=order.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    in_gallery = within < n // CLASSES
    chosen, rest = by_class[:, in_gallery], by_class[:, ~in_gallery]
    return {"candidates": rows[chosen], "queries": rows[rest], "labels": label[rest]}


def asked(teacher: Teacher, noise: Noise, rows: int) -> Queries:
    """Training rows that are not in the gallery, drawn with replacement."""
    x, label = teacher["queries"], teacher["labels"]
    drawn = again(noise, rows, label.shape[1])
    return Queries(x.gather(1, drawn.unsqueeze(-1).expand(-1, -1, PIXELS)), label.gather(1, drawn))


def held_out(teacher: Teacher, rows: int, split: Split) -> Queries:
    """The first of the held-out rows, all of them where there are no more."""
    like = teacher["candidates"]
    return Queries(
        first(halves(like.dtype, like.device, split)[1], rows, len(like)),
        labels(like.device, split)[1][:rows].expand(len(like), -1),
    )


def relevant(label: Int[Tensor, "R B"], n: int) -> Int[Tensor, "R B r"]:
    """The places in the gallery of what is of the same class."""
    count = n // CLASSES
    return label.unsqueeze(-1) * count + torch.arange(count, device=label.device)
